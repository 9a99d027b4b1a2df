//! Reading and sending the pages of a round.

use crate::track::attach::{Dirty, batches};
use crate::transport::{self, Cancellation, PageSender};
use pclive_sys::mem::ProcessMemory;
use pclive_wire::control::RoundSummary;
use pclive_wire::limits::MAX_BATCH_PAGES;
use pclive_wire::page_frame::{PageRun, RunKind};
use pclive_wire::{NsPid, PAGE_SIZE, PageRange, Round};
use std::sync::Arc;

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

/// The pages that one process contributes to a round.
#[derive(Debug)]
pub struct ProcessPages {
    /// Whose, as the container numbers it.
    pub pid: NsPid,
    /// Where they are read from.
    pub memory: Arc<ProcessMemory>,
    /// What to send.
    pub dirty: Dirty,
}

/// Sends a round's pages and its barrier; returns what was sent.
pub fn send_round(
    sender: &mut PageSender,
    round: Round,
    pages: &[ProcessPages],
    cancellation: Option<&Cancellation>,
) -> Result<RoundSummary, SendError> {
    let mut sent = RoundSummary::none(round);
    for process in pages {
        for batch in batches(process.dirty.written.ranges(), MAX_BATCH_PAGES as u64) {
            if let Some(cancellation) = cancellation {
                cancellation.check()?;
            }
            send_batch(sender, process, &batch, &mut sent)?;
        }
        send_absent(sender, process, &mut sent)?;
    }
    sender.barrier()?;
    Ok(sent)
}

fn send_batch(
    sender: &mut PageSender,
    process: &ProcessPages,
    ranges: &[PageRange],
    sent: &mut RoundSummary,
) -> Result<(), SendError> {
    let pid = process.pid;
    let mut buffer = sender.buffer()?;
    let contents = buffer.contents_mut();
    let missing =
        process.memory.read_pages(ranges, contents).map_err(|source| SendError::Read { pid, source })?;
    let runs = compact(ranges, &missing, contents);
    if runs.is_empty() {
        return Ok(());
    }
    for run in &runs {
        match run.kind {
            RunKind::Raw => sent.pages += run.range.pages,
            RunKind::Zero => sent.zero_pages += run.range.pages,
            RunKind::Absent => {}
        }
    }
    Ok(sender.send(pid, &runs, buffer)?)
}

fn send_absent(
    sender: &mut PageSender,
    process: &ProcessPages,
    sent: &mut RoundSummary,
) -> Result<(), SendError> {
    for batch in batches(process.dirty.absent.ranges(), MAX_BATCH_PAGES as u64) {
        let runs: Vec<PageRun> =
            batch.iter().map(|&range| PageRun { range, kind: RunKind::Absent }).collect();
        sent.absent_pages += batch.iter().map(|range| range.pages).sum::<u64>();
        let buffer = sender.buffer()?;
        sender.send(process.pid, &runs, buffer)?;
    }
    Ok(())
}

/// Moves the pages that are not zero to the front of `contents`, and describes what was read as runs. Pages that are
/// missing (unmapped since they were found dirty) are left out: the next round knows of it.
fn compact(ranges: &[PageRange], missing: &[usize], contents: &mut [u8]) -> Vec<PageRun> {
    const PAGE: usize = PAGE_SIZE as usize;
    let mut runs: Vec<PageRun> = Vec::new();
    let mut missing = missing.iter().peekable();
    let (mut from, mut to) = (0, 0);
    for range in ranges {
        for page in 0..range.pages {
            let index = from / PAGE;
            let bytes = &contents[from..from + PAGE];
            let is_missing = missing.next_if(|&&gone| gone == index).is_some();
            let kind = if is_zero(bytes) { RunKind::Zero } else { RunKind::Raw };
            if !is_missing {
                if kind == RunKind::Raw {
                    if to != from {
                        contents.copy_within(from..from + PAGE, to);
                    }
                    to += PAGE;
                }
                push(&mut runs, PageRange::new(range.start.offset(page * PAGE_SIZE), 1), kind);
            }
            from += PAGE;
        }
    }
    runs
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
    use pclive_wire::VirtAddr;

    #[test]
    fn zero_pages_lose_their_contents_and_missing_ones_are_left_out() {
        let range = |start: u64, pages| PageRange::new(VirtAddr(start << 12), pages);
        let mut contents = Vec::new();
        for fill in [1u8, 0, 2, 9, 0, 3] {
            contents.extend(std::iter::repeat_n(fill, PAGE_SIZE as usize));
        }
        let runs = compact(&[range(10, 4), range(20, 2)], &[3], &mut contents);
        let found: Vec<_> = runs.iter().map(|run| (run.range, run.kind)).collect();
        assert_eq!(
            found,
            [
                (range(10, 1), RunKind::Raw),
                (range(11, 1), RunKind::Zero),
                (range(12, 1), RunKind::Raw),
                (range(20, 1), RunKind::Zero),
                (range(21, 1), RunKind::Raw),
            ]
        );
        let firsts: Vec<u8> = contents.chunks_exact(PAGE_SIZE as usize).take(3).map(|page| page[0]).collect();
        assert_eq!(firsts, [1, 2, 3]);
    }
}
