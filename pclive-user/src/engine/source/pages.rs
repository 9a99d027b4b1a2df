//! Reading and sending the pages of a round.

use super::sent::Sent;
use crate::engine::background::{Background, urgently};
use crate::track::attach::batches;
use crate::track::digests::Digests;
use crate::transport::{self, PageSender};
use pclive_sys::mem::ProcessMemory;
use pclive_wire::control::RoundSummary;
use pclive_wire::limits::MAX_BATCH_PAGES;
use pclive_wire::page_frame::{BlockMask, PageRun, RunKind};
use pclive_wire::{NsPid, PAGE_SIZE, PageRange, PageSet, Round, VirtAddr};
use std::time::Duration;

/// Why pages could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The stream failed.
    #[error(transparent)]
    Transport(#[from] transport::Error),
    /// The pages could not be read.
    #[error("cannot read pages of process {pid}")]
    Read {
        /// Whose, as the container numbers it.
        pid: NsPid,
        /// Why.
        source: pclive_sys::Error,
    },
}

/// The pages of one round on their way.
pub struct Outgoing<'a> {
    sender: &'a mut PageSender,
    before: &'a mut Sent,
    background: Option<Background>,
    sent: RoundSummary,
}

impl<'a> Outgoing<'a> {
    /// Begins `round`; of pages that were sent `before`, only what has changed is sent, if that is known.
    pub fn new(sender: &'a mut PageSender, before: &'a mut Sent, round: Round) -> Self {
        Self { sender, before, background: None, sent: RoundSummary::none(round) }
    }

    /// The same as background work, if there is any background.
    pub fn in_background(self, background: Option<Background>) -> Self {
        Self { background, ..self }
    }

    /// For how long it has waited for a processor, in the background.
    pub fn waited(&self) -> Duration {
        self.background.as_ref().map_or(Duration::ZERO, Background::waited)
    }

    /// Does what holds locks that the container needs, too.
    pub fn urgently<T>(&mut self, work: impl FnOnce() -> T) -> T {
        urgently(&mut self.background, work)
    }

    /// Reads and sends pages of the process `pid`.
    pub fn pages(&mut self, pid: NsPid, memory: &ProcessMemory, pages: &PageSet) -> Result<(), SendError> {
        for ranges in batches(pages.ranges(), MAX_BATCH_PAGES as u64) {
            let mut buffer = self.sender.buffer()?;
            let contents = buffer.contents_mut();
            let missing = urgently(&mut self.background, || memory.read_pages(&ranges, contents))
                .map_err(|source| SendError::Read { pid, source })?;
            let digests = self.before.of(pid).and_then(|before| before.sending(&ranges));
            let runs = compact(&ranges, &missing, contents, digests);
            if !runs.is_empty() {
                runs.iter().for_each(|run| self.sent.count(run));
                self.sender.send(pid, &runs, buffer)?;
            }
            self.background.iter_mut().for_each(Background::give_way);
        }
        Ok(())
    }

    /// Tells that pages of the process `pid` are no longer there.
    pub fn absent(&mut self, pid: NsPid, pages: &PageSet) -> Result<(), SendError> {
        if let Some(before) = self.before.of(pid) {
            before.dropped(pages);
        }
        for ranges in batches(pages.ranges(), MAX_BATCH_PAGES as u64) {
            let absent = |&range| PageRun { range, kind: RunKind::Absent };
            let runs: Vec<PageRun> = ranges.iter().map(absent).collect();
            runs.iter().for_each(|run| self.sent.count(run));
            let buffer = self.sender.buffer()?;
            self.sender.send(pid, &runs, buffer)?;
        }
        Ok(())
    }

    /// Ends the round; returns what was sent.
    pub fn end(self) -> Result<RoundSummary, SendError> {
        self.sender.barrier()?;
        Ok(self.sent)
    }
}

