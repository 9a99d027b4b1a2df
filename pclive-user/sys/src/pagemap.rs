//! `PAGEMAP_SCAN` (Linux 6.7): which pages are populated or written, and write-protecting them in the same pass.
//!
//! See `Documentation/admin-guide/mm/pagemap.rst`. Write-protection works only in ranges registered with a userfaultfd
//! that has [`crate::uffd::Features::TRACKING`].

use crate::mem::give_back;
use crate::uffd::{Features, Mode, Uffd};
use crate::{Error, Result, check_range};
use memmap2::MmapMut;
use pclive_wire::{HostPid, PAGE_SIZE, PageRange, VirtAddr};
use std::fs::File;
use std::os::fd::AsRawFd;

/// Page categories, as bit sets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Categories(pub u64);

#[allow(missing_docs)] // PAGE_IS_* of linux/fs.h
impl Categories {
    pub const NONE: Self = Self(0);
    pub const WPALLOWED: Self = Self(1);
    pub const WRITTEN: Self = Self(1 << 1);
    pub const FILE: Self = Self(1 << 2);
    pub const PRESENT: Self = Self(1 << 3);
    pub const SWAPPED: Self = Self(1 << 4);
    pub const PFNZERO: Self = Self(1 << 5);
    pub const HUGE: Self = Self(1 << 6);
    pub const SOFT_DIRTY: Self = Self(1 << 7);
    /// Linux 6.15.
    pub const GUARD: Self = Self(1 << 8);

    /// Both sets together.
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are in this set.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Which pages a scan returns: those with all of `all`, any of `any` (if not empty) and none of `without`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Filter {
    /// Categories a page must have.
    pub all: Categories,
    /// Categories of which a page must have at least one.
    pub any: Categories,
    /// Categories a page must not have.
    pub without: Categories,
    /// Categories reported; runs of pages that agree in them are returned as one region.
    pub report: Categories,
}

/// A run of pages with the same reported categories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where.
    pub range: PageRange,
    /// What is true of every page in it.
    pub categories: Categories,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

impl ScanArg {
    /// A complete argument, whose `vec` points to `vec_len` writable page_regions: `regions`.
    fn new(range: PageRange, filter: Filter, flags: u64, regions: &mut [RawRegion]) -> Self {
        let inverted = filter.without;
        Self {
            size: size_of::<Self>() as u64,
            flags,
            start: range.start.0,
            end: range.end().0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_inverted: inverted.0,
            category_mask: filter.all.or(inverted).0,
            category_anyof_mask: filter.any.0,
            return_mask: filter.report.0,
            ..Self::default()
        }
    }
}

const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<RawRegion>() == 24);

const PM_SCAN_WP_MATCHING: u64 = 1;

mod ioctl {
    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, super::ScanArg);
}
const _: () = assert!(nix::request_code_readwrite!(b'f', 16, size_of::<ScanArg>()) as u64 == 0xc060_6610);

/// `/proc/PID/pagemap` of one process.
#[derive(Debug)]
pub struct Pagemap {
    pid: HostPid,
    file: File,
}

