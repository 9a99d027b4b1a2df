//! eBPF against `PAGEMAP_SCAN`. Pure.
//!
//! Compared are pages of mappings that were tracked during the whole interval. Where a mapping is new, the scan calls
//! every page of it written; where contents were given back, events stand for writes that are gone. Both are right and
//! prove nothing, so ranges that changed are left out.

use crate::track::observer::{Change, ChangeKind, Drained};
use pclive_wire::{HostPid, PageRange, PageSet, VirtAddr};

/// Which of the two saw a page of one process written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// Both.
    pub both: PageSet,
    /// A write fault, but the page is not dirty.
    pub only_ebpf: PageSet,
    /// A dirty page without a write fault.
    pub only_scan: PageSet,
    /// Pages that either saw, in mappings that changed.
    pub not_compared: u64,
}

/// Compares the interval between two layouts, given as the mappings with pages of their own.
pub fn compare(
    before: &PageSet,
    after: &PageSet,
    drained: &Drained,
    pid: HostPid,
    scan: &PageSet,
) -> Comparison {
    let changed = changed(drained.changes.iter().filter(|change| change.pid == pid));
    let tracked = before.intersection(after).difference(&changed);
    let written = drained.writes.iter().filter(|write| write.pid == pid);
    // Shared mappings raise faults too; their pages are nobody's own.
    let ebpf = written.map(|write| PageRange::new(write.page, 1)).collect::<PageSet>();
    let ebpf = ebpf.intersection(&before.union(after));
    let either = ebpf.union(scan);
    let (ebpf, scan) = (ebpf.intersection(&tracked), scan.intersection(&tracked));
    let both = ebpf.intersection(&scan);
    Comparison {
        only_ebpf: ebpf.difference(&both),
        only_scan: scan.difference(&both),
        not_compared: either.difference(&tracked).pages(),
        both,
    }
}

fn changed<'a>(changes: impl Iterator<Item = &'a Change>) -> PageSet {
    let mut ranges = Vec::new();
    // Between the heap's lowest and highest end, pages may have gone and come back.
    let mut heap: Option<(VirtAddr, VirtAddr)> = None;
    for change in changes {
        match change.what {
            ChangeKind::Mapped(range)
            | ChangeKind::Unmapped(range)
            | ChangeKind::Remapped(range)
            | ChangeKind::Discarded(range) => ranges.push(range),
            ChangeKind::HeapMoved(end) => {
                let (low, high) = heap.unwrap_or((end, end));
                heap = Some((low.min(end), high.max(end)));
            }
            ChangeKind::Protected(_) | ChangeKind::Forked(_) | ChangeKind::Execed | ChangeKind::Exited => {}
        }
    }
    ranges.extend(heap.map(|(low, high)| PageRange::between(low, high)));
    ranges.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::track::observer::PageWrite;
    use std::time::Duration;

    const PID: HostPid = HostPid(7);

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(VirtAddr(start << 12), pages)
    }

    fn set(ranges: &[(u64, u64)]) -> PageSet {
        ranges.iter().map(|&(start, pages)| range(start, pages)).collect()
    }

    fn drained(writes: &[u64], changes: &[ChangeKind]) -> Drained {
        let time = Duration::ZERO;
        let other = PageWrite { pid: HostPid(8), page: VirtAddr(1 << 12), time };
        let writes = writes.iter().map(|page| PageWrite { pid: PID, page: VirtAddr(page << 12), time });
        Drained {
            writes: writes.chain([other]).collect(),
            changes: changes.iter().map(|&what| Change { pid: PID, time, what }).collect(),
            ..Drained::default()
        }
    }

    #[test]
    fn pages_are_sorted_by_who_saw_them() {
        let own = set(&[(0, 100)]);
        let seen = compare(&own, &own, &drained(&[2, 3, 5], &[]), PID, &set(&[(1, 3)]));
        assert_eq!(
            seen,
            Comparison {
                both: set(&[(2, 2)]),
                only_ebpf: set(&[(5, 1)]),
                only_scan: set(&[(1, 1)]),
                not_compared: 0
            }
        );
    }

    #[test]
    fn what_changed_is_not_compared() {
        let own = set(&[(0, 100)]);
        for change in [
            ChangeKind::Mapped(range(10, 10)),
            ChangeKind::Unmapped(range(10, 10)),
            ChangeKind::Remapped(range(10, 10)),
            ChangeKind::Discarded(range(10, 10)),
        ] {
            let seen = compare(&own, &own, &drained(&[12, 30], &[change]), PID, &set(&[(15, 2), (30, 1)]));
            assert_eq!((seen.both, seen.not_compared), (set(&[(30, 1)]), 3), "{change:?}");
            assert!(seen.only_ebpf.is_empty() && seen.only_scan.is_empty());
        }
        let heap = [ChangeKind::HeapMoved(VirtAddr(10 << 12)), ChangeKind::HeapMoved(VirtAddr(20 << 12))];
        let seen = compare(&own, &own, &drained(&[12], &heap), PID, &set(&[(15, 1)]));
        assert_eq!((seen.only_ebpf.pages(), seen.only_scan.pages(), seen.not_compared), (0, 0, 2));
    }

    #[test]
    fn new_and_gone_mappings_are_not_compared_and_shared_ones_not_looked_at() {
        let seen = compare(
            &set(&[(0, 10)]),
            &set(&[(5, 10)]),
            &drained(&[1, 6, 12, 50], &[]),
            PID,
            &set(&[(12, 2)]),
        );
        assert_eq!((seen.only_ebpf, seen.only_scan), (set(&[(6, 1)]), set(&[])));
        assert_eq!(seen.not_compared, 3);
    }
}
