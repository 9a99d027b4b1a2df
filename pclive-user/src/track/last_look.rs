//! The last look at anonymous memory, in the blackout: which pages were written since they were sent, and which have vanished.
//!
//! To look at every page costs 2.6 ms for each GiB, whatever has happened to it. There is a faster way. A search for
//! [`Categories::WRITTEN`] alone takes a short cut in the kernel (`pagemap_scan_pmd_entry` in fs/proc/task_mmu.c), 0.4 ms for
//! each GiB, in which it looks at nothing but the mark of write-protection. It finds what has no mark: written pages, but also
//! those that are not there, because they never were or because they are gone, mark and all. So it divides the pages that have
//! been sent:
//!
//! - *marked*: there and unchanged. Or the whole page table is gone, which this search passes over. Whether a table is there,
//!   one marked page in it tells: `move_pages(2)` knows of a page of each table at once whether it is in memory.
//! - *not marked*: written or gone. A few of them are taken for written: a page that is gone reads as zero, and is sent as
//!   that. Where there are many, they are told apart by looking at every page of the table.
//! - Pages without a mark that have never been sent are told apart in the same way: most were never there.
//!
//! That a page which is gone counts as written is not documented, so it is tried once
//! ([`pagemap::absent_counts_as_written`]). Where the kernel behaves in another way, every page is looked at.

use super::attach::{Dirty, RESIDENT};
use pclive_sys::Result;
use pclive_sys::pagemap::{self, Categories, Filter, Pagemap};
use pclive_wire::{PageRange, PageSet, VirtAddr};
use std::sync::LazyLock;

/// Bytes that one page table maps.
const TABLE: u64 = 2 << 20;
/// Pages of one table that are taken for written without being looked at: to read one that is gone costs about 1.5 µs, to look
/// at all pages of a table 5 µs.
const FEW: u64 = 16;

/// Whether the kernel allows the fast way.
static FAST: LazyLock<bool> = LazyLock::new(|| pagemap::absent_counts_as_written().unwrap_or(false));

/// Tries what the kernel does, so that it is known in the blackout.
pub fn prepare() {
    LazyLock::force(&FAST);
}

/// Looks at the mappings `anonymous` of a process that stands still. `sent` are pages of them; they were marked when they were
/// sent if the process is `tracked`.
pub fn look(pagemap: &Pagemap, anonymous: &PageSet, sent: &PageSet, tracked: bool) -> Result<Dirty> {
    if tracked && *FAST { by_marks(pagemap, anonymous, sent) } else { thoroughly(pagemap, anonymous, sent) }
}

/// Looks at every page.
fn thoroughly(pagemap: &Pagemap, anonymous: &PageSet, sent: &PageSet) -> Result<Dirty> {
    let (written, there) = look_closely(pagemap, anonymous)?;
    Ok(Dirty { written, absent: sent.difference(&there) })
}

fn by_marks(pagemap: &Pagemap, anonymous: &PageSet, sent: &PageSet) -> Result<Dirty> {
    let unmarked = unmarked(pagemap, anonymous)?;
    let known = unmarked.intersection(sent);
    let tables = tables_of(&unmarked.difference(sent)).union(&crowded_tables(&known)).intersection(anonymous);
    let (written, there) = look_closely(pagemap, &tables)?;
    let marked = sent.difference(&unmarked).difference(&tables);
    Ok(Dirty {
        written: written.union(&known.difference(&tables)),
        absent: sent.intersection(&tables).difference(&there).union(&without_table(pagemap, &marked)?),
    })
}

/// Pages without the mark of write-protection.
fn unmarked(pagemap: &Pagemap, mappings: &PageSet) -> Result<PageSet> {
    // Exactly this filter takes the short cut.
    let filter = Filter { all: Categories::WRITTEN, report: Categories::WRITTEN, ..Filter::default() };
    let mut found = Vec::new();
    mappings.ranges().iter().try_for_each(|&range| pagemap.scan(range, filter, &mut found))?;
    Ok(found.into_iter().map(|region| region.range).collect())
}

