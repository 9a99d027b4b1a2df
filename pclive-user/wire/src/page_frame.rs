//! Frames of the page streams: batches of pages, and the barriers that end a round.
//!
//! ```text
//!   0      2      3    4      6       8         12      16
//!   ├──────┼──────┼────┼──────┼───────┼─────────┼───────┼─────────────────────┬──────────┄
//!   │ "PF" │ kind │ 0  │ runs │ pages │ process │ round │ runs, 16 bytes each │ contents
//!   └──────┴──────┴────┴──────┴───────┴─────────┴───────┴─────────────────────┴──────────┄
//!   one run:  │ start: u64 │ pages: u32 │ kind │ 0 0 0 │                        little-endian
//! ```
//!
//! The contents of the raw runs follow in the order of the runs. Runs of a batch ascend and do not overlap.
//!
//! A page may be sent again in a later round, on another stream. [`StreamOrder`] holds the rule that makes this safe:
//! on each stream the frames of a round lie between two barriers, and a receiver that has to let the newer copy win
//! (all of them) begins with a round only when the barrier of the one before has arrived on every stream.

use crate::limits::{MAX_BATCH_PAGES, MAX_BATCH_RUNS, MAX_EMPTY_RUN_PAGES};
use crate::units::{NsPid, PAGE_SIZE, PageRange, Round, VirtAddr};

/// Bytes of a frame header.
pub const HEADER_LEN: usize = 16;
/// Bytes of one run.
pub const RUN_LEN: usize = 16;
/// Bytes of the largest header with its runs.
pub const MAX_HEAD_LEN: usize = HEADER_LEN + MAX_BATCH_RUNS * RUN_LEN;
/// Bytes of the largest contents.
pub const MAX_CONTENTS_LEN: usize = MAX_BATCH_PAGES * PAGE_SIZE as usize;

const MAGIC: [u8; 2] = *b"PF";
const KIND_BATCH: u8 = 1;
const KIND_BARRIER: u8 = 2;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameHeader {
    /// Pages of one process.
    Batch(BatchHeader),
    /// Everything of this round that this stream carries has been sent.
    Barrier(Round),
}

/// What follows a batch's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// Whose pages.
    pub process: NsPid,
    /// Of which round.
    pub round: Round,
    /// Number of runs.
    pub runs: u16,
    /// Number of pages with contents, over all runs.
    pub pages: u16,
}

impl BatchHeader {
    /// Bytes of the runs that follow the header.
    pub fn runs_len(&self) -> usize {
        usize::from(self.runs) * RUN_LEN
    }

    /// Bytes of the contents that follow the runs.
    pub fn contents_len(&self) -> usize {
        usize::from(self.pages) * PAGE_SIZE as usize
    }
}

/// Adjacent pages of the same kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Which pages.
    pub range: PageRange,
    /// What is known of them.
    pub kind: RunKind,
}

/// What a run says of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RunKind {
    /// Their contents follow.
    Raw = 0,
    /// They are all zero.
    Zero = 1,
    /// They were sent once and are no longer there: unmapped, or given back with `MADV_DONTNEED`.
    Absent = 2,
}

/// A page frame that cannot be taken, or made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum PageFrameError {
    #[error("page frame starts with {0:02x?}")]
    Magic([u8; 2]),
    #[error("unknown kind {0} of page frame")]
    Kind(u8),
    #[error("reserved bytes of a page frame are not zero")]
    Reserved,
    #[error(
        "batch of {runs} runs and {pages} pages; 1 to {MAX_BATCH_RUNS} and at most {MAX_BATCH_PAGES} are possible"
    )]
    BatchSize { runs: usize, pages: usize },
    #[error("barrier with a body")]
    BarrierBody,
    #[error("process id {0} in a page frame")]
    Process(i32),
    #[error("unknown kind {kind} of the run at {start}")]
    RunKind { start: VirtAddr, kind: u8 },
    #[error("run at {start} of {pages} pages is not a range of user pages")]
    RunRange { start: VirtAddr, pages: u64 },
    #[error("run {0} is too long")]
    RunTooLong(PageRange),
    #[error("run {next} does not lie behind {previous}")]
    RunOrder { previous: PageRange, next: PageRange },
    #[error("runs have {runs} pages with contents, header says {header}")]
    PageCount { runs: usize, header: usize },
    #[error("frame of round {got} in round {expected}")]
    Round { got: Round, expected: Round },
}

