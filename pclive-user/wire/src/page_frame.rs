//! Frames of the page streams: batches of pages, and the barriers that end a round.
//!
//! ```text
//!   0      2      3    4      6        8         12      16
//!   ├──────┼──────┼────┼──────┼────────┼─────────┼───────┼─────────────────────┬──────────┄
//!   │ "PF" │ kind │ 0  │ runs │ blocks │ process │ round │ runs, 16 bytes each │ contents
//!   └──────┴──────┴────┴──────┴────────┴─────────┴───────┴─────────────────────┴──────────┄
//!   one run:  │ start: u64 │ pages: u32 │ kind │ 0 │ mask: u16 │                 little-endian
//! ```
//!
//! A block is a sixteenth of a page. Of the pages of a raw run all blocks travel, of those of a patched run the ones whose
//! bits are set in the mask (the lowest bit is the first block). They follow in the order of the runs, page by page. Runs of
//! a batch ascend and do not overlap.
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

/// Bytes of a block.
pub const BLOCK_LEN: usize = PAGE_SIZE as usize / BLOCKS_PER_PAGE;
/// Blocks of a page.
pub const BLOCKS_PER_PAGE: usize = 16;

const MAGIC: [u8; 2] = *b"PF";
/// Blocks of the largest contents.
const MAX_BATCH_BLOCKS: usize = MAX_CONTENTS_LEN / BLOCK_LEN;
const _: () = assert!(MAX_BATCH_BLOCKS <= u16::MAX as usize);

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
    /// Number of blocks that follow, over all runs.
    pub blocks: u16,
}

impl BatchHeader {
    /// Bytes of the runs that follow the header.
    pub fn runs_len(&self) -> usize {
        usize::from(self.runs) * RUN_LEN
    }

    /// Bytes of the contents that follow the runs.
    pub fn contents_len(&self) -> usize {
        usize::from(self.blocks) * BLOCK_LEN
    }
}

/// Some of the blocks of a page, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockMask(u16);

impl BlockMask {
    /// Every block.
    pub const ALL: Self = Self(u16::MAX);

    /// The blocks whose bits are set, if there are any; the lowest bit is the first block.
    pub fn new(bits: u16) -> Option<Self> {
        (bits != 0).then_some(Self(bits))
    }

    /// The bits.
    pub fn bits(self) -> u16 {
        self.0
    }

    /// How many blocks there are.
    pub fn blocks(self) -> usize {
        self.0.count_ones() as usize
    }

    /// The parts of a page that the blocks are, adjacent ones joined: their first byte, and their length in bytes.
    pub fn parts(self) -> impl Iterator<Item = (usize, usize)> {
        let mut rest = u32::from(self.0);
        std::iter::from_fn(move || {
            if rest == 0 {
                return None;
            }
            let first = rest.trailing_zeros();
            let len = (rest >> first).trailing_ones();
            rest &= !(((1 << len) - 1) << first);
            Some((first as usize * BLOCK_LEN, len as usize * BLOCK_LEN))
        })
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

impl PageRun {
    /// Blocks that travel with the run.
    fn blocks(&self) -> usize {
        let blocks_of_page = match self.kind {
            RunKind::Raw => BLOCKS_PER_PAGE,
            RunKind::Patch(mask) => mask.blocks(),
            RunKind::Zero | RunKind::Absent => 0,
        };
        self.range.pages as usize * blocks_of_page
    }

    /// Bytes that travel with the run.
    pub fn contents_len(&self) -> usize {
        self.blocks() * BLOCK_LEN
    }
}

/// What a run says of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunKind {
    /// Their contents follow.
    Raw,
    /// They are all zero.
    Zero,
    /// They were sent once and are no longer there: unmapped, or given back with `MADV_DONTNEED`.
    Absent,
    /// These blocks of theirs follow; the others are as they were sent before.
    Patch(BlockMask),
}

impl RunKind {
    /// Its number, and its mask.
    fn encode(self) -> (u8, u16) {
        match self {
            Self::Raw => (0, 0),
            Self::Zero => (1, 0),
            Self::Absent => (2, 0),
            Self::Patch(mask) => (3, mask.bits()),
        }
    }

