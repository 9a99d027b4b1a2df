//! How the destination turns one address-space layout into the next.
//!
//! Both hosts compute this from the same two layouts: the destination to do it, the source to know which pages the
//! destination loses on the way and must be sent again whether or not they were written since.

use crate::manifest::{Backing, SpecialMapping, Vma, VmaFlags};
use crate::units::{PageRange, VirtAddr};

/// One step from a layout to the next. The ranges of all steps are disjoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// Nothing is mapped here any more.
    Unmap(PageRange),
    /// Map this part of a VMA anew, replacing what is there; its pages start out absent.
    Map(PageRange, &'a Vma),
    /// The mapping stays, with its pages; protection or flags change to those of the VMA.
    Change {
        /// Where.
        range: PageRange,
        /// What it shall be.
        to: &'a Vma,
        /// The flags that it has.
        was: VmaFlags,
    },
}

/// The steps from layout `from` to layout `to` (both sorted, not overlapping). Special mappings are not the business of
/// this function: they are moved, once.
pub fn steps<'a>(from: &[Vma], to: &'a [Vma]) -> Vec<Step<'a>> {
    let mut steps = Vec::new();
    for wanted in to.iter().filter(|vma| !is_special(vma)) {
        let mut at = wanted.range.start;
        for (standing, common) in overlapping(from, wanted.range) {
            if is_special(standing) || !same_object(standing, wanted, common.start) {
                continue;
            }
            if at < common.start {
                steps.push(Step::Map(PageRange::between(at, common.start), wanted));
            }
            if standing.prot != wanted.prot || standing.flags != wanted.flags {
                steps.push(Step::Change { range: common, to: wanted, was: standing.flags });
            }
            at = common.end();
        }
        if at < wanted.range.end() {
            steps.push(Step::Map(PageRange::between(at, wanted.range.end()), wanted));
        }
    }
    steps.extend(uncovered(from, to).into_iter().map(Step::Unmap));
    steps
}

/// Whether layout `to` is not made from layout `from` but begun anew, with nothing kept, because the kernel's special mappings
/// are elsewhere. They are in most cases in which the process has executed another program, which may have mapped the same at
/// the same place. (Not if addresses are not random at all; then the pages are compared like those of one program.)
pub fn is_begun_anew(from: &[Vma], to: &[Vma]) -> bool {
    special_mappings(from) != special_mappings(to)
}

/// The ranges of `to` that the destination maps anew when it comes from `from`: whatever is populated there must be sent.
pub fn mapped_anew(from: &[Vma], to: &[Vma]) -> Vec<PageRange> {
    let kept = if is_begun_anew(from, to) { &[] } else { from };
    let new = steps(kept, to).into_iter().filter_map(|step| match step {
        Step::Map(range, _) => Some(range),
        Step::Unmap(_) | Step::Change { .. } => None,
    });
    new.collect()
}

/// The special mappings among `vmas`.
pub fn special_mappings(vmas: &[Vma]) -> Vec<(SpecialMapping, PageRange)> {
    let special = |vma: &Vma| match vma.backing {
        Backing::Special(which) => Some((which, vma.range)),
        _ => None,
    };
    vmas.iter().filter_map(special).collect()
}

fn is_special(vma: &Vma) -> bool {
    matches!(vma.backing, Backing::Special(_))
}

/// The parts of `from` that no VMA of `to` covers.
fn uncovered(from: &[Vma], to: &[Vma]) -> Vec<PageRange> {
    let mut gaps = Vec::new();
    for standing in from.iter().filter(|vma| !is_special(vma)) {
        let mut at = standing.range.start;
        for (_, common) in overlapping(to, standing.range) {
            if at < common.start {
                gaps.push(PageRange::between(at, common.start));
            }
            at = common.end();
        }
        if at < standing.range.end() {
            gaps.push(PageRange::between(at, standing.range.end()));
        }
    }
    gaps
}

/// The VMAs of a (sorted) layout that overlap with `range`, and where.
pub fn overlapping(layout: &[Vma], range: PageRange) -> impl Iterator<Item = (&Vma, PageRange)> {
    let first = layout.partition_point(|vma| vma.range.end() <= range.start);
    layout[first..].iter().map_while(move |vma| Some((vma, vma.range.intersection(&range)?)))
}

