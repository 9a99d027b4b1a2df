//! Status flags: which of the source's are asked for when a file is opened, which are set afterwards.

use super::error::FileError;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// What `F_SETFL` can change, except `O_ASYNC`, which needs an owner.
const SETTABLE: OFlag =
    OFlag::O_APPEND.union(OFlag::O_NONBLOCK).union(OFlag::O_DIRECT).union(OFlag::O_NOATIME);

/// What is passed to `open(2)`. Nothing here creates, truncates or follows: whatever else a peer asks for is dropped.
const OPENABLE: OFlag = OFlag::O_ACCMODE.union(OFlag::O_DSYNC).union(OFlag::O_SYNC).union(SETTABLE);

/// Opens the file behind `fd` once more: a description of its own, with the source's flags.
pub(super) fn reopen(fd: RawFd, flags: u32) -> nix::Result<OwnedFd> {
    let flags = OFlag::from_bits_truncate(flags as i32) & OPENABLE;
    open(format!("/proc/self/fd/{fd}").as_str(), flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY, Mode::empty())
}

/// Gives a description that was made without flags those of the source.
pub(super) fn set(fd: BorrowedFd<'_>, flags: u32) -> Result<(), FileError> {
    let flags = OFlag::from_bits_truncate(flags as i32) & SETTABLE;
    if !flags.is_empty() {
        fcntl(fd, FcntlArg::F_SETFL(flags)).map_err(FileError::call("fcntl(F_SETFL)", fd.as_raw_fd()))?;
    }
    Ok(())
}

/// Makes a description blocking or not, and leaves its other flags alone.
pub(super) fn set_nonblocking(fd: impl AsFd, source: u32) -> nix::Result<()> {
    let wanted = OFlag::from_bits_truncate(source as i32) & OFlag::O_NONBLOCK;
    let now = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    if now & OFlag::O_NONBLOCK != wanted {
        fcntl(&fd, FcntlArg::F_SETFL((now - OFlag::O_NONBLOCK) | wanted))?;
    }
    Ok(())
}
