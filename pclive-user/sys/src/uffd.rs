//! `userfaultfd(2)` on the address space of another process: write tracking at the source, page placement at the
//! destination.
//!
//! Own ioctls rather than the `userfaultfd` crate: version 0.9 of it neither knows `UFFD_FEATURE_WP_ASYNC` nor adopts a
//! descriptor that was made in another process, and turns `EAGAIN` of `UFFDIO_COPY` into a huge byte count.

use crate::{Error, Result, check, check_range};
use nix::errno::Errno;
use pclive_wire::{HostPid, PAGE_SIZE, PageRange, VirtAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Argument of `userfaultfd(2)`: close-on-exec, and without the right to handle faults that the kernel makes for a system
/// call (which needs no capability; Linux 5.11). Tracking sees those writes all the same.
pub const CREATE_FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | UFFD_USER_MODE_ONLY;
const UFFD_USER_MODE_ONLY: u64 = 1;

const UFFD_API: u64 = 0xaa;

/// Feature sets for the handshake (`UFFD_FEATURE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    const WP_UNPOPULATED: u64 = 1 << 13;
    const WP_ASYNC: u64 = 1 << 15;
    /// Write tracking: the kernel resolves write-protect faults by itself (`WP_ASYNC`, Linux 6.7), and pages that are not
    /// populated can be protected too (`WP_UNPOPULATED`, Linux 6.4).
    pub const TRACKING: Self = Self(Self::WP_UNPOPULATED | Self::WP_ASYNC);
    /// Placement of pages only.
    pub const PLACEMENT: Self = Self(0);
}

/// What a range is registered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Faults on absent pages (`UFFDIO_REGISTER_MODE_MISSING`).
    Missing = 1,
    /// Writes to protected pages (`UFFDIO_REGISTER_MODE_WP`).
    WriteProtect = 2,
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

const _: () = assert!(size_of::<Api>() == 24 && size_of::<Register>() == 32 && size_of::<Copy>() == 40);

mod ioctl {
    use super::{Api, Copy, Register};
    nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, Api);
    nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, Register);
    nix::ioctl_readwrite!(uffdio_copy, 0xaa, 0x03, Copy);
}
const _: () = assert!(nix::request_code_readwrite!(0xaa, 0x03, size_of::<Copy>()) as u64 == 0xc028_aa03);

/// How far [`Uffd::copy`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// Every page was absent and is now there.
    All,
    /// The first `bytes` were placed; the page after them was present already.
    Present {
        /// Bytes placed before it.
        bytes: u64,
    },
}

/// A userfaultfd whose faults are those of the process that made it.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    pid: HostPid,
}

impl Uffd {
    /// A userfaultfd of pclive's own address space.
    pub fn of_self(features: Features) -> Result<Self> {
        let pid = HostPid(std::process::id() as i32);
        // SAFETY: the call takes no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, CREATE_FLAGS) };
        let fd = check("userfaultfd", pid, fd)?;
        // SAFETY: the kernel has just given this descriptor to us, and to nobody else.
        Self::adopt(unsafe { OwnedFd::from_raw_fd(fd as i32) }, pid, features)
    }

    /// Takes over a userfaultfd that `pid` has just made, and shakes hands.
    ///
    /// Fails with `EINVAL` where the kernel lacks a feature.
    pub fn adopt(fd: OwnedFd, pid: HostPid, features: Features) -> Result<Self> {
        let mut api = Api { api: UFFD_API, features: features.0, ioctls: 0 };
        // SAFETY: `api` is a complete struct uffdio_api.
        unsafe { ioctl::uffdio_api(fd.as_raw_fd(), &mut api) }.map_err(|errno| Error::Call {
            call: "UFFDIO_API",
            pid,
            errno,
        })?;
        Ok(Self { fd, pid })
    }

    /// The process whose address space this is.
    pub fn pid(&self) -> HostPid {
        self.pid
    }

    /// Registers a range of mapped memory; registering again is harmless. `EINVAL` for mappings that cannot be.
    pub fn register(&self, range: PageRange, mode: Mode) -> Result<()> {
        let mut arg = Register {
            range: Range { start: range.start.0, len: range.bytes() },
            mode: mode as u64,
            ioctls: 0,
        };
        // SAFETY: `arg` is a complete struct uffdio_register.
        let result = unsafe { ioctl::uffdio_register(self.fd.as_raw_fd(), &mut arg) };
        check_range("UFFDIO_REGISTER", range, result.unwrap_or(-1)).map(drop)
    }

    /// Places `pages` (whole pages) at `start`, which must lie in registered memory, up to the first page that is present.
    /// The kernel may stop half-way (`EAGAIN`, when mappings change): the rest is tried again.
    pub fn copy(&self, start: VirtAddr, pages: &[u8]) -> Result<Placed> {
        assert!((pages.len() as u64).is_multiple_of(PAGE_SIZE), "whole pages only");
        let mut done = 0u64;
        while done < pages.len() as u64 {
            let rest = &pages[done as usize..];
            let mut arg = Copy {
                dst: start.0 + done,
                src: rest.as_ptr() as u64,
                len: rest.len() as u64,
                mode: 0,
                copied: 0,
            };
            // SAFETY: `arg` is a complete struct uffdio_copy; `src` and `len` describe `rest`, which is only read.
            match unsafe { ioctl::uffdio_copy(self.fd.as_raw_fd(), &mut arg) } {
                Ok(_) => return Ok(Placed::All),
                Err(Errno::EEXIST) => return Ok(Placed::Present { bytes: done }),
                // A partial copy says EAGAIN with the count, or with -EAGAIN in its place when nothing was copied.
                Err(Errno::EAGAIN) if arg.copied > 0 => done += arg.copied as u64,
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => {
                    let range = PageRange::new(start, pages.len() as u64 / PAGE_SIZE);
                    return Err(Error::Range { call: "UFFDIO_COPY", range, errno });
                }
            }
        }
        Ok(Placed::All)
    }
}
