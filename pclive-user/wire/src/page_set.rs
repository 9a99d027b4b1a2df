//! Sets of pages as sorted, disjoint ranges.

use crate::units::{PageRange, VirtAddr};

/// A set of pages of one address space. Adjacent ranges are always merged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet(Vec<PageRange>);

impl PageSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// The ranges, sorted and disjoint.
    pub fn ranges(&self) -> &[PageRange] {
        &self.0
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.0.iter().map(|range| range.pages).sum()
    }

    /// Whether the set has no pages.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The pages of either set.
    pub fn union(&self, other: &Self) -> Self {
        self.0.iter().chain(&other.0).copied().collect()
    }

    /// The pages of this set that `other` lacks.
    pub fn difference(&self, other: &Self) -> Self {
        let mut left = Vec::new();
        let mut others = other.0.iter().peekable();
        for range in &self.0 {
            let mut start = range.start;
            while others.next_if(|o| o.end() <= start).is_some() {}
            let mut ahead = others.clone();
            while let Some(cut) = ahead.next_if(|o| o.start < range.end()) {
                if start < cut.start {
                    left.push(PageRange::between(start, cut.start));
                }
                start = cut.end();
            }
            if start < range.end() {
                left.push(PageRange::between(start, range.end()));
            }
        }
        Self(left)
    }

    /// The pages that both sets have.
    pub fn intersection(&self, other: &Self) -> Self {
        self.difference(&self.difference(other))
    }
}

impl FromIterator<PageRange> for PageSet {
    /// Any order, overlaps allowed.
    fn from_iter<I: IntoIterator<Item = PageRange>>(ranges: I) -> Self {
        let mut ranges: Vec<PageRange> = ranges.into_iter().filter(|range| !range.is_empty()).collect();
        ranges.sort_unstable();
        let mut merged: Vec<PageRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(last) if range.start <= last.end() => {
                    let end: VirtAddr = last.end().max(range.end());
                    *last = PageRange::between(last.start, end);
                }
                _ => merged.push(range),
            }
        }
        Self(merged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn ranges() -> impl Strategy<Value = Vec<(u64, u64)>> {
        prop::collection::vec((0u64..60, 0u64..8), 0..12)
    }

    fn build(ranges: &[(u64, u64)]) -> (PageSet, BTreeSet<u64>) {
        let set = ranges.iter().map(|&(start, pages)| PageRange::new(VirtAddr(start << 12), pages)).collect();
        (set, ranges.iter().flat_map(|&(start, pages)| start..start + pages).collect())
    }

    fn members(set: &PageSet) -> BTreeSet<u64> {
        for pair in set.ranges().windows(2) {
            assert!(pair[0].end() < pair[1].start, "sorted, disjoint and merged: {set:?}");
        }
        set.ranges().iter().flat_map(|r| r.start.0 >> 12..r.end().0 >> 12).collect()
    }

    proptest! {
        #[test]
        fn set_operations_are_those_of_sets(a in ranges(), b in ranges()) {
            let ((set_a, a), (set_b, b)) = (build(&a), build(&b));
            prop_assert_eq!(members(&set_a), a.clone());
            prop_assert_eq!(members(&set_a.union(&set_b)), &a | &b);
            prop_assert_eq!(members(&set_a.difference(&set_b)), &a - &b);
            prop_assert_eq!(members(&set_a.intersection(&set_b)), &a & &b);
        }
    }
}
