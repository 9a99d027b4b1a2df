//! Which pages not to send yet.
//!
//! A page that has been written in each of the last rounds will be written in the next one, too: sending it now is
//! wasted. Such a page is hot; it is held back, and goes out when it has had a round of rest, or after the freeze.
//! Nothing is ever forgotten: a page that was written and not sent since is held back until it is sent.

use pclive_wire::{NsPid, PAGE_SIZE, PageRange, VirtAddr};
use std::collections::BTreeMap;

/// Pages of one process each.
pub type Ranges = Vec<(NsPid, PageRange)>;

/// The recent rounds of every page that was written lately.
#[derive(Clone, Debug)]
pub struct HotPages {
    /// Rounds in a row that make a page hot.
    threshold: u32,
    /// By process and page number.
    pages: BTreeMap<(NsPid, u64), Page>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Page {
    /// One bit for each round, the newest lowest: written in it.
    written: u32,
    /// Written since it was last sent.
    unsent: bool,
}

/// What to do with the pages that are to be sent after a round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// Send these now.
    pub send: Ranges,
    /// How many pages are held back.
    pub held_back: u64,
}

impl HotPages {
    /// Holds back pages that were written in each of the last `threshold` rounds (1 to 32; more count as 32). With
    /// `None` no page is ever held back.
    pub fn new(threshold: Option<u32>) -> Self {
        Self { threshold: threshold.map_or(0, |rounds| rounds.clamp(1, 32)), pages: BTreeMap::new() }
    }

    /// Ends a round in which the pages of `written` were written; decides which pages to send in the next one.
    pub fn next_round(&mut self, written: &[(NsPid, PageRange)]) -> Split {
        if self.threshold == 0 {
            return Split { send: written.to_vec(), held_back: 0 };
        }
        for page in self.pages.values_mut() {
            page.written <<= 1;
        }
        for (process, range) in written {
            let first = range.start.0 / PAGE_SIZE;
            for number in first..first + range.pages {
                let page = self.pages.entry((*process, number)).or_default();
                page.written |= 1;
                page.unsent = true;
            }
        }
        let mut split = Split::default();
        for (&(process, number), page) in &mut self.pages {
            if !page.unsent {
                continue;
            }
            if page.written.trailing_ones() >= self.threshold {
                split.held_back += 1;
            } else {
                page.unsent = false;
                push_page(&mut split.send, process, number);
            }
        }
        // A page that has rested for the threshold has to become hot anew.
        let recent = u32::MAX >> (32 - self.threshold);
        self.pages.retain(|_, page| page.unsent || page.written & recent != 0);
        split
    }

    /// The pages held back, which have to be sent now; for after the freeze. Pages that were written since the last
    /// round are the caller's to add.
    pub fn take_held_back(&mut self) -> Ranges {
        let mut ranges = Ranges::new();
        for (&(process, number), page) in &mut self.pages {
            if std::mem::take(&mut page.unsent) {
                push_page(&mut ranges, process, number);
            }
        }
        ranges
    }
}

/// Appends a page, joined to the last range where it continues it.
fn push_page(ranges: &mut Ranges, process: NsPid, number: u64) {
    let start = VirtAddr(number * PAGE_SIZE);
    match ranges.last_mut() {
        Some((last, range)) if *last == process && range.end() == start => range.pages += 1,
        _ => ranges.push((process, PageRange::new(start, 1))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(list: &[(i32, u64, u64)]) -> Ranges {
        let range = |&(pid, first, pages): &(i32, u64, u64)| {
            (NsPid(pid), PageRange::new(VirtAddr(first * PAGE_SIZE), pages))
        };
        list.iter().map(range).collect()
    }

    #[test]
    fn pages_written_in_every_recent_round_wait() {
        let mut hot = HotPages::new(Some(2));
        // Written, sent, held back, for each round.
        for (written, send, held_back) in [
            (&[(1, 10, 4)][..], &[(1, 10, 4)][..], 0),
            // Pages 11 and 12 again, and another process's page 11.
            (&[(1, 11, 2), (2, 11, 1)], &[(2, 11, 1)], 2),
            // Page 12 rests and goes; page 11 goes on.
            (&[(1, 11, 1)], &[(1, 12, 1)], 1),
            (&[], &[(1, 11, 1)], 0),
            (&[], &[], 0),
            // Forgotten: written once more is not hot.
            (&[(1, 11, 1)], &[(1, 11, 1)], 0),
        ] {
            let split = hot.next_round(&ranges(written));
            assert_eq!(split, Split { send: ranges(send), held_back }, "after {written:?}");
        }
        assert_eq!(hot.take_held_back(), []);
    }

    #[test]
    fn what_is_held_back_is_sent_after_the_freeze_and_once() {
        let mut hot = HotPages::new(Some(1));
        assert_eq!(hot.next_round(&ranges(&[(1, 5, 3), (2, 8, 1)])), Split { send: vec![], held_back: 4 });
        assert_eq!(hot.take_held_back(), ranges(&[(1, 5, 3), (2, 8, 1)]));
        assert_eq!(hot.take_held_back(), []);
    }

    #[test]
    fn every_written_page_is_sent_in_the_end() {
        // A pattern in which page p is written in the rounds r with r % (p + 1) == 0.
        for threshold in [None, Some(1), Some(3), Some(99)] {
            let mut hot = HotPages::new(threshold);
            let mut unsent = std::collections::BTreeSet::new();
            let sent = |unsent: &mut std::collections::BTreeSet<u64>, ranges: Ranges| {
                for (_, range) in ranges {
                    let first = range.start.0 / PAGE_SIZE;
                    (first..first + range.pages).for_each(|p| assert!(unsent.remove(&p), "{p} sent in vain"));
                }
            };
            for round in 0..40u64 {
                let written: Vec<_> = (0..9u64).filter(|p| round % (p + 1) == 0).collect();
                unsent.extend(&written);
                let list: Vec<_> = written.iter().map(|&p| (1, p, 1)).collect();
                let split = hot.next_round(&ranges(&list));
                sent(&mut unsent, split.send);
                assert_eq!(split.held_back, unsent.len() as u64);
            }
            sent(&mut unsent, hot.take_held_back());
            assert!(unsent.is_empty());
        }
    }

    #[test]
    fn memory_is_bounded_by_what_was_written_lately() {
        let mut hot = HotPages::new(Some(3));
        hot.next_round(&ranges(&[(1, 0, 1000)]));
        for _ in 0..3 {
            hot.next_round(&[]);
        }
        assert!(hot.pages.is_empty());
    }
}
