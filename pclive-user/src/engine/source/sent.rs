//! What the destination has, as far as the source needs to know it: to send only what differs, and to have dropped there
//! what has vanished here.

use crate::track::digests::{Digests, random_seed};
use pclive_wire::layout::mapped_anew;
use pclive_wire::manifest::{Process, Vma};
use pclive_wire::{NsPid, PageRange, PageSet};
use std::collections::HashMap;

/// Everything that has been sent on one connection, by the number that the destination knows a process by: what it was
/// sent stays there when the process executes another program.
#[derive(Debug)]
pub struct Sent {
    /// Of the digests; `None` if every page is to be sent whole.
    seed: Option<u64>,
    processes: HashMap<NsPid, AddressSpace>,
}

/// What it has of one process.
#[derive(Debug, Default)]
pub struct AddressSpace {
    layout: Vec<Vma>,
    /// Pages that it may have: those that were sent, and not reported absent since.
    pages: Vec<PageRange>,
    digests: Option<Digests>,
}

impl Sent {
    /// Nothing yet. With `digests` it will be known how pages that were sent differ from what they are later.
    pub fn nothing(digests: bool) -> Result<Self, getrandom::Error> {
        let seed = digests.then(random_seed).transpose()?;
        Ok(Self { seed, processes: HashMap::new() })
    }

    /// Notes that the destination makes its skeleton equal to these processes: it ends the others, and loses the pages of
    /// what it maps anew.
    pub fn reconciled(&mut self, processes: &[Process]) {
        let mut before = std::mem::take(&mut self.processes);
        let new = || AddressSpace { digests: self.seed.map(Digests::new), ..AddressSpace::default() };
        for process in processes {
            let mut space = before.remove(&process.pid).unwrap_or_else(new);
            if let Some(digests) = &mut space.digests {
                mapped_anew(&space.layout, &process.vmas).into_iter().for_each(|range| digests.forget(range));
            }
            space.layout.clone_from(&process.vmas);
            // Merged, or every round would make the list longer.
            space.pages = space.pages.drain(..).collect::<PageSet>().ranges().to_vec();
            self.processes.insert(process.pid, space);
        }
    }

    /// Every page of a process that the destination may have.
    pub fn pages(&self, pid: NsPid) -> PageSet {
        self.processes.get(&pid).into_iter().flat_map(|space| space.pages.iter().copied()).collect()
    }

    /// What it has of one process, which was among the last [`Sent::reconciled`].
    pub fn of(&mut self, pid: NsPid) -> Option<&mut AddressSpace> {
        self.processes.get_mut(&pid)
    }
}

impl AddressSpace {
    /// Notes that these pages are being sent, and returns the digests to compare them with.
    pub fn sending(&mut self, ranges: &[PageRange]) -> Option<&mut Digests> {
        self.pages.extend_from_slice(ranges);
        self.digests.as_mut()
    }

    /// Notes that the destination is told to drop these pages.
    pub fn dropped(&mut self, pages: &PageSet) {
        let left = self.pages.drain(..).collect::<PageSet>().difference(pages);
        self.pages = left.ranges().to_vec();
        if let Some(digests) = &mut self.digests {
            pages.ranges().iter().for_each(|&range| digests.forget(range));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pclive_wire::manifest::{Backing, MmBounds, SpecialMapping, VmaFlags};
    use pclive_wire::{PAGE_SIZE, VirtAddr};

    const PID: NsPid = NsPid(7);

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(VirtAddr(start * PAGE_SIZE), pages)
    }

    fn set(ranges: &[PageRange]) -> PageSet {
        ranges.iter().copied().collect()
    }

    #[test]
    fn what_was_sent_and_not_dropped_is_there() {
        let mut sent = Sent { seed: None, processes: HashMap::from([(PID, AddressSpace::default())]) };
        let space = sent.of(PID).unwrap();
        assert!(space.sending(&[range(10, 4), range(20, 4)]).is_none());
        space.sending(&[range(12, 4)]);
        space.dropped(&set(&[range(13, 1), range(20, 4)]));
        space.sending(&[range(21, 1)]);
        assert_eq!(sent.pages(PID), set(&[range(10, 3), range(14, 2), range(21, 1)]));
        assert!(sent.pages(NsPid(8)).is_empty());
        assert!(sent.of(NsPid(8)).is_none());

        sent.reconciled(&[]);
        assert!(sent.pages(PID).is_empty(), "the destination ends what it is not told of");
    }

    #[test]
    fn a_program_executed_in_the_place_of_another_is_sent_whole() {
        let vma = |range, backing| Vma { range, prot: 3, flags: VmaFlags::default(), backing };
        let mut sent = Sent::nothing(true).unwrap();
        let mut send = |vdso| {
            let special = Backing::Special(SpecialMapping::Vdso);
            let vmas = vec![vma(range(10, 4), Backing::Anonymous), vma(range(vdso, 2), special)];
            let (ppid, exe, mm, threads) = (NsPid(0), Vec::new(), MmBounds::default(), Vec::new());
            sent.reconciled(&[Process {
                pid: PID,
                ppid,
                pgid: PID,
                sid: PID,
                exe,
                mm,
                vmas,
                threads,
                fd_size: 64,
                state: None,
            }]);
            let digests = sent.of(PID).unwrap().sending(&[range(10, 1)]).unwrap();
            digests.update(VirtAddr(10 * PAGE_SIZE), &[7; PAGE_SIZE as usize])
        };
        assert!(send(30).is_some());
        assert!(send(30).is_none());
        assert!(send(31).is_some());
    }

    #[test]
    fn dropped_pages_are_sent_whole_again() {
        let digests = Some(Digests::new(random_seed().unwrap()));
        let mut space = AddressSpace { digests, ..AddressSpace::default() };
        let page = VirtAddr(10 * PAGE_SIZE);
        let mut send = |drop: bool| {
            if drop {
                space.dropped(&set(&[range(10, 1)]));
            }
            space.sending(&[range(10, 1)]).unwrap().update(page, &[7; PAGE_SIZE as usize])
        };
        assert!(send(false).is_some());
        assert!(send(false).is_none());
        assert!(send(true).is_some());
    }
}
