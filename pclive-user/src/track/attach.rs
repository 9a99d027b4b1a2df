//! Write tracking of one process, with `PAGEMAP_SCAN` as the ground truth.
//!
//! # How no write is missed
//!
//! Each private mapping is registered with a userfaultfd in asynchronous write-protect mode. A scan returns the pages that
//! are not protected, and protects them in the same step; their contents are read afterwards. A write that comes between
//! the two is in the contents *and* in the next dirty set: sent twice, never lost.
//!
//! That is done piece by piece, when it is a piece's turn to be sent. Protecting everything when a round begins would count
//! every page that is written before its turn twice: in this round, and in the next one.
//!
//! A mapping that has appeared since the last round is not registered, and the kernel drops the registration of one that
//! is moved or replaced. So each round registers everything again; that leaves the pages of what is new unprotected, and
//! the scan returns all of them. Nothing depends on having seen the `mmap`.
//!
//! What has vanished (`munmap`, `MADV_DONTNEED`) is found once, after the freeze, as the difference between the pages sent
//! and the pages there are. In a mapping of a file the kernel leaves a mark where a protected page was
//! (`pte_marker_uffd_wp`), which a scan cannot tell from a page in swap: there, whatever is not present is simply read,
//! and sent again as what the process would see.

use crate::capture::SourceProcess;
use crate::capture::process::{ProcessError, prepare_injection};
use crate::capture::vmas::find_vdso;
use crate::track::last_look;
use nix::errno::Errno;
use pclive_sys::mem::ProcessMemory;
use pclive_sys::pagemap::{Categories, Filter, Pagemap, Region};
use pclive_sys::pidfd::pidfd_getfd;
use pclive_sys::ptrace::{Seize, Tracee};
use pclive_sys::script::Borrowed;
use pclive_sys::uffd::{self, Features, Mode, Uffd};
use pclive_wire::layout::{mapped_anew, overlapping};
use pclive_wire::manifest::{Backing, Vma};
use pclive_wire::units::USER_END;
use pclive_wire::{HostPid, PAGE_SIZE, PageRange, PageSet, VirtAddr};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why a process cannot be tracked.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The call could not be injected.
    #[error("cannot inject a call into process {pid}")]
    Inject {
        /// Which.
        pid: HostPid,
        /// Why.
        source: ProcessError,
    },
    /// A kernel interface said no.
    #[error(transparent)]
    Sys(#[from] pclive_sys::Error),
    /// Two processes have one address space.
    #[error("process {0} runs in the memory of another one")]
    SharedMemory(HostPid),
    /// The userfaultfd could not be taken over.
    #[error("pidfd_getfd of {pid}")]
    TakeOver {
        /// From whom.
        pid: HostPid,
        /// Why.
        source: nix::Error,
    },
}

impl TrackError {
    /// Whether the address space is gone: the process has ended or executed another program.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Sys(pclive_sys::Error::Gone(_)) => true,
            Self::Sys(e) => e.errno() == Some(nix::Error::ESRCH),
            _ => false,
        }
    }
}

/// The pages that a round must send, and those that the destination must drop.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Written since the last round, or mapped anew.
    pub written: PageSet,
    /// Sent once and gone now; known only after the freeze.
    pub absent: PageSet,
}

/// Bytes that are scanned, and protected, at a time. A huge page that a scan protects in part only is split: windows end
/// where huge pages do.
const WINDOW: u64 = 8 << 20;

/// Where mappings may begin on any host, whatever its `mmap_min_addr`.
const LOWEST: VirtAddr = VirtAddr(64 << 10);

/// The part of `range` up to the end of the window that its first page is in.
fn first_window(range: PageRange) -> PageRange {
    let end = VirtAddr((range.start.0 / WINDOW + 1) * WINDOW);
    PageRange::between(range.start, end.min(range.end()))
}

/// A round under way.
#[derive(Debug)]
pub struct Walk {
    /// What has not been looked at yet.
    ahead: VecDeque<(PageRange, Filter)>,
    /// Pages that must be sent without having been written.
    unwritten: PageSet,
}

