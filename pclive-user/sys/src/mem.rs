//! Reading and writing the memory of other processes, through `/proc/PID/mem`.
//!
//! Not by `process_vm_readv(2)`, although that copies once less: it pins what it reads, and to pin a page that a process
//! shares with its parent or child since a `fork(2)` the kernel first makes a copy of it (`FAULT_FLAG_UNSHARE`, Linux 5.19).
//! All of that memory is then there twice. Worse, the copy is not marked dirty (`wp_page_copy` in mm/memory.c, as of Linux
//! 6.18): if the process forks again and the child gives the memory back by `MADV_FREE`, the kernel takes the page to be
//! worthless to both, and what the process had in it is lost with the next reclaim.
//!
//! It also reaches what the process itself must not read or write now (`FOLL_FORCE`). Since Linux 6.12 a kernel may be built
//! or booted to allow that to tracers only, or to nobody ([`ignores_protection`]): what a process has protected from itself
//! would seem to be missing there.

use crate::{Error, Result};
use memmap2::{MmapMut, UncheckedAdvice};
use nix::errno::Errno;
use pclive_wire::{HostPid, PAGE_SIZE, PageRange, VirtAddr};
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// The memory of one process.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: HostPid,
    mem: File,
}

impl ProcessMemory {
    /// Opens the memory of `pid`. The handle belongs to the address space it has now: open again after an exec.
    pub fn open(pid: HostPid) -> Result<Self> {
        let path = format!("/proc/{pid}/mem");
        let mem = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|source| Error::Open { path: path.into(), source })?;
        Ok(Self { pid, mem })
    }

    /// Whether the address space is no more: its processes have ended, or execute other programs.
    pub fn is_gone(&self) -> bool {
        matches!(self.mem.read_at(&mut [0], PAGE_SIZE), Ok(0))
    }

    /// Fills `buffer` with the bytes at `addr`, whatever the mapping's protection (`FOLL_FORCE`).
    pub fn read(&self, addr: VirtAddr, buffer: &mut [u8]) -> Result<()> {
        self.mem.read_exact_at(buffer, addr.0).map_err(|source| Error::Memory {
            access: "read",
            pid: self.pid,
            addr,
            source,
        })
    }

    /// Writes `bytes` at `addr`, whatever the mapping's protection: breaks copy-on-write of private mappings.
    pub fn write(&self, addr: VirtAddr, bytes: &[u8]) -> Result<()> {
        self.mem.write_all_at(bytes, addr.0).map_err(|source| Error::Memory {
            access: "write",
            pid: self.pid,
            addr,
            source,
        })
    }

    /// Like [`ProcessMemory::write`], up to the first page that cannot be written; returns the bytes written, at least
    /// one page.
    pub fn write_some(&self, addr: VirtAddr, bytes: &[u8]) -> Result<usize> {
        loop {
            match self.mem.write_at(bytes, addr.0) {
                Ok(written) => return Ok(written),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Memory { access: "write", pid: self.pid, addr, source }),
            }
        }
    }

    /// Reads the pages of `ranges`, one after the other, into `buffer`. Returns the pages that could not be read because
    /// they were unmapped meanwhile, or the address space is no more (indices into the sequence of all pages); their bytes
    /// in `buffer` are undefined.
    pub fn read_pages(&self, ranges: &[PageRange], buffer: &mut [u8]) -> Result<Vec<usize>> {
        const PAGE: usize = PAGE_SIZE as usize;
        let mut missing = Vec::new();
        let mut done = 0;
        for range in ranges {
            let end = done + range.bytes() as usize;
            let mut addr = range.start;
            while done < end {
                let read = match self.mem.read_at(&mut buffer[done..end], addr.0) {
                    // No address space any more.
                    Ok(0) => 0,
                    // Up to the first page that cannot be read.
                    Ok(bytes) => bytes / PAGE * PAGE,
                    Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                    Err(e) if e.raw_os_error() == Some(libc::EIO) => 0,
                    Err(source) => return Err(Error::Memory { access: "read", pid: self.pid, addr, source }),
                };
                if read == 0 {
                    missing.push(done / PAGE);
                }
                let step = read.max(PAGE);
                done += step;
                addr = addr.offset(step as u64);
            }
        }
        Ok(missing)
    }
}

/// Gives pages of a mapping back to the kernel (`MADV_DONTNEED`): those of anonymous memory are absent, and read as zero.
pub fn give_back(map: &mut MmapMut, pages: Range<usize>) -> std::io::Result<()> {
    const PAGE: usize = PAGE_SIZE as usize;
    // SAFETY: whoever has the mapping exclusively has no references into it that could see its contents change, and any
    // contents are valid bytes. That the range is one of the mapping memmap2 checks.
    unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, pages.start * PAGE, pages.len() * PAGE) }
}

/// Has a forked child find the mapping zeroed (`MADV_WIPEONFORK`, Linux 4.14).
pub fn wipe_on_fork(map: &MmapMut) -> std::io::Result<()> {
    // SAFETY: the range is one mapping of our own, whose contents the advice leaves alone in this process.
    let advised = unsafe { libc::madvise(map.as_ptr().cast_mut().cast(), map.len(), libc::MADV_WIPEONFORK) };
    Ok(Errno::result(advised).map(drop)?)
}

/// Locks the pages of the mapping as they are touched (`mlock2(2)`, Linux 4.4).
pub fn lock_on_fault(map: &MmapMut) -> std::io::Result<()> {
    // SAFETY: the range is one mapping of our own, whose contents the call leaves alone.
    let locked = unsafe { libc::mlock2(map.as_ptr().cast(), map.len(), libc::MLOCK_ONFAULT) };
    Ok(Errno::result(locked).map(drop)?)
}