/// Written pages, and all that are there.
fn look_closely(pagemap: &Pagemap, pages: &PageSet) -> Result<(PageSet, PageSet)> {
    let filter = Filter { any: RESIDENT, report: Categories::WRITTEN, ..Filter::default() };
    let mut found = Vec::new();
    pages.ranges().iter().try_for_each(|&range| pagemap.scan(range, filter, &mut found))?;
    let written = found.iter().filter(|region| region.categories.has(Categories::WRITTEN));
    Ok((written.map(|region| region.range).collect(), found.iter().map(|region| region.range).collect()))
}

/// Those of the marked pages whose table is gone.
fn without_table(pagemap: &Pagemap, marked: &PageSet) -> Result<PageSet> {
    let parts: Vec<(u64, PageRange)> = by_table(marked).collect();
    let tables: Vec<&[(u64, PageRange)]> = parts.chunk_by(|a, b| a.0 == b.0).collect();
    let first: Vec<VirtAddr> = tables.iter().map(|parts| parts[0].1.start).collect();
    let resident = Filter { any: RESIDENT, ..Filter::default() };
    let mut gone = Vec::new();
    for (parts, is_there) in tables.into_iter().zip(pagemap.in_memory(&first)) {
        if !is_there && !pagemap.has_any(PageRange::new(parts[0].1.start, 1), resident)? {
            gone.extend(parts.iter().map(|&(_, part)| part));
        }
    }
    Ok(gone.into_iter().collect())
}

/// The ranges of a set, cut where page tables end, with the number of the table.
fn by_table(pages: &PageSet) -> impl Iterator<Item = (u64, PageRange)> {
    pages.ranges().iter().flat_map(|&range| {
        let tables = range.start.0 / TABLE..range.end().0.div_ceil(TABLE);
        tables.filter_map(move |table| Some((table, whole(table).intersection(&range)?)))
    })
}

fn whole(table: u64) -> PageRange {
    PageRange::between(VirtAddr(table * TABLE), VirtAddr((table + 1) * TABLE))
}

/// All that is mapped by the tables that have any of these pages.
fn tables_of(pages: &PageSet) -> PageSet {
    by_table(pages).map(|(table, _)| whole(table)).collect()
}

