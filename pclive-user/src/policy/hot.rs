//! Which pages not to send yet.
//!
//! A page that is written again before the next round begins has been sent in vain: worse, while it was on its way other
//! pages became dirty. Such a page is hot. It is held back until it rests for a round, or until the container is frozen.
//! Nothing is ever forgotten: a page that was written and not sent since is held back until it is sent.
//!
//! Two signs tell a hot page:
//!
//! - it was written in each of the last rounds: all that scans can tell, and true for the pages that matter most, because
//!   rounds get shorter and shorter;
//! - it was written soon after the last round had begun (and protected it), as eBPF saw: if writes come at random, the
//!   time to the first of them is what one waits for the next. This sign needs one round only, however long.

use pclive_wire::PageSet;
use std::collections::VecDeque;
use std::time::Duration;

/// For how long after its begin a write in a round that took `round` is a sign of heat. The next round is seldom shorter
/// than a third of this one; a page that waits for a tenth will hardly live through it unwritten.
pub fn soon(round: Duration) -> Duration {
    round / 10
}

/// The recent rounds of one address space.
#[derive(Clone, Debug)]
pub struct HotPages {
    /// Rounds in a row that make a page hot; 0 if no page is ever held back.
    rounds: usize,
    /// What was written in each of the last `rounds` rounds at most, the newest first; `None` before the first round.
    written: Option<VecDeque<PageSet>>,
    held_back: PageSet,
}

impl HotPages {
    /// Holds back pages that were written in each of the last `rounds` rounds. With 0 no page is ever held back.
    pub fn new(rounds: usize) -> Self {
        Self { rounds, written: None, held_back: PageSet::new() }
    }

    /// Begins a round. `written` are the pages that were written since the last one began, `soon` those of them that were
    /// written soon after. Returns the pages to send.
    pub fn next_round(&mut self, written: PageSet, soon: &PageSet) -> PageSet {
        // The first round has every page there is, written or not.
        let (Some(recent), 1..) = (&mut self.written, self.rounds) else {
            self.written = Some(VecDeque::new());
            return written;
        };
        let unsent = self.held_back.union(&written);
        let mut hot = written.intersection(soon);
        recent.push_front(written);
        recent.truncate(self.rounds);
        if recent.len() == self.rounds
            && let Some(always) = recent.iter().cloned().reduce(|always, round| always.intersection(&round))
        {
            hot = hot.union(&always);
        }
        self.held_back = unsent.intersection(&hot);
        unsent.difference(&hot)
    }

    /// The pages that wait.
    pub fn held_back(&self) -> &PageSet {
        &self.held_back
    }

    /// The pages that wait, to be sent now: the container is frozen.
    pub fn take_held_back(&mut self) -> PageSet {
        std::mem::take(&mut self.held_back)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pclive_wire::{PAGE_SIZE, PageRange, VirtAddr};
    use std::collections::BTreeSet;

    fn pages(numbers: &[u64]) -> PageSet {
        numbers.iter().map(|&page| PageRange::new(VirtAddr(page * PAGE_SIZE), 1)).collect()
    }

    fn numbers(pages: &PageSet) -> BTreeSet<u64> {
        let of = |range: &PageRange| range.start.0 / PAGE_SIZE..range.end().0 / PAGE_SIZE;
        pages.ranges().iter().flat_map(of).collect()
    }

    #[test]
    fn pages_written_in_every_recent_round_wait() {
        let mut hot = HotPages::new(2);
        // Written, sent, held back, for each round.
        for (written, send, held_back) in [
            // Everything, which says nothing of writes.
            (&[10, 11, 12, 13, 20][..], &[10, 11, 12, 13, 20][..], &[][..]),
            (&[10, 11, 12], &[10, 11, 12], &[]),
            (&[11, 12, 20], &[20], &[11, 12]),
            // Page 12 rests and goes; page 11 goes on.
            (&[11], &[12], &[11]),
            (&[], &[11], &[]),
            (&[], &[], &[]),
            // Forgotten: written once more is not hot.
            (&[11], &[11], &[]),
        ] {
            let sent = hot.next_round(pages(written), &PageSet::new());
            assert_eq!((&sent, hot.held_back()), (&pages(send), &pages(held_back)), "after {written:?}");
        }
    }

    #[test]
    fn a_page_written_soon_waits_at_once() {
        let mut hot = HotPages::new(3);
        hot.next_round(pages(&[1, 2, 3]), &PageSet::new());
        assert_eq!(hot.next_round(pages(&[1, 2]), &pages(&[2, 7])), pages(&[1]));
        assert_eq!(hot.take_held_back(), pages(&[2]));
        assert_eq!(hot.take_held_back(), PageSet::new());
    }

    #[test]
    fn without_rounds_nothing_waits() {
        let mut hot = HotPages::new(0);
        for _ in 0..4 {
            assert_eq!(hot.next_round(pages(&[1, 2]), &pages(&[1])), pages(&[1, 2]));
        }
    }

    #[test]
    fn every_written_page_is_sent_in_the_end() {
        // A pattern in which page p is written in the rounds r with r % (p + 1) == 0, soon if r is even and p odd.
        for rounds in [0, 1, 3, 99] {
            let mut hot = HotPages::new(rounds);
            let mut unsent = BTreeSet::new();
            for round in 0..40u64 {
                let written: Vec<_> = (0..9u64).filter(|p| round % (p + 1) == 0).collect();
                let soon: Vec<_> = (0..9u64).filter(|p| (round + p) % 2 == 1).collect();
                unsent.extend(&written);
                for page in numbers(&hot.next_round(pages(&written), &pages(&soon))) {
                    assert!(unsent.remove(&page), "{page} is sent in vain");
                }
                assert_eq!(numbers(hot.held_back()), unsent);
            }
        }
    }
}