    fn decode(number: u8, mask: u16) -> Option<Self> {
        match (number, BlockMask::new(mask)) {
            (0, None) => Some(Self::Raw),
            (1, None) => Some(Self::Zero),
            (2, None) => Some(Self::Absent),
            (3, Some(mask)) => Some(Self::Patch(mask)),
            _ => None,
        }
    }
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
        "batch of {runs} runs and {blocks} blocks; 1 to {MAX_BATCH_RUNS} and at most {MAX_BATCH_BLOCKS} are possible"
    )]
    BatchSize { runs: usize, blocks: usize },
    #[error("barrier with a body")]
    BarrierBody,
    #[error("process id {0} in a page frame")]
    Process(i32),
    #[error("unknown kind {kind} with mask {mask:#x} of the run at {start}")]
    RunKind { start: VirtAddr, kind: u8, mask: u16 },
    #[error("run at {start} of {pages} pages is not a range of user pages")]
    RunRange { start: VirtAddr, pages: u64 },
    #[error("run {0} is too long")]
    RunTooLong(PageRange),
    #[error("run {next} does not lie behind {previous}")]
    RunOrder { previous: PageRange, next: PageRange },
    #[error("runs have {runs} blocks, header says {header}")]
    BlockCount { runs: usize, header: usize },
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
        let blocks = u16::from_le_bytes([n0, n1]);
        let process = i32::from_le_bytes([p0, p1, p2, p3]);
        let round = Round(u32::from_le_bytes([s0, s1, s2, s3]));
        match kind {
            KIND_BATCH => {
                check_batch(process, usize::from(runs), usize::from(blocks))?;
                Ok(Self::Batch(BatchHeader { process: NsPid(process), round, runs, blocks }))
            }
            KIND_BARRIER if runs == 0 && blocks == 0 && process == 0 => Ok(Self::Barrier(round)),
            KIND_BARRIER => Err(PageFrameError::BarrierBody),
            other => Err(PageFrameError::Kind(other)),
        }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let (kind, runs, blocks, process, round) = match *self {
            Self::Batch(b) => (KIND_BATCH, b.runs, b.blocks, b.process.0, b.round),
            Self::Barrier(round) => (KIND_BARRIER, 0, 0, 0, round),
        };
        let mut bytes = [0; HEADER_LEN];
        bytes[..2].copy_from_slice(&MAGIC);
        bytes[2] = kind;
        bytes[4..6].copy_from_slice(&runs.to_le_bytes());
        bytes[6..8].copy_from_slice(&blocks.to_le_bytes());
        bytes[8..12].copy_from_slice(&process.to_le_bytes());
        bytes[12..16].copy_from_slice(&round.0.to_le_bytes());
        bytes
    }
}

fn check_batch(process: i32, runs: usize, blocks: usize) -> Result<(), PageFrameError> {
    if process <= 0 {
        return Err(PageFrameError::Process(process));
    }
    if runs == 0 || runs > MAX_BATCH_RUNS || blocks > MAX_BATCH_BLOCKS {
        return Err(PageFrameError::BatchSize { runs, blocks });
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
    let blocks = check_runs(runs)?;
    check_batch(process.0, runs.len(), blocks)?;
    // Both casts hold by the check just made.
    let header = BatchHeader { process, round, runs: runs.len() as u16, blocks: blocks as u16 };
    head[..HEADER_LEN].copy_from_slice(&FrameHeader::Batch(header).encode());
    for (run, bytes) in runs.iter().zip(head[HEADER_LEN..].chunks_exact_mut(RUN_LEN)) {
        bytes[..8].copy_from_slice(&run.range.start.0.to_le_bytes());
        bytes[8..12].copy_from_slice(&(run.range.pages as u32).to_le_bytes());
        let (kind, mask) = run.kind.encode();
        bytes[12..14].copy_from_slice(&[kind, 0]);
        bytes[14..].copy_from_slice(&mask.to_le_bytes());
    }
    Ok((header, HEADER_LEN + header.runs_len()))
}

/// Checks and takes apart the runs behind `header`; `bytes` are the [`BatchHeader::runs_len`] bytes of them.
pub fn decode_runs(header: &BatchHeader, bytes: &[u8]) -> Result<Vec<PageRun>, PageFrameError> {
    let runs = bytes.chunks_exact(RUN_LEN).map(decode_run).collect::<Result<Vec<_>, _>>()?;
    let blocks = check_runs(&runs)?;
    if blocks != usize::from(header.blocks) || runs.len() != usize::from(header.runs) {
        return Err(PageFrameError::BlockCount { runs: blocks, header: header.blocks.into() });
    }
    Ok(runs)
}

fn decode_run(bytes: &[u8]) -> Result<PageRun, PageFrameError> {
    let mut start = [0; 8];
    start.copy_from_slice(&bytes[..8]);
    let start = VirtAddr(u64::from_le_bytes(start));
    let pages = u64::from(u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]));
    if bytes[13] != 0 {
        return Err(PageFrameError::Reserved);
    }
    let (kind, mask) = (bytes[12], u16::from_le_bytes([bytes[14], bytes[15]]));
    let kind = RunKind::decode(kind, mask).ok_or(PageFrameError::RunKind { start, kind, mask })?;
    Ok(PageRun { range: PageRange { start, pages }, kind })
}