/// Whether both VMAs show the same memory at `addr`, so that pages placed for one are right for the other.
fn same_object(standing: &Vma, wanted: &Vma, addr: VirtAddr) -> bool {
    let at = |vma: &Vma, offset: u64| offset.wrapping_add(addr.0.wrapping_sub(vma.range.start.0));
    let fixed = |vma: &Vma| vma.flags.0 & VmaFlags::FIXED;
    fixed(standing) == fixed(wanted)
        && match (&standing.backing, &wanted.backing) {
            (Backing::Anonymous, Backing::Anonymous) => true,
            (
                Backing::File { path: a, offset: a_offset, shared: a_shared, .. },
                Backing::File { path: b, offset: b_offset, shared: b_shared, .. },
            ) => a == b && a_shared == b_shared && at(standing, *a_offset) == at(wanted, *b_offset),
            (
                Backing::Shared { object: a, offset: a_offset, .. },
                Backing::Shared { object: b, offset: b_offset, .. },
            ) => a == b && at(standing, *a_offset) == at(wanted, *b_offset),
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn vma(start: u64, pages: u64, prot: u8, backing: Backing) -> Vma {
        Vma { range: PageRange::new(VirtAddr(start << 12), pages), prot, flags: VmaFlags::default(), backing }
    }

    const SPECIAL: Backing = Backing::Special(SpecialMapping::Vdso);

    fn file(offset: u64) -> Backing {
        Backing::File { path: b"/lib".to_vec(), offset: offset << 12, shared: false, size: 0 }
    }

    #[test]
    fn a_grown_heap_keeps_its_pages() {
        let from = [vma(1, 4, 3, Backing::Anonymous)];
        let to = [vma(1, 9, 3, Backing::Anonymous)];
        assert_eq!(mapped_anew(&from, &to), [PageRange::new(VirtAddr(5 << 12), 5)]);
        assert_eq!(steps(&to, &from), [Step::Unmap(PageRange::new(VirtAddr(5 << 12), 5))]);
    }

    #[test]
    fn an_executed_program_has_nothing_of_the_one_before() {
        let program = |vdso| [vma(1, 4, 3, Backing::Anonymous), vma(vdso, 2, 5, SPECIAL)];
        assert_eq!(mapped_anew(&program(8), &program(8)), []);
        assert_eq!(mapped_anew(&program(8), &program(9)), [PageRange::new(VirtAddr(1 << 12), 4)]);
    }

    #[test]
    fn a_file_mapped_at_another_offset_is_another_object() {
        let (from, to) = ([vma(1, 2, 1, file(0))], [vma(1, 2, 1, file(7))]);
        assert_eq!(steps(&from, &to), [Step::Map(to[0].range, &to[0])]);
        let (from, to) = ([vma(1, 4, 1, file(0))], [vma(2, 2, 3, file(1))]);
        let was = VmaFlags::default();
        assert_eq!(steps(&from, &to)[0], Step::Change { range: to[0].range, to: &to[0], was });
    }

    /// Layouts as maps from page to (protection, page of the object), to check the steps against.
    type Model = BTreeMap<u64, (u8, Option<u64>)>;

    fn model(vmas: &[Vma]) -> Model {
        let pages = |vma: &Vma| {
            let base = match vma.backing {
                Backing::File { offset, .. } => Some(offset >> 12),
                _ => None,
            };
            let (start, prot) = (vma.range.start.0 >> 12, vma.prot);
            (0..vma.range.pages).map(move |i| (start + i, (prot, base.map(|base| base + i))))
        };
        vmas.iter().flat_map(pages).collect()
    }

    fn layout() -> impl Strategy<Value = Vec<Vma>> {
        let piece = (0u64..4, 1u64..6, 0u8..4, prop::option::of(0u64..5));
        prop::collection::vec(piece, 0..8).prop_map(|pieces| {
            let mut at = 1;
            let place = |(gap, pages, prot, offset): (u64, u64, u8, Option<u64>)| {
                let start = at + gap;
                at = start + pages;
                vma(start, pages, prot, offset.map_or(Backing::Anonymous, file))
            };
            pieces.into_iter().map(place).collect()
        })
    }

    proptest! {
        #[test]
        fn the_steps_lead_from_one_layout_to_the_other(from in layout(), to in layout()) {
            let (mut standing, wanted) = (model(&from), model(&to));
            for step in steps(&from, &to) {
                let (Step::Unmap(range) | Step::Map(range, _) | Step::Change { range, .. }) = step;
                for page in range.start.0 >> 12..range.end().0 >> 12 {
                    match step {
                        Step::Unmap(_) => { standing.remove(&page); }
                        Step::Map(..) => { standing.insert(page, wanted[&page]); }
                        Step::Change { .. } => {
                            prop_assert_eq!(standing[&page].1, wanted[&page].1, "the object stays");
                            standing.insert(page, wanted[&page]);
                        }
                    }
                }
            }
            prop_assert_eq!(standing, wanted);
        }
    }
}
