//! How hot pages are: statistics over write events. Pure.
//!
//! A write-protected page raises one event until it is protected again, so a page's count is the number of rounds (or
//! intervals) in which it was written, and the time is that of the first write in the round.

use super::observer::{Change, ChangeKind, Drained};
use pclive_wire::{HostPid, PAGE_SIZE, PageRange, PageSet, VirtAddr};
use std::{cmp::Reverse, collections::HashMap, time::Duration};

/// How often and when one page was written. Times are on `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeat {
    /// Number of writes seen.
    pub writes: u32,
    /// The first.
    pub first: Duration,
    /// The newest.
    pub last: Duration,
}

impl PageHeat {
    /// Mean time between writes; `None` after a single one.
    pub fn mean_interval(&self) -> Option<Duration> {
        let intervals = self.writes.checked_sub(1).filter(|intervals| *intervals > 0)?;
        Some((self.last.saturating_sub(self.first)) / intervals)
    }
}

/// Adjacent pages that are about equally hot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HotRange {
    /// From the first written page to the last one.
    pub range: PageRange,
    /// Pages in it that were written.
    pub written_pages: u64,
    /// Writes to them.
    pub writes: u64,
}

impl HotRange {
    /// Writes per page of the range.
    fn density(&self) -> f64 {
        self.writes as f64 / self.range.pages as f64
    }

    fn with(&self, next: &HotRange) -> HotRange {
        HotRange {
            range: PageRange::between(self.range.start, next.range.end()),
            written_pages: self.written_pages + next.written_pages,
            writes: self.writes + next.writes,
        }
    }
}

/// Pages in the blocks that hot ranges are made of: single pages would differ by chance.
const BLOCK_PAGES: u64 = 16;

/// Write statistics of one address space.
#[derive(Clone, Debug, Default)]
pub struct ProcessHeat {
    pages: HashMap<VirtAddr, PageHeat>,
}

impl ProcessHeat {
    /// Counts a write.
    pub fn record(&mut self, page: VirtAddr, time: Duration) {
        let heat = self.pages.entry(page).or_insert(PageHeat { writes: 0, first: time, last: time });
        heat.writes = heat.writes.saturating_add(1);
        heat.last = heat.last.max(time);
    }

    /// What is known of a page; `None` if it was never written.
    pub fn page(&self, page: VirtAddr) -> Option<PageHeat> {
        self.pages.get(&page).copied()
    }

    /// Every written page, in no order.
    pub fn pages(&self) -> impl Iterator<Item = (VirtAddr, PageHeat)> {
        self.pages.iter().map(|(page, heat)| (*page, *heat))
    }

    /// Forgets a range whose contents are gone.
    pub fn forget(&mut self, range: &PageRange) {
        if range.pages < self.pages.len() as u64 {
            for index in 0..range.pages {
                self.pages.remove(&range.start.offset(index * PAGE_SIZE));
            }
        } else {
            self.pages.retain(|page, _| *page < range.start || range.end() <= *page);
        }
    }

    /// Estimate of the working set: the number of pages whose newest write is not older than `since`.
    ///
    /// It needs pages to be re-protected in between; the window should span several rounds.
    pub fn working_set(&self, since: Duration) -> u64 {
        self.pages.values().filter(|heat| heat.last >= since).count() as u64
    }

    /// The `count` hottest ranges, hottest first: see [`Heat::hottest`].
    pub fn hottest(&self, count: usize) -> Vec<HotRange> {
        let mut ranges = self.hot_ranges();
        sort_hottest_first(&mut ranges, |range| *range);
        ranges.truncate(count);
        ranges
    }

    /// Every written page in some range, in order of address.
    fn hot_ranges(&self) -> Vec<HotRange> {
        let mut ranges: Vec<HotRange> = Vec::new();
        for block in self.blocks() {
            match ranges.last_mut() {
                Some(last) if continues(last, &block) => *last = last.with(&block),
                _ => ranges.push(block),
            }
        }
        ranges
    }

    /// Blocks with writes in them, in order of address, trimmed to their written pages.
    fn blocks(&self) -> Vec<HotRange> {
        let mut pages: Vec<_> = self.pages().collect();
        pages.sort_unstable_by_key(|(page, _)| *page);
        let mut blocks: Vec<HotRange> = Vec::new();
        for (page, heat) in pages {
            let range = PageRange::new(page, 1);
            let single = HotRange { range, written_pages: 1, writes: u64::from(heat.writes) };
            match blocks.last_mut() {
                Some(last) if block_of(last.range.start) == block_of(page) => *last = last.with(&single),
                _ => blocks.push(single),
            }
        }
        blocks
    }
}