/// All that is mapped by the tables that have more than a few of these pages.
fn crowded_tables(pages: &PageSet) -> PageSet {
    let mut counts: Vec<(u64, u64)> = Vec::new();
    for (table, part) in by_table(pages) {
        match counts.last_mut() {
            Some((last, count)) if *last == table => *count += part.pages,
            _ => counts.push((table, part.pages)),
        }
    }
    counts.into_iter().filter(|&(_, count)| count > FEW).map(|(table, _)| whole(table)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::{Advice, MmapMut};
    use pclive_sys::mem::give_back;
    use pclive_sys::uffd::{Features, Mode, Uffd};
    use pclive_wire::{HostPid, PAGE_SIZE};
    use std::ops::Range;

    const TABLE_PAGES: usize = (TABLE / PAGE_SIZE) as usize;
    /// One more than are looked at, since the mapping need not begin where a table does.
    const TABLES: usize = 7;

    struct Memory {
        map: MmapMut,
        /// The first page that is the first one of a table.
        first: usize,
        pagemap: Pagemap,
        _uffd: Uffd,
    }

    impl Memory {
        /// Tracked memory that nobody has touched.
        fn new() -> Self {
            let map = MmapMut::map_anon(TABLES * TABLE as usize).unwrap();
            // A huge page would be written as a whole, where the machine has them always.
            map.advise(Advice::NoHugePage).unwrap();
            let start = map.as_ptr() as u64;
            let first = ((start.next_multiple_of(TABLE) - start) / PAGE_SIZE) as usize;
            let uffd = Uffd::of_self(Features::TRACKING).unwrap();
            let pagemap = Pagemap::open(HostPid(std::process::id() as i32)).unwrap();
            let memory = Self { map, first, pagemap, _uffd: uffd };
            memory._uffd.register(memory.range(0..(TABLES - 1) * TABLE_PAGES), Mode::WriteProtect).unwrap();
            memory
        }

        fn range(&self, pages: Range<usize>) -> PageRange {
            let start =
                VirtAddr(self.map.as_ptr() as u64).offset((self.first + pages.start) as u64 * PAGE_SIZE);
            PageRange::new(start, pages.len() as u64)
        }

        fn all(&self, pages: Range<usize>) -> PageSet {
            [self.range(pages)].into_iter().collect()
        }

        fn set(&self, ranges: &[Range<usize>]) -> PageSet {
            ranges.iter().map(|range| self.range(range.clone())).collect()
        }

        fn write(&mut self, pages: Range<usize>) {
            for page in pages {
                self.map[(self.first + page) * PAGE_SIZE as usize] = 1;
            }
        }

        fn give_back(&mut self, pages: Range<usize>) {
            give_back(&mut self.map, self.first + pages.start..self.first + pages.end).unwrap();
        }

        fn protect(&self, pages: Range<usize>) {
            let resident = Filter { any: RESIDENT, ..Filter::default() };
            self.pagemap.scan_and_protect(self.range(pages), resident, &mut Vec::new()).unwrap();
        }
    }

    #[test]
    fn written_and_vanished_pages_are_told_apart() {
        let table = |number: usize| number * TABLE_PAGES;
        let mut memory = Memory::new();
        // Tables 0 to 4 are sent, of table 5 nothing.
        let sent = 0..table(5);
        memory.write(sent.clone());
        memory.protect(sent.clone());

        memory.write(3..5); // a few pages of table 0 are written, and one is given back
        memory.give_back(9..10);
        memory.write(table(1) + 100..table(1) + 200); // many of table 1, in which many are given back
        memory.give_back(table(1) + 200..table(1) + 300);
        memory.give_back(table(2)..table(3)); // all of table 2, which may be gone then
        memory.write(table(2) + 7..table(2) + 8); // nothing but one page of it is there
        memory.give_back(table(3)..table(4)); // all of table 3
        memory.write(table(5) + 2..table(5) + 4); // new pages of table 5

        let anonymous = memory.all(0..table(6));
        let sent = memory.all(sent);
        let found = by_marks(&memory.pagemap, &anonymous, &sent).unwrap();
        let written = [
            3..5,
            9..10, // taken for written, and read as zero
            table(1) + 100..table(1) + 200,
            table(2) + 7..table(2) + 8,
            table(5) + 2..table(5) + 4,
        ];
        let absent = [table(1) + 200..table(1) + 300, table(2)..table(2) + 7, table(2) + 8..table(4)];
        assert_eq!(found, Dirty { written: memory.set(&written), absent: memory.set(&absent) });

        // Who looks at every page knows of the single one, too.
        let found = thoroughly(&memory.pagemap, &anonymous, &sent).unwrap();
        let single = memory.all(9..10);
        assert_eq!(found.written, memory.set(&written).difference(&single));
        assert_eq!(found.absent, memory.set(&absent).union(&single));
    }

    #[test]
    fn pages_in_use_are_neither_written_nor_absent() {
        let mut memory = Memory::new();
        memory.write(0..TABLE_PAGES + 5);
        memory.protect(0..TABLE_PAGES + 5);
        let all = memory.all(0..2 * TABLE_PAGES);
        let sent = memory.all(0..TABLE_PAGES + 5);
        for tracked in [true, false] {
            assert_eq!(look(&memory.pagemap, &all, &sent, tracked).unwrap(), Dirty::default());
        }
    }
}
