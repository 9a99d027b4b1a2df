//! Reads descriptor tables: `/proc/PID/fd` and `/proc/PID/fdinfo`.
//!
//! Four system calls for each descriptor (readlink, open, read, close): this runs within the blackout.

use super::error::FileError;
use super::fdinfo::FdInfo;
use crate::capture::tree::has_ended;
use crate::capture::{Access, SourceProcess};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, readlinkat};
use nix::sys::stat::Mode;
use nix::unistd::read;
use pclive_wire::{HostPid, NsPid};
use std::fmt;
use std::os::fd::{OwnedFd, RawFd};
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
    /// What `/proc/PID/fd/FD` points to.
    pub link: Vec<u8>,
    /// What `/proc/PID/fdinfo/FD` says.
    pub info: FdInfo,
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
}

impl TableReader {
    pub fn new(access: Access) -> Self {
        // An fdinfo file is a few hundred bytes, unless it lists an epoll set.
        Self { access, buffer: vec![0; 4096] }
    }

    /// All descriptors of a process, by number. While the container runs, those that are closed meanwhile are left out,
    /// and a process that ends meanwhile has none.
    pub fn read(&mut self, index: usize, process: &SourceProcess) -> Result<Vec<OpenFd>, FileError> {
        match self.read_table(index, process) {
            Err(_) if self.access == Access::Survey && has_ended(process.pid) => Ok(Vec::new()),
            result => result,
        }
    }

    fn read_table(&mut self, index: usize, process: &SourceProcess) -> Result<Vec<OpenFd>, FileError> {
        let directory = |name: &str| {
            let path = format!("/proc/{}/{name}", process.pid);
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            open(path.as_str(), flags, Mode::empty()).map_err(FileError::call("open", &path))
        };
        let (links, infos) = (directory("fd")?, directory("fdinfo")?);
        let numbers = numbers(process.pid)?;
        let mut table = Vec::with_capacity(numbers.len());
        for fd in numbers {
            let slot = Slot { process: index, pid: process.pid, ns_pid: process.ns_pid, fd };
            match self.read_one(&links, &infos, slot) {
                Ok(open_fd) => table.push(open_fd),
                Err(FileError::Call { errno: Errno::ENOENT, .. }) if self.access == Access::Survey => {}
                Err(error) => return Err(error),
            }
        }
        Ok(table)
    }

    fn read_one(&mut self, links: &OwnedFd, infos: &OwnedFd, slot: Slot) -> Result<OpenFd, FileError> {
        let name = slot.fd.to_string();
        let link = readlinkat(links, name.as_str()).map_err(FileError::call("readlink", &slot))?.into_vec();
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = openat(infos, name.as_str(), flags, Mode::empty())
            .map_err(FileError::call("open fdinfo", &slot))?;
        let text = self.read_all(&file).map_err(FileError::call("read fdinfo", &slot))?;
        Ok(OpenFd { slot, link, info: FdInfo::parse(text, &slot)? })
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

/// The open descriptor numbers of a process, sorted.
pub(super) fn numbers(pid: HostPid) -> Result<Vec<RawFd>, FileError> {
    let path = format!("/proc/{pid}/fd");
    let proc_error = |error| FileError::Proc { path: path.clone(), error };
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(&path).map_err(proc_error)? {
        let name = entry.map_err(proc_error)?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}