/// Checks ranges, lengths and order; returns the number of blocks that belong to the runs.
fn check_runs(runs: &[PageRun]) -> Result<usize, PageFrameError> {
    let mut blocks = 0;
    let mut previous: Option<PageRange> = None;
    for run in runs {
        let PageRun { range, kind } = *run;
        if !range.is_valid_user_range() {
            return Err(PageFrameError::RunRange { start: range.start, pages: range.pages });
        }
        let longest = match kind {
            RunKind::Raw | RunKind::Patch(_) => MAX_BATCH_PAGES as u64,
            RunKind::Zero | RunKind::Absent => MAX_EMPTY_RUN_PAGES,
        };
        if range.pages > longest {
            return Err(PageFrameError::RunTooLong(range));
        }
        if let Some(previous) = previous.filter(|p| range.start < p.end()) {
            return Err(PageFrameError::RunOrder { previous, next: range });
        }
        previous = Some(range);
        blocks += run.blocks();
    }
    Ok(blocks)
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
        let patch = RunKind::Patch(BlockMask::new(0x8011).unwrap());
        let runs = [
            run(16, 2, RunKind::Raw),
            run(18, 1 << 18, RunKind::Zero),
            run(1 << 29, 16, patch),
            run(1 << 30, 251, RunKind::Raw),
        ];
        let (header, bytes) = encoded(7, &runs).unwrap();
        assert_eq!((header.runs, header.blocks, bytes.len()), (4, 256 * 16, HEADER_LEN + 64));
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
        // A mask is no business of a raw run.
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
            FrameHeader::Batch(BatchHeader { process: NsPid(1), round: Round(round), runs: 1, blocks: 1 })
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
        fn the_parts_of_a_mask_are_its_blocks(bits in 1..=u16::MAX) {
            let mask = BlockMask::new(bits).unwrap();
            let parts: Vec<_> = mask.parts().collect();
            let blocks = parts.iter().flat_map(|(at, len)| at / BLOCK_LEN..(at + len) / BLOCK_LEN);
            prop_assert_eq!(blocks.map(|block| 1 << block).sum::<u16>(), bits);
            prop_assert!(parts.windows(2).all(|two| two[0].0 + two[0].1 < two[1].0));
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_what_is_taken_is_within_limits(
            mut bytes in prop::collection::vec(any::<u8>(), HEADER_LEN + 4 * RUN_LEN),
            shape in any::<bool>(),
        ) {
            if shape {
                bytes[..4].copy_from_slice(&[b'P', b'F', KIND_BATCH, 0]);
                bytes[4..6].copy_from_slice(&[4, 0]);
                bytes.chunks_exact_mut(RUN_LEN).skip(1).for_each(|r| {
                    (r[0], r[7], r[13]) = (0, 0, 0);
                    r[12] %= 5;
                });
            }
            if let Ok((_, runs)) = decoded(&bytes) {
                prop_assert!(runs.iter().all(|r| r.range.is_valid_user_range()));
                prop_assert!(check_runs(&runs)? <= MAX_BATCH_BLOCKS);
            }
        }

        #[test]
        fn any_valid_batch_comes_back(
            process in 1..i32::MAX,
            gaps in prop::collection::vec((0..1000u64, 1..4u64, 0..4usize, 1..u16::MAX), 1..64),
        ) {
            let mut at = 16;
            let runs: Vec<_> = gaps.iter().map(|&(gap, pages, kind, mask)| {
                let patch = RunKind::Patch(BlockMask(mask));
                let kind = [RunKind::Raw, RunKind::Zero, RunKind::Absent, patch][kind];
                let run = run(at + gap, pages, kind);
                at += gap + pages;
                run
            }).collect();
            let (header, bytes) = encoded(process, &runs)?;
            prop_assert_eq!(decoded(&bytes)?, (FrameHeader::Batch(header), runs));
        }
    }
}