impl FrameHeader {
    /// Checks and takes apart a header.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, PageFrameError> {
        let [m0, m1, kind, zero, r0, r1, n0, n1, p0, p1, p2, p3, s0, s1, s2, s3] = *bytes;
        if [m0, m1] != MAGIC {
            return Err(PageFrameError::Magic([m0, m1]));
        }
        if zero != 0 {
            return Err(PageFrameError::Reserved);
        }
        let runs = u16::from_le_bytes([r0, r1]);
        let pages = u16::from_le_bytes([n0, n1]);
        let process = i32::from_le_bytes([p0, p1, p2, p3]);
        let round = Round(u32::from_le_bytes([s0, s1, s2, s3]));
        match kind {
            KIND_BATCH => {
                check_batch(process, usize::from(runs), usize::from(pages))?;
                Ok(Self::Batch(BatchHeader { process: NsPid(process), round, runs, pages }))
            }
            KIND_BARRIER if runs == 0 && pages == 0 && process == 0 => Ok(Self::Barrier(round)),
            KIND_BARRIER => Err(PageFrameError::BarrierBody),
            other => Err(PageFrameError::Kind(other)),
        }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let (kind, runs, pages, process, round) = match *self {
            Self::Batch(b) => (KIND_BATCH, b.runs, b.pages, b.process.0, b.round),
            Self::Barrier(round) => (KIND_BARRIER, 0, 0, 0, round),
        };
        let mut bytes = [0; HEADER_LEN];
        bytes[..2].copy_from_slice(&MAGIC);
        bytes[2] = kind;
        bytes[4..6].copy_from_slice(&runs.to_le_bytes());
        bytes[6..8].copy_from_slice(&pages.to_le_bytes());
        bytes[8..12].copy_from_slice(&process.to_le_bytes());
        bytes[12..16].copy_from_slice(&round.0.to_le_bytes());
        bytes
    }
}

fn check_batch(process: i32, runs: usize, pages: usize) -> Result<(), PageFrameError> {
    if process <= 0 {
        return Err(PageFrameError::Process(process));
    }
    if runs == 0 || runs > MAX_BATCH_RUNS || pages > MAX_BATCH_PAGES {
        return Err(PageFrameError::BatchSize { runs, pages });
    }
    Ok(())
}

/// Writes header and runs of a batch to `head`, and says how many bytes they take. Checks what the receiver will check.
pub fn encode_batch(
    process: NsPid,
    round: Round,
    runs: &[PageRun],
    head: &mut [u8; MAX_HEAD_LEN],
) -> Result<(BatchHeader, usize), PageFrameError> {
    let pages = check_runs(runs)?;
    check_batch(process.0, runs.len(), pages)?;
    // Both casts hold by the check just made.
    let header = BatchHeader { process, round, runs: runs.len() as u16, pages: pages as u16 };
    head[..HEADER_LEN].copy_from_slice(&FrameHeader::Batch(header).encode());
    for (run, bytes) in runs.iter().zip(head[HEADER_LEN..].chunks_exact_mut(RUN_LEN)) {
        bytes[..8].copy_from_slice(&run.range.start.0.to_le_bytes());
        bytes[8..12].copy_from_slice(&(run.range.pages as u32).to_le_bytes());
        bytes[12..].copy_from_slice(&[run.kind as u8, 0, 0, 0]);
    }
    Ok((header, HEADER_LEN + header.runs_len()))
}

/// Checks and takes apart the runs behind `header`; `bytes` are the [`BatchHeader::runs_len`] bytes of them.
pub fn decode_runs(header: &BatchHeader, bytes: &[u8]) -> Result<Vec<PageRun>, PageFrameError> {
    let runs = bytes.chunks_exact(RUN_LEN).map(decode_run).collect::<Result<Vec<_>, _>>()?;
    let pages = check_runs(&runs)?;
    if pages != usize::from(header.pages) || runs.len() != usize::from(header.runs) {
        return Err(PageFrameError::PageCount { runs: pages, header: header.pages.into() });
    }
    Ok(runs)
}

