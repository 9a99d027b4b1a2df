//! `PAGEMAP_SCAN` (Linux 6.7): which pages are populated or written, and write-protecting them in the same pass.
//!
//! See `Documentation/admin-guide/mm/pagemap.rst`. Write-protection works only in ranges registered with a userfaultfd
//! that has [`crate::uffd::Features::TRACKING`].

use crate::{Error, Result, check_range};
use pclive_wire::{HostPid, PageRange, VirtAddr};
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

const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<RawRegion>() == 24);

const PM_SCAN_WP_MATCHING: u64 = 1;

mod ioctl {
    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, super::ScanArg);
}
const _: () = assert!(nix::request_code_readwrite!(b'f', 16, size_of::<ScanArg>()) as u64 == 0xc060_6610);

/// `/proc/PID/pagemap` of one process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens the page map of `pid`. Like `/proc/PID/mem` it stays with the address space of this moment.
    pub fn open(pid: HostPid) -> Result<Self> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).map_err(|source| Error::Open { path: path.into(), source })?;
        Ok(Self { file })
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

    fn walk(&self, range: PageRange, filter: Filter, flags: u64, found: &mut Vec<Region>) -> Result<()> {
        let mut regions = [RawRegion::default(); 512];
        let mut next = range.start.0;
        let inverted = filter.without;
        while next < range.end().0 {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags,
                start: next,
                end: range.end().0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                category_inverted: inverted.0,
                category_mask: filter.all.or(inverted).0,
                category_anyof_mask: filter.any.0,
                return_mask: filter.report.0,
                ..ScanArg::default()
            };
            // SAFETY: `arg` is a complete pm_scan_arg, and `vec` points to `vec_len` writable page_regions.
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
            if arg.walk_end <= next {
                break;
            }
            next = arg.walk_end;
        }
        Ok(())
    }
}