/// A process whose writes are tracked. Dropping it ends the tracking: nothing stays in the process.
#[derive(Debug)]
pub struct TrackedProcess {
    /// None if the process was stopped before it was ever tracked.
    uffd: Option<Uffd>,
    pagemap: Pagemap,
    memory: Arc<ProcessMemory>,
    /// The layout of the last round.
    layout: Vec<Vma>,
    /// For how long the process was stopped to attach.
    pub stopped_for: Duration,
}

impl TrackedProcess {
    /// Makes a userfaultfd in the address space of `process` and takes it over. The thread group leader is stopped for
    /// that time.
    pub fn attach(process: &SourceProcess) -> Result<Self, TrackError> {
        last_look::prepare();
        let tracee = Tracee::seize(process.pid, Seize::Source)?;
        tracee.interrupt()?;
        tracee.wait_trap()?;
        let stopped_at = Instant::now();
        let attached = Self::attach_stopped(process, &tracee);
        tracee.detach()?;
        Ok(Self { stopped_for: stopped_at.elapsed(), ..attached? })
    }

    /// Everything here must be of one address space, which only a stopped process is sure to keep.
    fn attach_stopped(process: &SourceProcess, tracee: &Tracee) -> Result<Self, TrackError> {
        let pid = process.pid;
        let inject = |source| TrackError::Inject { pid, source };
        let vdso = find_vdso(pid).map_err(|source| inject(source.into()))?;
        let (memory, footing) = prepare_injection(pid, vdso).map_err(inject)?;
        let pagemap = Pagemap::open(pid)?;
        let taken = Borrowed::lend(tracee, &footing, |borrowed| take_userfaultfd(borrowed, process));
        let fd = taken?.map_err(|source| TrackError::TakeOver { pid, source })?;
        let uffd = Some(Uffd::adopt(fd, pid, Features::TRACKING)?);
        Ok(Self { uffd, pagemap, memory, layout: Vec::new(), stopped_for: Duration::ZERO })
    }

    /// A process that is stopped already: all its pages are dirty, and none will be written.
    pub fn untracked(pid: HostPid) -> Result<Self, TrackError> {
        Ok(Self {
            uffd: None,
            pagemap: Pagemap::open(pid)?,
            memory: Arc::new(ProcessMemory::open(pid)?),
            layout: Vec::new(),
            stopped_for: Duration::ZERO,
        })
    }

    /// Whether writes are noticed.
    pub fn is_tracked(&self) -> bool {
        self.uffd.is_some()
    }

    /// The process's memory, to read pages from: by any thread, whatever becomes of the tracking meanwhile.
    pub fn memory(&self) -> Arc<ProcessMemory> {
        self.memory.clone()
    }

    /// Begins a round, whose pages [`Self::next_pages`] returns. `layout` are the mappings now.
    pub fn begin_round(&mut self, layout: &[Vma]) -> Result<Walk, TrackError> {
        self.register_all(layout)?;
        let mut new = Vec::new();
        self.populated_of_new(layout, &mut new)?;
        // Those that are written the walk will find.
        let is_unwritten = |region: &&Region| !region.categories.has(Categories::WRITTEN);
        let unwritten: PageSet = new.iter().filter(is_unwritten).map(|region| region.range).collect();
        let own = layout.iter().filter(|vma| vma.has_own_pages());
        self.layout = layout.to_vec();
        Ok(Walk { ahead: own.map(|vma| (vma.range, written(vma))).collect(), unwritten })
    }

    /// The next pages of a round, at least `pages` of them unless it ends, which are protected again from now on; none at
    /// its end.
    ///
    /// They are protected only when it is their turn: a page that is written once more before is sent once.
    pub fn next_pages(&self, walk: &mut Walk, pages: u64) -> Result<PageSet, TrackError> {
        let mut found: Vec<Region> = Vec::new();
        let mut room = pages;
        while let Some((range, filter)) = walk.ahead.front_mut()
            && room > 0
        {
            let window = first_window(*range);
            let before = found.len();
            self.pagemap.scan_and_protect(window, *filter, &mut found)?;
            room = room.saturating_sub(found[before..].iter().map(|region| region.range.pages).sum());
            *range = PageRange::between(window.end(), range.end());
            if range.is_empty() {
                walk.ahead.pop_front();
            }
        }
        match found.is_empty() {
            true => Ok(std::mem::take(&mut walk.unwritten)),
            false => Ok(found.iter().map(|region| region.range).collect()),
        }
    }