/// Whether memory is accessible here whatever its protection is (`proc_mem_foll_force` in fs/proc/base.c).
///
/// # Errors
/// When that cannot be tried with memory of our own.
pub fn ignores_protection() -> Result<bool> {
    let failed = |source| Error::Memory { access: "map", pid: HostPid(0), addr: VirtAddr(0), source };
    let page = MmapMut::map_anon(PAGE_SIZE as usize).and_then(MmapMut::make_read_only).map_err(failed)?;
    // As it is already.
    let written =
        ProcessMemory::open(HostPid(std::process::id() as i32))?.write(VirtAddr(page.as_ptr() as u64), &[0]);
    match written {
        Ok(()) => Ok(true),
        Err(Error::Memory { source, .. }) if source.raw_os_error() == Some(libc::EIO) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::process::Stdio;

    fn me() -> HostPid {
        HostPid(std::process::id() as i32)
    }

    /// An anonymous mapping of `pages` pages, page `i` filled with `i + 1`.
    fn mapping(pages: usize) -> &'static mut [u8] {
        let len = pages * PAGE_SIZE as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh anonymous mapping that is never unmapped as a whole.
        let bytes = unsafe {
            let p = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(p, libc::MAP_FAILED);
            std::slice::from_raw_parts_mut(p.cast::<u8>(), len)
        };
        for (i, page) in bytes.chunks_exact_mut(PAGE_SIZE as usize).enumerate() {
            page.fill(i as u8 + 1);
        }
        bytes
    }

    #[test]
    fn scattered_pages_are_read_in_order_and_unmapped_ones_are_named() {
        let memory = ProcessMemory::open(me()).unwrap();
        let bytes = mapping(6);
        let base = VirtAddr(bytes.as_ptr() as u64);
        let page = |i: u64| base.offset(i * PAGE_SIZE);
        let empty = nix::sys::memfd::memfd_create(c"empty", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
        // Behind the end of a file there is no page, and in a hole another test's mapping might be.
        // SAFETY: pages 2 (no access) and 4 (gone) are not touched through `bytes` again.
        unsafe {
            assert_eq!(libc::mprotect(page(2).0 as *mut _, 4096, libc::PROT_NONE), 0);
            let gone = page(4).0 as *mut _;
            assert_eq!(libc::mmap(gone, 4096, libc::PROT_READ, flags, empty.as_raw_fd(), 0), gone);
        }
        let ranges = [PageRange::new(page(5), 1), PageRange::new(page(0), 5)];
        let mut buffer = vec![0; 6 * 4096];
        let missing = memory.read_pages(&ranges, &mut buffer).unwrap();
        assert_eq!(missing, [5], "page 4 comes sixth");
        let firsts: Vec<u8> = buffer.chunks_exact(4096).map(|page| page[0]).collect();
        assert_eq!(firsts[..5], [6, 1, 2, 3, 4], "a page without access is read all the same");
    }

    /// See the module: it is the pin that does the harm.
    #[test]
    fn reading_harms_no_page_that_is_shared_with_a_child() {
        const PAGES: usize = 64;
        let bytes = mapping(PAGES);
        let (start, len) = (bytes.as_mut_ptr().cast(), bytes.len());
        let memory = ProcessMemory::open(me()).unwrap();
        // SAFETY: a child of a process with threads may make system calls; this one makes no others.
        let in_child = |calls: &dyn Fn()| unsafe {
            let child = libc::fork();
            if child == 0 {
                calls();
                libc::_exit(0);
            }
            assert!(child > 0, "fork");
            child
        };
        let sharing = in_child(&|| {
            // SAFETY: pause has no preconditions.
            unsafe { libc::pause() };
        });
        let range = PageRange::new(VirtAddr(bytes.as_ptr() as u64), PAGES as u64);
        let missing = memory.read_pages(&[range], &mut vec![0; len]);
        // SAFETY: ends a child of ours, waits for children of ours, and gives advice on memory of ours that is not touched
        // meanwhile. Only the child drops its contents, and its own ones.
        unsafe {
            libc::kill(sharing, libc::SIGKILL);
            libc::waitpid(sharing, std::ptr::null_mut(), 0);
            let giving_back = in_child(&|| {
                libc::madvise(start, len, libc::MADV_FREE);
            });
            libc::waitpid(giving_back, std::ptr::null_mut(), 0);
            assert_eq!(libc::madvise(start, len, libc::MADV_PAGEOUT), 0);
        }
        assert_eq!(missing.unwrap(), []);
        let lost = bytes.chunks_exact(PAGE_SIZE as usize).filter(|page| page[0] == 0).count();
        assert_eq!(lost, 0);
    }

    #[test]
    fn an_address_space_is_gone_when_its_process_is() {
        let mut cat = std::process::Command::new("cat");
        let mut child = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // Before it answers it may still be in the memory of this process.
        child.stdin.as_ref().unwrap().write_all(b"x").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let memory = ProcessMemory::open(HostPid(child.id() as i32)).unwrap();
        assert!(!memory.is_gone());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(memory.is_gone());
        assert_eq!(
            memory.read_pages(&[PageRange::new(VirtAddr(PAGE_SIZE), 2)], &mut [0; 8192]).unwrap(),
            [0, 1]
        );
    }

    #[test]
    fn writing_ignores_the_mappings_protection() {
        let memory = ProcessMemory::open(me()).unwrap();
        let bytes = mapping(1);
        let base = VirtAddr(bytes.as_ptr() as u64);
        // SAFETY: the mapping stays readable; it is written only through /proc/self/mem.
        unsafe { assert_eq!(libc::mprotect(base.0 as *mut _, 4096, libc::PROT_READ), 0) };
        memory.write(base, b"new").unwrap();
        assert_eq!(&bytes[..4], b"new\x01");
    }
}
