//! Placing pages in the parked processes, while they are being built.
//!
//! An absent page of anonymous memory is placed with `UFFDIO_COPY`, which needs neither a fault nor the process; a page
//! that is present, or that covers a file, is written through `/proc/PID/mem`. Which of the two it is, the kernel says:
//! each call goes on from where the other had to stop.

use pclive_sys::mem::ProcessMemory;
use pclive_sys::pagemap::{Categories, Filter, Pagemap};
use pclive_sys::uffd::{Placed, Uffd};
use pclive_sys::{Error, Result};
use pclive_wire::layout::overlapping;
use pclive_wire::manifest::{Backing, Vma};
use pclive_wire::page_frame::{BLOCK_LEN, BlockMask};
use pclive_wire::{PAGE_SIZE, PageRange, VirtAddr};

/// A page of zeros, for pages that have to be overwritten with them.
static ZEROS: [u8; 64 * PAGE_SIZE as usize] = [0; 64 * PAGE_SIZE as usize];

/// The memory of one parked process.
#[derive(Debug)]
pub struct Placement {
    uffd: Uffd,
    memory: ProcessMemory,
    pagemap: Pagemap,
    /// The mappings that stand, sorted.
    vmas: Vec<Vma>,
}

impl Placement {
    /// Placement in the process of `uffd`, in which nothing is mapped yet.
    pub fn new(uffd: Uffd) -> Result<Self> {
        let pid = uffd.pid();
        Ok(Self { memory: ProcessMemory::open(pid)?, pagemap: Pagemap::open(pid)?, uffd, vmas: Vec::new() })
    }

    /// The mappings that stand.
    pub fn vmas(&self) -> &[Vma] {
        &self.vmas
    }

    /// Takes note of new mappings: `mapped` are the parts that were mapped anew.
    pub fn set_vmas(&mut self, vmas: Vec<Vma>, mapped: &[PageRange]) -> Result<()> {
        use pclive_sys::uffd::Mode;
        self.vmas = vmas;
        for &range in mapped {
            for (part, anonymous) in self.parts(range) {
                if anonymous {
                    self.uffd.register(part, Mode::Missing)?;
                }
            }
        }
        Ok(())
    }

    /// The process's memory, by address.
    pub fn memory(&self) -> &ProcessMemory {
        &self.memory
    }

    /// Places `contents` (whole pages) at `start`. Parts where nothing is mapped are left out: the source unmapped them
    /// after it had read the pages, and the next manifest says so.
    pub fn place(&self, start: VirtAddr, contents: &[u8]) -> Result<()> {
        let range = PageRange::new(start, contents.len() as u64 / PAGE_SIZE);
        for (part, anonymous) in self.parts(range) {
            let offset = (part.start.0 - start.0) as usize;
            let pages = &contents[offset..offset + part.bytes() as usize];
            match anonymous {
                true => self.place_anonymous(part.start, pages)?,
                false => self.memory.write(part.start, pages)?,
            }
        }
        Ok(())
    }

    /// Overwrites the blocks of `mask` in every page of `range` with `contents`. The pages have been placed before: without
    /// one there is nothing that the rest of it could be, and this fails.
    pub fn patch(&self, range: PageRange, mask: BlockMask, contents: &[u8]) -> Result<()> {
        let blocks_of_page = contents.chunks_exact(mask.blocks() * BLOCK_LEN);
        for (page, mut blocks) in (0..range.pages).zip(blocks_of_page) {
            let page = range.start.offset(page * PAGE_SIZE);
            if !self.takes_page(page) {
                continue;
            }
            for (at, len) in mask.parts() {
                let (part, rest) = blocks.split_at(len);
                self.memory.write(page.offset(at as u64), part)?;
                blocks = rest;
            }
        }
        Ok(())
    }

    /// Makes every page of `range` read as zero. Absent anonymous pages do already.
    pub fn place_zeros(&self, range: PageRange) -> Result<()> {
        for (part, anonymous) in self.parts(range) {
            match anonymous {
                true => {
                    for present in self.present(part)? {
                        self.write_zeros(present)?;
                    }
                }
                false => self.write_zeros(part)?,
            }
        }
        Ok(())
    }

    /// Whether a page can be placed here: a mapping that has none of its own is older or newer than the page.
    fn takes_page(&self, addr: VirtAddr) -> bool {
        self.parts(PageRange::new(addr, 1)).next().is_some()
    }

    /// The parts of `range` that are mapped and have pages of their own, and whether they are anonymous memory.
    fn parts(&self, range: PageRange) -> impl Iterator<Item = (PageRange, bool)> {
        overlapping(&self.vmas, range).filter(|(vma, _)| vma.has_own_pages()).filter_map(|(vma, common)| {
            Some((up_to_end_of_file(vma).intersection(&common)?, vma.backing == Backing::Anonymous))
        })
    }