fn block_of(page: VirtAddr) -> u64 {
    page.0 / (BLOCK_PAGES * PAGE_SIZE)
}

/// Whether `block` comes right after `range` and is at most twice or half as hot.
fn continues(range: &HotRange, block: &HotRange) -> bool {
    let last_block = block_of(VirtAddr(range.range.end().0 - PAGE_SIZE));
    let ratio = range.density() / block.density();
    block_of(block.range.start) == last_block + 1 && (0.5..=2.0).contains(&ratio)
}

/// Write statistics of a container.
#[derive(Clone, Debug, Default)]
pub struct Heat {
    processes: HashMap<HostPid, ProcessHeat>,
}

impl Heat {
    /// Adds what an observer has seen, in the order in which it happened.
    pub fn absorb(&mut self, drained: &Drained) {
        let mut changes = drained.changes.iter().peekable();
        for write in &drained.writes {
            while let Some(change) = changes.next_if(|change| change.time <= write.time) {
                self.apply(change);
            }
            self.processes.entry(write.pid).or_default().record(write.page, write.time);
        }
        changes.for_each(|change| self.apply(change));
    }

    /// Counts a write to each page of `pages`, where scans are all there is: `time` is when they were found.
    pub fn record(&mut self, pid: HostPid, pages: &PageSet, time: Duration) {
        let process = self.processes.entry(pid).or_default();
        for range in pages.ranges() {
            for index in 0..range.pages {
                process.record(range.start.offset(index * PAGE_SIZE), time);
            }
        }
    }

    fn apply(&mut self, change: &Change) {
        match change.what {
            ChangeKind::Mapped(range)
            | ChangeKind::Unmapped(range)
            | ChangeKind::Remapped(range)
            | ChangeKind::Discarded(range) => {
                if let Some(process) = self.processes.get_mut(&change.pid) {
                    process.forget(&range);
                }
            }
            ChangeKind::Execed | ChangeKind::Exited => {
                self.processes.remove(&change.pid);
            }
            ChangeKind::Protected(_) | ChangeKind::HeapMoved(_) | ChangeKind::Forked(_) => {}
        }
    }

    /// Statistics of a process; `None` if it has not written anything.
    pub fn process(&self, pid: HostPid) -> Option<&ProcessHeat> {
        self.processes.get(&pid)
    }

    /// All processes that have written something, in no order.
    pub fn processes(&self) -> impl Iterator<Item = (HostPid, &ProcessHeat)> {
        self.processes.iter().map(|(pid, heat)| (*pid, heat))
    }

    /// Working set of the whole container, in pages.
    pub fn working_set(&self, since: Duration) -> u64 {
        self.processes.values().map(|process| process.working_set(since)).sum()
    }

    /// The `count` hottest ranges of the container. Those that are more than twice as hot (in writes per page) as others
    /// come first; among equals, those with more writes.
    pub fn hottest(&self, count: usize) -> Vec<(HostPid, HotRange)> {
        let of = |(pid, heat): (HostPid, &ProcessHeat)| {
            heat.hot_ranges().into_iter().map(move |range| (pid, range))
        };
        let mut ranges: Vec<_> = self.processes().flat_map(of).collect();
        sort_hottest_first(&mut ranges, |(_, range)| *range);
        ranges.truncate(count);
        ranges
    }
}