fn decode_run(bytes: &[u8]) -> Result<PageRun, PageFrameError> {
    let mut start = [0; 8];
    start.copy_from_slice(&bytes[..8]);
    let start = VirtAddr(u64::from_le_bytes(start));
    let pages = u64::from(u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]));
    if bytes[13..] != [0, 0, 0] {
        return Err(PageFrameError::Reserved);
    }
    let kind = match bytes[12] {
        0 => RunKind::Raw,
        1 => RunKind::Zero,
        2 => RunKind::Absent,
        kind => return Err(PageFrameError::RunKind { start, kind }),
    };
    Ok(PageRun { range: PageRange { start, pages }, kind })
}

/// Checks ranges, lengths and order; returns the number of pages with contents.
fn check_runs(runs: &[PageRun]) -> Result<usize, PageFrameError> {
    let mut raw_pages = 0;
    let mut previous: Option<PageRange> = None;
    for &PageRun { range, kind } in runs {
        if !range.is_valid_user_range() {
            return Err(PageFrameError::RunRange { start: range.start, pages: range.pages });
        }
        let longest = if kind == RunKind::Raw { MAX_BATCH_PAGES as u64 } else { MAX_EMPTY_RUN_PAGES };
        if range.pages > longest {
            return Err(PageFrameError::RunTooLong(range));
        }
        if let Some(previous) = previous.filter(|p| range.start < p.end()) {
            return Err(PageFrameError::RunOrder { previous, next: range });
        }
        previous = Some(range);
        if kind == RunKind::Raw {
            raw_pages += range.pages as usize;
        }
    }
    Ok(raw_pages)
}

/// Which round a page stream is in. The same on both ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOrder {
    round: Round,
}

impl StreamOrder {
    /// The round whose frames may come now.
    pub fn round(&self) -> Round {
        self.round
    }

