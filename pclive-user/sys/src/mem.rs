//! Reading and writing the memory of other processes.

use crate::{Error, Result, check};
use nix::errno::Errno;
use pclive_wire::{HostPid, PAGE_SIZE, PageRange, VirtAddr};
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;

/// Most ranges that one `process_vm_readv(2)` takes (`UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;

/// The memory of one process: `process_vm_readv(2)`, `process_vm_writev(2)` (Linux 3.2), and `/proc/PID/mem` for what
/// they refuse.
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
    /// they were unmapped meanwhile, or the process has ended (indices into the sequence of all pages); their bytes in `buffer` are undefined.
    pub fn read_pages(&self, ranges: &[PageRange], buffer: &mut [u8]) -> Result<Vec<usize>> {
        let total: u64 = ranges.iter().map(|r| r.bytes()).sum();
        assert!(buffer.len() as u64 >= total, "buffer too small for {total} bytes");
        let mut missing = Vec::new();
        let mut done = 0u64;
        while done < total {
            let remote = remote_iovecs(ranges, done);
            let wanted: usize = remote.iter().map(|v| v.iov_len).sum();
            let window = &mut buffer[done as usize..done as usize + wanted];
            let local = libc::iovec { iov_base: window.as_mut_ptr().cast(), iov_len: wanted };
            // SAFETY: `local` covers `window`, which is ours and long enough; the remote side is the kernel's to check.
            let got = unsafe {
                libc::process_vm_readv(self.pid.0, &local, 1, remote.as_ptr(), remote.len() as u64, 0)
            };
            match check("process_vm_readv", self.pid, got as i64) {
                Ok(bytes) if bytes as u64 >= PAGE_SIZE => done += bytes as u64 / PAGE_SIZE * PAGE_SIZE,
                Ok(_) => self.read_page_forced(ranges, &mut done, buffer, &mut missing)?,
                Err(e) if e.errno() == Some(Errno::EFAULT) => {
                    self.read_page_forced(ranges, &mut done, buffer, &mut missing)?
                }
                Err(e) if e.errno() == Some(Errno::ESRCH) => {
                    missing.extend((done / PAGE_SIZE) as usize..(total / PAGE_SIZE) as usize);
                    done = total;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(missing)
    }

    /// Reads the page at `done` through `/proc/PID/mem` (it may be unreadable to the process itself), or notes it missing.
    fn read_page_forced(
        &self,
        ranges: &[PageRange],
        done: &mut u64,
        buffer: &mut [u8],
        missing: &mut Vec<usize>,
    ) -> Result<()> {
        let addr = address_at(ranges, *done);
        let page = &mut buffer[*done as usize..(*done + PAGE_SIZE) as usize];
        match self.read(addr, page) {
            Ok(()) => {}
            // Unmapped, or no address space any more.
            Err(Error::Memory { source, .. })
                if source.raw_os_error() == Some(libc::EIO) || source.kind() == ErrorKind::UnexpectedEof =>
            {
                missing.push((*done / PAGE_SIZE) as usize);
            }
            Err(e) => return Err(e),
        }
        *done += PAGE_SIZE;
        Ok(())
    }
}

fn remote_iovecs(ranges: &[PageRange], mut skip: u64) -> Vec<libc::iovec> {
    let mut iovecs = Vec::with_capacity(ranges.len().min(MAX_IOVECS));
    for range in ranges {
        if skip >= range.bytes() {
            skip -= range.bytes();
            continue;
        }
        if iovecs.len() == MAX_IOVECS {
            break;
        }
        iovecs.push(libc::iovec {
            iov_base: (range.start.0 + skip) as *mut libc::c_void,
            iov_len: (range.bytes() - skip) as usize,
        });
        skip = 0;
    }
    iovecs
}

fn address_at(ranges: &[PageRange], mut offset: u64) -> VirtAddr {
    for range in ranges {
        if offset < range.bytes() {
            return range.start.offset(offset);
        }
        offset -= range.bytes();
    }
    unreachable!("offset lies inside the ranges")
}

#[cfg(test)]
mod tests {
    use super::*;

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
        // SAFETY: pages 2 (no access) and 4 (gone) are not touched through `bytes` again.
        unsafe {
            assert_eq!(libc::mprotect(page(2).0 as *mut _, 4096, libc::PROT_NONE), 0);
            assert_eq!(libc::munmap(page(4).0 as *mut _, 4096), 0);
        }
        let ranges = [PageRange::new(page(5), 1), PageRange::new(page(0), 5)];
        let mut buffer = vec![0; 6 * 4096];
        let missing = memory.read_pages(&ranges, &mut buffer).unwrap();
        assert_eq!(missing, [5], "page 4 comes sixth");
        let firsts: Vec<u8> = buffer.chunks_exact(4096).map(|page| page[0]).collect();
        assert_eq!(firsts[..5], [6, 1, 2, 3, 4], "a page without access is read all the same");
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