    /// The pages written since the last round. Protects nothing, and does not see mappings that are new since.
    pub fn written(&self) -> Result<PageSet, TrackError> {
        let mut found = Vec::new();
        for vma in self.layout.iter().filter(|vma| vma.has_own_pages()) {
            self.pagemap.scan(vma.range, written(vma), &mut found)?;
        }
        Ok(found.iter().map(|region| region.range).collect())
    }

    /// A round with every thread stopped: nothing is protected, and pages of `sent` that have vanished are found.
    pub fn last_round(&mut self, layout: &[Vma], sent: &PageSet) -> Result<Dirty, TrackError> {
        self.register_all(layout)?;
        let of = |anonymous: bool| -> PageSet {
            let wanted = |vma: &&Vma| vma.has_own_pages() && (vma.backing == Backing::Anonymous) == anonymous;
            layout.iter().filter(wanted).map(|vma| vma.range).collect()
        };
        let (anonymous, of_files) = (of(true), of(false));
        // What is no longer mapped goes away with its mapping.
        let sent_anonymous = sent.intersection(&anonymous);
        let mut dirty = last_look::look(&self.pagemap, &anonymous, &sent_anonymous, self.is_tracked())?;
        let (written, there) = self.written_and_there_of_files(&of_files)?;
        let vanished = sent.intersection(&of_files).difference(&there);
        let mut new = Vec::new();
        self.populated_of_new(layout, &mut new)?;
        let new: PageSet = new.iter().map(|region| region.range).collect();
        dirty.written = dirty.written.union(&written).union(&vanished).union(&new);
        self.layout = layout.to_vec();
        Ok(dirty)
    }

    /// Written pages, and all that are there, of mapped files. A library has five mappings side by side, which one scan sees.
    fn written_and_there_of_files(&self, mappings: &PageSet) -> Result<(PageSet, PageSet), TrackError> {
        let mut found: Vec<Region> = Vec::new();
        for &range in mappings.ranges() {
            self.pagemap.scan(range, populated(Categories::FILE), &mut found)?;
        }
        let having = |category| -> PageSet {
            found.iter().filter(|region| region.categories.has(category)).map(|region| region.range).collect()
        };
        // What looks like a page that is swapped out may be a mark that outlived its page.
        Ok((having(Categories::WRITTEN), having(Categories::PRESENT)))
    }

    /// Registers everything that can be, in as few ranges as there are between mappings that cannot be: never a part of a
    /// mapping, even if `layout` is no longer true. A part would be split off, and since Linux 6.17 an `mremap(2)` by the
    /// process across the two would move the first and then fail at the second (`remap_move` in mm/mremap.c).
    ///
    /// [`TrackError::SharedMemory`] if somebody else's userfaultfd is registered: that of the parent, in whose memory a
    /// child of `vfork` runs. Its pages are the parent's, and its scans would take the parent's dirty bits away.
    ///
    /// `ESRCH` if the process has executed another program since: `layout` is then that of an address space which this
    /// value knows nothing of, and scans of the old one would find nothing.
    fn register_all(&self, layout: &[Vma]) -> Result<(), TrackError> {
        let Some(uffd) = &self.uffd else { return Ok(()) };
        for range in registrable(layout) {
            match uffd.register(range, Mode::WriteProtect) {
                // No mapping in this range, or a new one that cannot be registered: the next round knows of it.
                Err(e) if matches!(e.errno(), Some(Errno::EINVAL | Errno::EPERM)) => {}
                // Also the kernel's answer where there is no address space any more (`mmget_not_zero` in fs/userfaultfd.c).
                Err(e) if e.errno() == Some(Errno::ENOMEM) && self.memory.is_gone() => {
                    return Err(pclive_sys::Error::Gone(uffd.pid()).into());
                }
                Err(e) if e.errno() == Some(Errno::EBUSY) => {
                    return Err(TrackError::SharedMemory(uffd.pid()));
                }
                registered => registered?,
            }
        }
        Ok(())
    }

