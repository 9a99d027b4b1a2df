//! Reads descriptor tables: `/proc/PID/fd` and `/proc/PID/fdinfo`.
//!
//! Four system calls for each descriptor (readlink, open, read, close), some 12 µs: this runs within the blackout. Of sockets,
//! of which there may be thousands, a duplicate tells all that matters, if the process has said itself what its
//! descriptors are: three calls, 2 µs. That a socket is locked (`flock(2)` works on any file) only fdinfo says: so it is seen
//! in a survey, and not behind it.

use super::error::FileError;
use super::fdinfo::FdInfo;
use crate::capture::descriptors::Descriptor;
use crate::capture::tree::has_ended;
use crate::capture::{Access, SourceProcess, proc};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open, openat, readlinkat};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::read;
use pclive_sys::pidfd::pidfd_getfd;
use pclive_wire::{HostPid, NsPid};
use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;

/// A descriptor number in a process; says so in errors and obstacles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// Index of the process in the slice that capture was given.
    pub process: usize,
    /// The process on this host.
    pub pid: HostPid,
    /// The process in the container.
    pub ns_pid: NsPid,
    /// Descriptor number.
    pub fd: RawFd,
}

impl Slot {
    /// A duplicate of the descriptor in this process.
    pub fn duplicate(&self, process: &SourceProcess) -> Result<OwnedFd, FileError> {
        pidfd_getfd(process.pidfd.as_fd(), self.fd).map_err(FileError::call("pidfd_getfd", self))
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fd {} of process {}", self.fd, self.ns_pid)
    }
}

/// One descriptor of one process.
#[derive(Debug)]
pub(super) struct OpenFd {
    /// Where it is.
    pub slot: Slot,
    /// What `/proc/PID/fd/FD` points to. Of a socket it may be made up from its inode.
    pub link: Vec<u8>,
    /// What `/proc/PID/fdinfo/FD` says. Of a socket it may be [`FdInfo::of_socket`].
    pub info: FdInfo,
    /// A duplicate, if there was need of one.
    pub duplicate: RefCell<Option<OwnedFd>>,
}

impl OpenFd {
    /// `FD_CLOEXEC`, which fdinfo shows among the status flags.
    pub fn cloexec(&self) -> bool {
        self.info.flags & libc::O_CLOEXEC as u32 != 0
    }
}

/// Reads tables, keeping a buffer from one descriptor to the next.
pub(super) struct TableReader {
    access: Access,
    buffer: Vec<u8>,
    /// Sockets that there is a duplicate of: many processes may have inherited the same ones.
    duplicated: HashSet<u64>,
}

impl TableReader {
    pub fn new(access: Access) -> Self {
        // An fdinfo file is a few hundred bytes, unless it lists an epoll set.
        Self { access, buffer: vec![0; 4096], duplicated: HashSet::new() }
    }

    /// All descriptors of a process, by number. While the container runs, those that are closed meanwhile are left out,
    /// and a process that ends meanwhile has none. Those of a process that stands still may be `known`.
    pub fn read(
        &mut self,
        index: usize,
        process: &SourceProcess,
        known: Option<&[Descriptor]>,
    ) -> Result<Vec<OpenFd>, FileError> {
        match self.read_table(index, process, known) {
            Err(_) if self.access == Access::Survey && has_ended(process.pid) => Ok(Vec::new()),
            result => result,
        }
    }

    fn read_table(
        &mut self,
        index: usize,
        process: &SourceProcess,
        known: Option<&[Descriptor]>,
    ) -> Result<Vec<OpenFd>, FileError> {
        let directory = |name: &str| {
            let path = format!("/proc/{}/{name}", process.pid);
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            open(path.as_str(), flags, Mode::empty()).map_err(FileError::call("open", &path))
        };
        let (links, infos) = (directory("fd")?, directory("fdinfo")?);
        let unknown = |fd| Descriptor { fd, cloexec: false, is_socket: false };
        let descriptors = match known {
            Some(known) => known.to_vec(),
            None => proc::descriptors(process.pid)?.into_iter().map(unknown).collect(),
        };
        let mut table = Vec::with_capacity(descriptors.len());
        for Descriptor { fd, cloexec, is_socket } in descriptors {
            let slot = Slot { process: index, pid: process.pid, ns_pid: process.ns_pid, fd };
            let read = match is_socket {
                true => self.socket(slot, process, cloexec),
                false => self.read_one(&links, &infos, slot),
            };
            match read {
                Ok(open_fd) => table.push(open_fd),
                Err(FileError::Call { errno: Errno::ENOENT, .. }) if self.access == Access::Survey => {}
                Err(error) => return Err(error),
            }
        }
        Ok(table)
    }

    /// A descriptor of a socket, of which procfs need not be asked; `cloexec` is its `FD_CLOEXEC`.
    fn socket(&mut self, slot: Slot, process: &SourceProcess, cloexec: bool) -> Result<OpenFd, FileError> {
        let duplicate = slot.duplicate(process)?;
        let stat = fstat(&duplicate).map_err(FileError::call("fstat", &slot))?;
        let flags = fcntl(&duplicate, FcntlArg::F_GETFL).map_err(FileError::call("fcntl(F_GETFL)", &slot))?;
        let flags = flags | if cloexec { libc::O_CLOEXEC } else { 0 };
        let (link, info) = (super::socket::link(stat.st_ino), FdInfo::of_socket(flags as u32));
        let duplicate = RefCell::new(self.duplicated.insert(stat.st_ino).then_some(duplicate));
        Ok(OpenFd { slot, link, info, duplicate })
    }

    fn read_one(&mut self, links: &OwnedFd, infos: &OwnedFd, slot: Slot) -> Result<OpenFd, FileError> {
        let name = slot.fd.to_string();
        let link = readlinkat(links, name.as_str()).map_err(FileError::call("readlink", &slot))?.into_vec();
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = openat(infos, name.as_str(), flags, Mode::empty())
            .map_err(FileError::call("open fdinfo", &slot))?;
        let text = self.read_all(&file).map_err(FileError::call("read fdinfo", &slot))?;
        Ok(OpenFd { slot, link, info: FdInfo::parse(text, &slot)?, duplicate: RefCell::default() })
    }

    /// Reads an fdinfo file whole. The kernel makes the text in one go (`single_open`), so a short read is the end.
    fn read_all(&mut self, file: &OwnedFd) -> Result<String, Errno> {
        let mut length = 0;
        loop {
            let count = read(file, &mut self.buffer[length..])?;
            length += count;
            if length < self.buffer.len() {
                return Ok(String::from_utf8_lossy(&self.buffer[..length]).into_owned());
            }
            self.buffer.resize(2 * length, 0);
        }
    }
}

/// What `/proc/PID/fd/FD` points to now; `None` if the descriptor is closed.
pub(super) fn link_of(slot: Slot) -> Option<Vec<u8>> {
    let link = std::fs::read_link(format!("/proc/{}/fd/{}", slot.pid, slot.fd)).ok()?;
    Some(link.into_os_string().into_vec())
}