impl Pagemap {
    /// Opens the page map of `pid`. Like `/proc/PID/mem` it stays with the address space of this moment.
    pub fn open(pid: HostPid) -> Result<Self> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).map_err(|source| Error::Open { path: path.into(), source })?;
        Ok(Self { pid, file })
    }

    /// Which of these pages are known to be in memory: a tenth of a microsecond for each, where a scan takes one or two. Of
    /// others (zero pages, swapped out ones, or all if the kernel has no `move_pages(2)`) nothing is known. The process must have
    /// executed no other program since.
    pub fn in_memory(&self, pages: &[VirtAddr]) -> Vec<bool> {
        let pages: Vec<u64> = pages.iter().map(|page| page.0).collect();
        let mut nodes = vec![-libc::ENOENT; pages.len()];
        let (count, no_targets) = (pages.len(), std::ptr::null::<libc::c_int>());
        // SAFETY: both arrays have `count` elements, and without targets no page is moved (Linux 2.6.18).
        let asked = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                self.pid.0,
                count,
                pages.as_ptr(),
                no_targets,
                nodes.as_mut_ptr(),
                0,
            )
        };
        nodes.into_iter().map(|node| asked == 0 && node >= 0).collect()
    }

    /// Appends the matching pages of `range` to `found`.
    pub fn scan(&self, range: PageRange, filter: Filter, found: &mut Vec<Region>) -> Result<()> {
        self.walk(range, filter, 0, found)
    }

    /// Like [`Pagemap::scan`], and write-protects every page it returns, atomically with looking at it. Ranges that are
    /// not registered for tracking are passed over.
    pub fn scan_and_protect(&self, range: PageRange, filter: Filter, found: &mut Vec<Region>) -> Result<()> {
        self.walk(range, filter, PM_SCAN_WP_MATCHING, found)
    }

    /// Whether any page of `range` matches.
    pub fn has_any(&self, range: PageRange, filter: Filter) -> Result<bool> {
        let mut region = [RawRegion::default()];
        let mut arg = ScanArg { max_pages: 1, ..ScanArg::new(range, filter, 0, &mut region) };
        loop {
            // SAFETY: as `ScanArg::new` says; `region` is alive.
            match unsafe { ioctl::pagemap_scan(self.file.as_raw_fd(), &mut arg) } {
                Ok(filled) => return Ok(filled > 0),
                Err(nix::errno::Errno::EINTR) => {}
                Err(_) => check_range("PAGEMAP_SCAN", range, -1).map(drop)?,
            }
        }
    }

    fn walk(&self, range: PageRange, filter: Filter, flags: u64, found: &mut Vec<Region>) -> Result<()> {
        let mut regions = [RawRegion::default(); 512];
        let mut next = range.start;
        while next < range.end() {
            let mut arg = ScanArg::new(PageRange::between(next, range.end()), filter, flags, &mut regions);
            // SAFETY: as `ScanArg::new` says; `regions` is alive.
            let result = unsafe { ioctl::pagemap_scan(self.file.as_raw_fd(), &mut arg) };
            let filled = match result {
                Ok(filled) => filled,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(_) => check_range("PAGEMAP_SCAN", range, -1)?,
            };
            found.extend(regions[..filled as usize].iter().map(|raw| Region {
                range: PageRange::between(VirtAddr(raw.start), VirtAddr(raw.end)),
                categories: Categories(raw.categories),
            }));
            if arg.walk_end <= next.0 {
                break;
            }
            next = VirtAddr(arg.walk_end);
        }
        Ok(())
    }
}

/// Whether a search for [`Categories::WRITTEN`] alone finds anonymous pages that were protected and are gone, as it does on all
/// kernels that are known. Tried on memory of our own.
///
/// # Errors
/// Where such memory cannot be made or tracked.
pub fn absent_counts_as_written() -> Result<bool> {
    let pid = HostPid(std::process::id() as i32);
    let failed = |source| Error::Memory { access: "map", pid, addr: VirtAddr(0), source };
    let mut map = MmapMut::map_anon(4 * PAGE_SIZE as usize).map_err(failed)?;
    let range = PageRange::new(VirtAddr(map.as_ptr() as u64), 4);
    map.fill(1);
    let uffd = Uffd::of_self(Features::TRACKING)?;
    uffd.register(range, Mode::WriteProtect)?;
    let pagemap = Pagemap::open(pid)?;
    pagemap.scan_and_protect(range, Filter::default(), &mut Vec::new())?;
    let gone = PageRange::new(range.start.offset(PAGE_SIZE), 1);
    give_back(&mut map, 1..2).map_err(failed)?;
    map[2 * PAGE_SIZE as usize] = 2;
    let written = Filter { all: Categories::WRITTEN, report: Categories::WRITTEN, ..Filter::default() };
    let mut found = Vec::new();
    pagemap.scan(range, written, &mut found)?;
    let gone_and_written = PageRange::new(gone.start, 2);
    Ok(found.iter().map(|region| region.range).eq([gone_and_written]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_are_in_memory_are_known() {
        let mut map = MmapMut::map_anon(3 * PAGE_SIZE as usize).unwrap();
        // A huge page would be there as a whole, where the machine has them always.
        map.advise(memmap2::Advice::NoHugePage).unwrap();
        map[PAGE_SIZE as usize] = 1;
        let pages: Vec<VirtAddr> =
            (0..3).map(|page| VirtAddr(map.as_ptr() as u64).offset(page * PAGE_SIZE)).collect();
        let pagemap = Pagemap::open(HostPid(std::process::id() as i32)).unwrap();
        assert_eq!(pagemap.in_memory(&pages), [false, true, false]);
        assert_eq!(Pagemap { pid: HostPid(i32::MAX), ..pagemap }.in_memory(&pages), [false; 3]);
    }

    #[test]
    fn this_kernel_is_one_of_those_that_are_known() {
        assert!(absent_counts_as_written().unwrap());
    }
}