    /// Adds the populated pages of mappings that the destination maps anew, written or not.
    fn populated_of_new(&self, layout: &[Vma], found: &mut Vec<Region>) -> Result<(), TrackError> {
        if self.layout == layout {
            return Ok(());
        }
        for new in mapped_anew(&self.layout, layout) {
            for (vma, range) in overlapping(layout, new).filter(|(vma, _)| vma.has_own_pages()) {
                self.pagemap.scan(range, populated(foreign(vma)), found)?;
            }
        }
        Ok(())
    }
}

/// In memory or swapped out.
pub(super) const RESIDENT: Categories = Categories::PRESENT.or(Categories::SWAPPED);

/// Populated pages of their own, written since they were protected.
fn written(vma: &Vma) -> Filter {
    Filter { all: Categories::WRITTEN, any: RESIDENT, without: foreign(vma), report: Categories::WRITTEN }
}

/// Populated pages but for `foreign` ones, whether they were written, and whether they are in memory.
fn populated(foreign: Categories) -> Filter {
    Filter {
        all: Categories::NONE,
        any: RESIDENT,
        without: foreign,
        report: Categories::WRITTEN.or(Categories::PRESENT),
    }
}

/// The pages of a mapping that are not its own: those of the file that it maps privately, until they are written. To tell
/// them the kernel looks at each page's `struct page`, which costs more than all the rest of a scan; so it is asked only
/// where there can be any.
fn foreign(vma: &Vma) -> Categories {
    if vma.backing == Backing::Anonymous { Categories::NONE } else { Categories::FILE }
}

/// Has the process make a userfaultfd, duplicates it, and has the process close its own.
fn take_userfaultfd(
    borrowed: &Borrowed<'_>,
    process: &SourceProcess,
) -> pclive_sys::Result<nix::Result<OwnedFd>> {
    let fd = borrowed.open("userfaultfd", libc::SYS_userfaultfd, [uffd::CREATE_FLAGS])?;
    let taken = pidfd_getfd(process.pidfd.as_fd(), fd);
    borrowed.call("close of the userfaultfd", libc::SYS_close, [fd as u64])?;
    Ok(taken)
}

/// The ranges between the mappings that cannot be registered: from the lowest address to the highest.
fn registrable(layout: &[Vma]) -> Vec<PageRange> {
    let mut ranges = Vec::new();
    // Not lower than needed: below `mmap_min_addr` older kernels register nothing (`EINVAL`).
    let mut start = layout.first().map_or(LOWEST, |vma| vma.range.start.min(LOWEST));
    for barrier in layout.iter().filter(|vma| !vma.has_own_pages()) {
        ranges.push(PageRange::between(start, barrier.range.start));
        start = barrier.range.end();
    }
    ranges.push(PageRange::between(start, VirtAddr(USER_END - PAGE_SIZE)));
    ranges.retain(|range| !range.is_empty());
    ranges
}

/// Splits ranges into batches of at most `pages` pages, splitting ranges where needed.
pub fn batches(ranges: &[PageRange], pages: u64) -> Vec<Vec<PageRange>> {
    let mut batches = Vec::new();
    let mut batch: Vec<PageRange> = Vec::new();
    let mut room = pages;
    for range in ranges {
        let mut rest = *range;
        while !rest.is_empty() {
            let part = PageRange::new(rest.start, rest.pages.min(room));
            batch.push(part);
            rest = PageRange::between(part.end(), rest.end());
            room -= part.pages;
            if room == 0 {
                batches.push(std::mem::take(&mut batch));
                room = pages;
            }
        }
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_every_page_once_and_no_more_than_allowed() {
        let range = |start: u64, pages| PageRange::new(VirtAddr(start << 12), pages);
        let ranges = [range(1, 3), range(10, 6), range(20, 1)];
        let split = batches(&ranges, 4);
        assert_eq!(
            split,
            [vec![range(1, 3), range(10, 1)], vec![range(11, 4)], vec![range(15, 1), range(20, 1)]]
        );
        assert!(batches(&[], 4).is_empty());
    }
}
