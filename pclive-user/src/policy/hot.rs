//! Which pages not to send yet.
//!
//! A page that is written again before the next round begins has been sent in vain: worse, while it was on its way other
//! pages became dirty. Such a page is hot. It is held back until it rests for a round, or until the container is frozen.
//! Nothing is ever forgotten: a page that was written and not sent since is held back until it is sent.
//!
//! Scans tell that a page was written in each of the last rounds. That is most telling for the pages that matter most,
//! because rounds get shorter and shorter.

use pclive_wire::{PageRange, PageSet};
use std::collections::VecDeque;

/// The recent rounds of one address space.
#[derive(Clone, Debug)]
pub struct HotPages {
    /// Rounds in a row that make a page hot; 0 if no page is ever held back.
    rounds: usize,
    /// What was written in each of the last rounds, one less than that, the newest first; `None` before the first round.
    before: Option<VecDeque<PageSet>>,
    /// The pages that were written in all of these.
    always: PageSet,
    /// What was written in this round so far.
    written: Vec<PageRange>,
    held_back: PageSet,
}

impl HotPages {
    /// Holds back pages that were written in each of the last `rounds` rounds. With 0 no page is ever held back.
    pub fn new(rounds: usize) -> Self {
        let none = PageSet::new;
        Self { rounds, before: None, always: none(), written: Vec::new(), held_back: none() }
    }

    /// Splits off what to send now of pages that were written.
    pub fn split(&mut self, written: PageSet) -> PageSet {
        // The first round has every page there is, written or not.
        if self.before.is_none() || self.rounds == 0 {
            return written;
        }
        self.written.extend_from_slice(written.ranges());
        match self.rounds {
            1 => PageSet::new(),
            _ => written.difference(&self.always),
        }
    }

    /// Ends the walk over what was written in this round. Returns pages that were held back and have rested: to be sent now.
    pub fn end_round(&mut self) -> PageSet {
        let written: PageSet = self.written.drain(..).collect();
        let rested = self.held_back.difference(&written);
        let Some(before) = &mut self.before else {
            self.before = Some(VecDeque::new());
            return rested;
        };
        self.held_back = match self.rounds {
            1 => written.clone(),
            _ => written.intersection(&self.always),
        };
        before.push_front(written);
        before.truncate(self.rounds.saturating_sub(1));
        self.always = match before.len() + 1 == self.rounds {
            true => {
                before.iter().cloned().reduce(|both, round| both.intersection(&round)).unwrap_or_default()
            }
            false => PageSet::new(),
        };
        rested
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
    use pclive_wire::{PAGE_SIZE, VirtAddr};
    use std::collections::BTreeSet;

    fn pages(numbers: &[u64]) -> PageSet {
        numbers.iter().map(|&page| PageRange::new(VirtAddr(page * PAGE_SIZE), 1)).collect()
    }

    fn numbers(pages: &PageSet) -> BTreeSet<u64> {
        let of = |range: &PageRange| range.start.0 / PAGE_SIZE..range.end().0 / PAGE_SIZE;
        pages.ranges().iter().flat_map(of).collect()
    }

    /// A round in which these pages are written; returns those that are sent.
    fn round(hot: &mut HotPages, written: &[u64]) -> PageSet {
        // In two pieces, as a walk brings them.
        let (some, others) = written.split_at(written.len() / 2);
        let sent = hot.split(pages(some)).union(&hot.split(pages(others)));
        sent.union(&hot.end_round())
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
            let sent = round(&mut hot, written);
            assert_eq!((&sent, hot.held_back()), (&pages(send), &pages(held_back)), "after {written:?}");
        }
    }

    #[test]
    fn without_rounds_nothing_waits() {
        let mut hot = HotPages::new(0);
        for _ in 0..4 {
            assert_eq!(round(&mut hot, &[1, 2]), pages(&[1, 2]));
        }
    }

    #[test]
    fn every_written_page_is_sent_in_the_end() {
        // A pattern in which page p is written in the rounds r with r % (p + 1) == 0.
        for rounds in [0, 1, 3, 99] {
            let mut hot = HotPages::new(rounds);
            let mut unsent = BTreeSet::new();
            for number in 0..40u64 {
                let written: Vec<_> = (0..9u64).filter(|p| number % (p + 1) == 0).collect();
                unsent.extend(&written);
                for page in numbers(&round(&mut hot, &written)) {
                    assert!(unsent.remove(&page), "{page} is sent in vain");
                }
                assert_eq!(numbers(hot.held_back()), unsent);
            }
            assert_eq!(numbers(&hot.take_held_back()), unsent);
            assert!(hot.held_back().is_empty());
        }
    }
}