/// Without classes of heat, single pages that were written in every round would hide the large ranges written in almost
/// every round.
fn sort_hottest_first<T>(ranges: &mut [T], of: impl Fn(&T) -> HotRange) {
    let hottest = ranges.iter().map(|range| of(range).density()).fold(0.0, f64::max);
    let class = |range: &HotRange| (hottest / range.density()).log2() as u32;
    ranges.sort_by_key(|range| {
        let range = of(range);
        (class(&range), Reverse(range.writes))
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::track::observer::PageWrite;

    const PID: HostPid = HostPid(7);

    fn page(number: u64) -> VirtAddr {
        VirtAddr(number * PAGE_SIZE)
    }

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(page(start), pages)
    }

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn write(number: u64, ms: u64) -> PageWrite {
        PageWrite { pid: PID, page: page(number), time: at(ms) }
    }

    fn change(what: ChangeKind, ms: u64) -> Change {
        Change { pid: PID, time: at(ms), what }
    }

    fn heat_of(writes: &[PageWrite], changes: &[Change]) -> Heat {
        let mut heat = Heat::default();
        heat.absorb(&Drained { writes: writes.into(), changes: changes.into(), ..Drained::default() });
        heat
    }

    #[test]
    fn a_page_has_a_count_a_first_and_a_last_write_and_a_mean_interval() {
        let heat = heat_of(&[write(1, 10), write(2, 15), write(1, 20), write(1, 50)], &[]);
        let process = heat.process(PID).unwrap();
        let hot = process.page(page(1)).unwrap();
        assert_eq!(hot, PageHeat { writes: 3, first: at(10), last: at(50) });
        assert_eq!(hot.mean_interval(), Some(at(20)));
        assert_eq!(process.page(page(2)).unwrap().mean_interval(), None);
        assert_eq!(process.page(page(3)), None);
    }

    #[test]
    fn the_working_set_is_what_was_written_in_the_window() {
        let heat = heat_of(&[write(1, 10), write(2, 20), write(3, 30), write(1, 40)], &[]);
        assert_eq!([0, 15, 25, 40, 41].map(|since| heat.working_set(at(since))), [3, 3, 2, 1, 0]);
    }

    #[test]
    fn what_is_unmapped_discarded_or_replaced_is_forgotten_and_later_writes_count_again() {
        for gone in [
            ChangeKind::Unmapped(range(2, 2)),
            ChangeKind::Discarded(range(2, 2)),
            ChangeKind::Remapped(range(2, 2)),
            ChangeKind::Mapped(range(2, 2)),
        ] {
            let writes = [write(1, 1), write(2, 2), write(3, 3), write(4, 4), write(3, 9)];
            let heat = heat_of(&writes, &[change(gone, 5)]);
            let process = heat.process(PID).unwrap();
            let counts = [1, 2, 3, 4].map(|number| process.page(page(number)).map(|heat| heat.writes));
            assert_eq!(counts, [Some(1), None, Some(1), Some(1)], "{gone:?}");
        }
        let heat = heat_of(&[write(1, 1)], &[change(ChangeKind::Unmapped(range(0, 1 << 30)), 2)]);
        assert_eq!(heat.process(PID).unwrap().pages().count(), 0);
    }

    #[test]
    fn a_large_range_comes_before_a_page_that_is_hardly_hotter() {
        let mut writes: Vec<_> = (0..32).flat_map(|number| (0..9).map(move |_| write(number, 2))).collect();
        writes.extend((0..10).map(|_| write(1000, 3)));
        let ranges: Vec<_> = heat_of(&writes, &[]).hottest(2).into_iter().map(|(_, hot)| hot.range).collect();
        assert_eq!(ranges, [range(0, 32), range(1000, 1)]);
    }

    #[test]
    fn pages_found_by_scans_count_once_for_each_scan() {
        let mut heat = Heat::default();
        heat.record(PID, &[range(1, 2)].into_iter().collect(), at(10));
        heat.record(PID, &[range(2, 1)].into_iter().collect(), at(20));
        let process = heat.process(PID).unwrap();
        assert_eq!([1, 2].map(|number| process.page(page(number)).unwrap().writes), [1, 2]);
        assert_eq!(heat.working_set(at(15)), 1);
    }

    #[test]
    fn a_process_that_execs_or_exits_is_forgotten() {
        for what in [ChangeKind::Execed, ChangeKind::Exited] {
            assert!(heat_of(&[write(1, 1)], &[change(what, 2)]).process(PID).is_none());
        }
        assert!(heat_of(&[write(1, 1)], &[change(ChangeKind::Forked(HostPid(8)), 2)]).process(PID).is_some());
    }

    #[test]
    fn hot_ranges_are_whole_where_equally_hot_and_cut_where_heat_changes() {
        // 64 pages written once, the 32 after them ten times, and one lonely page far away five times.
        let mut writes: Vec<_> = (0..96).map(|number| write(number, 1)).collect();
        writes.extend((64..96).flat_map(|number| (0..9).map(move |_| write(number, 2))));
        writes.extend((0..5).map(|_| write(1000, 3)));
        let hottest = heat_of(&writes, &[]).hottest(10);
        let expected = [
            HotRange { range: range(64, 32), written_pages: 32, writes: 320 },
            HotRange { range: range(1000, 1), written_pages: 1, writes: 5 },
            HotRange { range: range(0, 64), written_pages: 64, writes: 64 },
        ];
        assert_eq!(hottest, expected.map(|range| (PID, range)));
        assert_eq!(heat_of(&writes, &[]).hottest(1), [(PID, expected[0])]);
        assert_eq!(heat_of(&writes, &[]).process(PID).unwrap().hottest(3), expected);
    }
}