    fn place_anonymous(&self, start: VirtAddr, pages: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < pages.len() {
            let at = start.offset(done as u64);
            match self.uffd.copy(at, &pages[done..]) {
                Ok(Placed::All) => return Ok(()),
                Ok(Placed::Present { bytes }) => {
                    done += bytes as usize;
                    done += self.memory.write_some(start.offset(done as u64), &pages[done..])?;
                }
                // One VMA of the source may be two here, where the kernel did not merge them: a copy must not cross.
                Err(Error::Range { errno: nix::Error::ENOENT, .. })
                    if pages.len() - done > PAGE_SIZE as usize =>
                {
                    self.place_anonymous(at, &pages[done..done + PAGE_SIZE as usize])?;
                    done += PAGE_SIZE as usize;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn present(&self, range: PageRange) -> Result<Vec<PageRange>> {
        let populated = Categories::PRESENT.or(Categories::SWAPPED);
        let filter = Filter { any: populated, report: Categories::NONE, ..Filter::default() };
        let mut found = Vec::new();
        self.pagemap.scan(range, filter, &mut found)?;
        Ok(found.into_iter().map(|region| region.range).collect())
    }

    fn write_zeros(&self, range: PageRange) -> Result<()> {
        let mut done = 0;
        while done < range.bytes() {
            let len = (range.bytes() - done).min(ZEROS.len() as u64);
            self.memory.write(range.start.offset(done), &ZEROS[..len as usize])?;
            done += len;
        }
        Ok(())
    }
}

/// Where a mapping may have pages. Behind the end of a file it cannot (`SIGBUS`): what is sent for there is of a newer mapping,
/// as when a library is loaded, which is mapped as a whole before its zeros are mapped over its end.
fn up_to_end_of_file(vma: &Vma) -> PageRange {
    let Backing::File { offset, size, .. } = vma.backing else { return vma.range };
    let pages = size.saturating_sub(offset).div_ceil(PAGE_SIZE);
    PageRange::new(vma.range.start, vma.range.pages.min(pages))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use memmap2::MmapMut;
    use pclive_sys::uffd::Features;
    use pclive_wire::manifest::VmaFlags;

    const PAGES: u64 = 4;

    /// Memory of this process that nobody has touched, and placement in it.
    pub(crate) fn placement() -> (MmapMut, Placement, VirtAddr) {
        let map = MmapMut::map_anon((PAGES * PAGE_SIZE) as usize).unwrap();
        let start = VirtAddr(map.as_ptr() as u64);
        let range = PageRange::new(start, PAGES);
        let flags = VmaFlags::default();
        let vma = Vma { range, prot: 3, flags, backing: Backing::Anonymous };
        let mut placement = Placement::new(Uffd::of_self(Features::PLACEMENT).unwrap()).unwrap();
        placement.set_vmas(vec![vma], &[range]).unwrap();
        (map, placement, start)
    }

    #[test]
    fn a_patch_changes_its_blocks_and_nothing_else() {
        let (map, placement, start) = placement();
        let page = PAGE_SIZE as usize;
        placement.place(start, &vec![1; 3 * page]).unwrap();
        let mask = BlockMask::new(0b1000_0000_0000_0110).unwrap();
        let blocks: Vec<u8> = (2..8).flat_map(|fill| [fill; BLOCK_LEN]).collect();
        placement.patch(PageRange::new(start.offset(PAGE_SIZE), 2), mask, &blocks).unwrap();
        let mut expected = vec![1; 3 * page];
        for (fill, (of, at)) in (2..8).zip([(1, 1), (1, 2), (1, 15), (2, 1), (2, 2), (2, 15)]) {
            expected[of * page + at * BLOCK_LEN..][..BLOCK_LEN].fill(fill);
        }
        assert!(map[..3 * page] == expected);
    }

    #[test]
    fn pages_behind_the_end_of_a_mapped_file_are_left_out() {
        let start = VirtAddr(1 << 20);
        let of = |offset, size| {
            let backing = Backing::File { path: b"/library".to_vec(), offset, shared: false, size };
            let vma = Vma { range: PageRange::new(start, 3), prot: 3, flags: VmaFlags::default(), backing };
            up_to_end_of_file(&vma).pages
        };
        let sizes = [0, 1, PAGE_SIZE, PAGE_SIZE + 1, 9 * PAGE_SIZE];
        assert_eq!(sizes.map(|size| of(0, size)), [0, 1, 1, 2, 3]);
        assert_eq!(sizes.map(|size| of(PAGE_SIZE, size)), [0, 0, 0, 1, 3]);
    }

    #[test]
    fn what_was_never_placed_cannot_be_patched() {
        let (_map, placement, start) = placement();
        let mask = BlockMask::new(1).unwrap();
        placement.place(start, &vec![1; PAGE_SIZE as usize]).unwrap();
        placement.patch(PageRange::new(start.offset(PAGE_SIZE), 1), mask, &[2; BLOCK_LEN]).unwrap_err();
        // Where nothing is mapped the source has unmapped it since.
        let unmapped = PageRange::new(start.offset(PAGES * PAGE_SIZE), 1);
        placement.patch(unmapped, mask, &[2; BLOCK_LEN]).unwrap();
    }
}
