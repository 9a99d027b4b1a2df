//! Files that are opened by their path: regular files, directories, devices.
//!
//! The path comes from the source, so it is resolved like any path *in* the container (`RESOLVE_IN_ROOT`: no way out by
//! `..`, symbolic links or magic links) and opened as a bare handle first. Only when that is what it should be is it
//! opened for real: opening a FIFO would block, opening a device has effects.

use super::error::FileError;
use super::flags;
use crate::capture::files::is_stateless;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::sys::statfs::{
    CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, PROC_SUPER_MAGIC, SYSFS_MAGIC, TRACEFS_MAGIC,
    fstatfs,
};
use nix::unistd::{Whence, lseek};
use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

/// How often a lookup is tried again when a rename somewhere made the kernel give up (`EAGAIN`, openat2(2)).
const LOOKUPS: usize = 8;

/// A regular file, at `offset`.
pub(super) fn regular(
    root: &OwnedFd,
    path: &[u8],
    flags: u32,
    offset: u64,
    size: u64,
) -> Result<OwnedFd, FileError> {
    let handle = typed(root, path, SFlag::S_IFREG, "regular file")?;
    let found = handle.stat.st_size as u64;
    if found != size {
        return Err(FileError::Size { path: show(path), expected: size, found });
    }
    let writable = flags as i32 & libc::O_ACCMODE != libc::O_RDONLY;
    if writable && is_kernel_file(&handle.fd).map_err(FileError::call("fstatfs", show(path)))? {
        return Err(FileError::KernelFile { path: show(path) });
    }
    let file = reopen(&handle.fd, path, flags)?;
    seek(&file, path, offset)?;
    Ok(file)
}

/// A directory, at a `getdents(2)` position.
pub(super) fn directory(root: &OwnedFd, path: &[u8], flags: u32, offset: u64) -> Result<OwnedFd, FileError> {
    let handle = typed(root, path, SFlag::S_IFDIR, "directory")?;
    let directory = reopen(&handle.fd, path, flags)?;
    seek(&directory, path, offset)?;
    Ok(directory)
}

/// A character device without state.
pub(super) fn device(root: &OwnedFd, path: &[u8], flags: u32, rdev: u64) -> Result<OwnedFd, FileError> {
    let handle = typed(root, path, SFlag::S_IFCHR, "device")?;
    if handle.stat.st_rdev != rdev || !is_stateless(rdev) {
        return Err(FileError::Type { path: show(path), expected: "device" });
    }
    reopen(&handle.fd, path, flags)
}

/// A bare handle on something in the container.
struct Handle {
    fd: OwnedFd,
    stat: FileStat,
}

/// Looks up `path`, which must be a file of type `type_`.
fn typed(root: &OwnedFd, path: &[u8], type_: SFlag, expected: &'static str) -> Result<Handle, FileError> {
    let fd = lookup(root, path, OFlag::O_PATH)?;
    let stat = fstat(&fd).map_err(FileError::call("fstat", show(path)))?;
    if SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT) != type_ {
        return Err(FileError::Type { path: show(path), expected });
    }
    Ok(Handle { fd, stat })
}

/// Opens `path` in the container with `flags`.
pub(super) fn lookup(root: &OwnedFd, path: &[u8], flags: OFlag) -> Result<OwnedFd, FileError> {
    let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let mut result = Err(Errno::EAGAIN);
    for _ in 0..LOOKUPS {
        result = openat2(root, OsStr::from_bytes(path), how);
        if !matches!(result, Err(Errno::EAGAIN)) {
            break;
        }
    }
    result.map_err(FileError::call("openat2", show(path)))
}

fn reopen(handle: &OwnedFd, path: &[u8], flags: u32) -> Result<OwnedFd, FileError> {
    flags::reopen(handle.as_raw_fd(), flags).map_err(FileError::call("open", show(path)))
}

fn seek(file: &OwnedFd, path: &[u8], offset: u64) -> Result<(), FileError> {
    if offset != 0 {
        lseek(file, offset as i64, Whence::SeekSet).map_err(FileError::call("lseek", show(path)))?;
    }
    Ok(())
}

/// Whether a file is an interface of the kernel. Those judge by who opened them, which here is pclive.
fn is_kernel_file(file: &OwnedFd) -> nix::Result<bool> {
    let type_ = fstatfs(file)?.filesystem_type();
    Ok([PROC_SUPER_MAGIC, SYSFS_MAGIC, CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, TRACEFS_MAGIC]
        .contains(&type_))
}

/// A path for people.
pub(super) fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