/// Moves what must travel to the front of `contents`, and describes what was read as runs. Pages that are missing (unmapped
/// since they were found dirty) are left out: the next round knows of it. So are pages that have not really changed.
fn compact(
    ranges: &[PageRange],
    missing: &[usize],
    contents: &mut [u8],
    mut digests: Option<&mut Digests>,
) -> Vec<PageRun> {
    const PAGE: usize = PAGE_SIZE as usize;
    let mut runs: Vec<PageRun> = Vec::new();
    let mut missing = missing.iter().peekable();
    let mut to = 0;
    let pages =
        ranges.iter().flat_map(|range| (0..range.pages).map(|page| range.start.offset(page * PAGE_SIZE)));
    for (index, page) in pages.enumerate() {
        if missing.next_if(|&&gone| gone == index).is_some() {
            continue;
        }
        let from = index * PAGE;
        let Some(kind) = classify(page, &contents[from..from + PAGE], digests.as_deref_mut()) else {
            continue;
        };
        let mask = match kind {
            RunKind::Raw => Some(BlockMask::ALL),
            RunKind::Patch(mask) => Some(mask),
            RunKind::Zero | RunKind::Absent => None,
        };
        for (at, len) in mask.into_iter().flat_map(BlockMask::parts) {
            let part = from + at..from + at + len;
            if part.start != to {
                contents.copy_within(part, to);
            }
            to += len;
        }
        push(&mut runs, PageRange::new(page, 1), kind);
    }
    runs
}

/// How a page travels; `None` if the destination has it as it is.
fn classify(page: VirtAddr, contents: &[u8], digests: Option<&mut Digests>) -> Option<RunKind> {
    if is_zero(contents) {
        if let Some(digests) = digests {
            digests.forget(PageRange::new(page, 1));
        }
        return Some(RunKind::Zero);
    }
    match digests {
        None => Some(RunKind::Raw),
        Some(digests) => match digests.update(page, contents)? {
            BlockMask::ALL => Some(RunKind::Raw),
            mask => Some(RunKind::Patch(mask)),
        },
    }
}

fn push(runs: &mut Vec<PageRun>, page: PageRange, kind: RunKind) {
    match runs.last_mut() {
        Some(last) if last.kind == kind && last.range.end() == page.start => last.range.pages += 1,
        _ => runs.push(PageRun { range: page, kind }),
    }
}

fn is_zero(page: &[u8]) -> bool {
    // In pieces, so that a page that is not zero is known early and each piece is one vectorised loop.
    page.chunks_exact(64).all(|piece| piece.iter().fold(0, |bits, byte| bits | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::track::digests::random_seed;
    use pclive_wire::page_frame::BLOCK_LEN;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(VirtAddr(start * PAGE_SIZE), pages)
    }

    /// Pages that are filled with these bytes.
    fn filled(fills: &[u8]) -> Vec<u8> {
        fills.iter().flat_map(|&fill| std::iter::repeat_n(fill, PAGE_SIZE as usize)).collect()
    }

    fn described(runs: &[PageRun]) -> Vec<(PageRange, RunKind)> {
        runs.iter().map(|run| (run.range, run.kind)).collect()
    }

    #[test]
    fn zero_pages_lose_their_contents_and_missing_ones_are_left_out() {
        let mut contents = filled(&[1, 0, 2, 9, 0, 3]);
        let runs = compact(&[range(10, 4), range(20, 2)], &[3], &mut contents, None);
        assert_eq!(
            described(&runs),
            [
                (range(10, 1), RunKind::Raw),
                (range(11, 1), RunKind::Zero),
                (range(12, 1), RunKind::Raw),
                (range(20, 1), RunKind::Zero),
                (range(21, 1), RunKind::Raw),
            ]
        );
        assert_eq!(contents[..3 * PAGE_SIZE as usize], filled(&[1, 2, 3]));
    }

    #[test]
    fn of_a_page_sent_before_only_changed_blocks_travel() {
        let mut digests = Digests::new(random_seed().unwrap());
        let pages = [range(10, 4)];
        compact(&pages, &[], &mut filled(&[1, 2, 3, 4]), Some(&mut digests));

        let mut contents = filled(&[1, 2, 3, 0]);
        contents[BLOCK_LEN] = 8; // page 10, block 1
        contents[2 * PAGE_SIZE as usize..][..BLOCK_LEN].fill(9); // page 12, block 0
        let runs = compact(&pages, &[], &mut contents, Some(&mut digests));
        let patch = |bits| RunKind::Patch(BlockMask::new(bits).unwrap());
        assert_eq!(
            described(&runs),
            [(range(10, 1), patch(2)), (range(12, 1), patch(1)), (range(13, 1), RunKind::Zero)]
        );
        assert_eq!(contents[..2], [8, 1]);
        assert_eq!(contents[BLOCK_LEN..2 * BLOCK_LEN], [9; BLOCK_LEN]);

        // A page that was zero is sent whole.
        let runs = compact(&pages[..], &[0, 1, 2], &mut filled(&[1, 2, 3, 4]), Some(&mut digests));
        assert_eq!(described(&runs), [(range(13, 1), RunKind::Raw)]);
    }
}