    /// Takes the next frame, which must belong to the current round; a barrier ends it.
    pub fn take(&mut self, header: &FrameHeader) -> Result<(), PageFrameError> {
        let (FrameHeader::Batch(BatchHeader { round: got, .. }) | FrameHeader::Barrier(got)) = *header;
        if got != self.round {
            return Err(PageFrameError::Round { got, expected: self.round });
        }
        if let FrameHeader::Barrier(_) = header {
            self.round = Round(got.0.wrapping_add(1));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(start: u64, pages: u64, kind: RunKind) -> PageRun {
        PageRun { range: PageRange { start: VirtAddr(start << 12), pages }, kind }
    }

    fn encoded(process: i32, runs: &[PageRun]) -> Result<(BatchHeader, Vec<u8>), PageFrameError> {
        let mut head = [0; MAX_HEAD_LEN];
        let (header, len) = encode_batch(NsPid(process), Round(3), runs, &mut head)?;
        Ok((header, head[..len].to_vec()))
    }

    fn decoded(bytes: &[u8]) -> Result<(FrameHeader, Vec<PageRun>), PageFrameError> {
        let header = FrameHeader::decode(bytes[..HEADER_LEN].try_into().unwrap())?;
        match header {
            FrameHeader::Batch(batch) => Ok((header, decode_runs(&batch, &bytes[HEADER_LEN..])?)),
            FrameHeader::Barrier(_) => Ok((header, Vec::new())),
        }
    }

    #[test]
    fn a_batch_comes_back() {
        let runs =
            [run(16, 2, RunKind::Raw), run(18, 1 << 18, RunKind::Zero), run(1 << 30, 254, RunKind::Raw)];
        let (header, bytes) = encoded(7, &runs).unwrap();
        assert_eq!((header.runs, header.pages, bytes.len()), (3, 256, HEADER_LEN + 48));
        assert_eq!(header.contents_len(), MAX_CONTENTS_LEN);
        assert_eq!(decoded(&bytes), Ok((FrameHeader::Batch(header), runs.to_vec())));
    }

    #[test]
    fn pages_of_a_batch_need_not_be_adjacent() {
        let runs: Vec<_> = (0..MAX_BATCH_PAGES as u64).map(|i| run(i * 2, 1, RunKind::Raw)).collect();
        let (header, bytes) = encoded(7, &runs).unwrap();
        assert_eq!(bytes.len(), MAX_HEAD_LEN);
        assert_eq!(decoded(&bytes), Ok((FrameHeader::Batch(header), runs)));
    }

    #[test]
    fn what_a_receiver_would_refuse_is_not_sent() {
        let many: Vec<_> = (0..257).map(|i| run(i * 2, 1, RunKind::Zero)).collect();
        let r = RunKind::Raw;
        for (process, runs) in [
            (0, vec![run(1, 1, r)]),
            (1, vec![]),
            (1, many),
            (1, vec![run(1, 0, r)]),
            (1, vec![run(1, 257, r)]),
            (1, vec![run(1, (1 << 18) + 1, RunKind::Zero)]),
            (1, vec![run(1, 129, r), run(200, 128, r)]),
            (1, vec![run(5, 2, r), run(6, 1, RunKind::Absent)]),
            (1, vec![run(1 << 35, 1, r)]),
        ] {
            assert!(encoded(process, &runs).is_err(), "{process} {runs:?}");
        }
    }

    #[test]
    fn every_damaged_byte_of_the_fixed_fields_is_noticed() {
        let (_, good) = encoded(7, &[run(16, 2, RunKind::Raw)]).unwrap();
        // Magic, kind, reserved; runs and pages; alignment of the start; page count; run kind and reserved.
        for at in [0, 1, 2, 3, 4, 5, 6, 7, 11, 16, 23, 24, 27, 28, 29, 30, 31] {
            let mut bad = good.clone();
            bad[at] ^= 0x80;
            assert!(decoded(&bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn rounds_follow_each_other_by_barriers() {
        let mut order = StreamOrder::default();
        let batch = |round| {
            FrameHeader::Batch(BatchHeader { process: NsPid(1), round: Round(round), runs: 1, pages: 1 })
        };
        for header in [batch(0), FrameHeader::Barrier(Round(0)), FrameHeader::Barrier(Round(1)), batch(2)] {
            assert_eq!(order.take(&header), Ok(()));
        }
        for header in [batch(1), batch(3), FrameHeader::Barrier(Round(1)), FrameHeader::Barrier(Round(3))] {
            assert!(order.take(&header).is_err(), "{header:?}");
        }
        assert_eq!(order.round(), Round(2));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic_and_what_is_taken_is_within_limits(
            mut bytes in prop::collection::vec(any::<u8>(), HEADER_LEN + 4 * RUN_LEN),
            shape in any::<bool>(),
        ) {
            if shape {
                bytes[..4].copy_from_slice(&[b'P', b'F', KIND_BATCH, 0]);
                bytes[4..6].copy_from_slice(&[4, 0]);
                bytes.chunks_exact_mut(RUN_LEN).skip(1).for_each(|r| {
                    (r[0], r[7], r[13], r[14], r[15]) = (0, 0, 0, 0, 0);
                    r[12] %= 4;
                });
            }
            if let Ok((_, runs)) = decoded(&bytes) {
                prop_assert!(runs.iter().all(|r| r.range.is_valid_user_range()));
                prop_assert!(check_runs(&runs)? <= MAX_BATCH_PAGES);
            }
        }

        #[test]
        fn any_valid_batch_comes_back(
            process in 1..i32::MAX,
            gaps in prop::collection::vec((0..1000u64, 1..4u64, 0..3u8), 1..64),
        ) {
            let mut at = 16;
            let runs: Vec<_> = gaps.iter().map(|&(gap, pages, kind)| {
                let kind = [RunKind::Raw, RunKind::Zero, RunKind::Absent][usize::from(kind)];
                let run = run(at + gap, pages, kind);
                at += gap + pages;
                run
            }).collect();
            let (header, bytes) = encoded(process, &runs)?;
            prop_assert_eq!(decoded(&bytes)?, (FrameHeader::Batch(header), runs));
        }
    }
}
