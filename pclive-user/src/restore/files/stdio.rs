//! Standard streams: what the destination's runtime gave the container takes the place of what the source's gave it.

use super::error::FileError;
use super::flags;
use std::os::fd::OwnedFd;

pub(super) fn open(stream: u8, flags: u32, stdio: &[OwnedFd; 3]) -> Result<OwnedFd, FileError> {
    let own = stdio.get(usize::from(stream)).ok_or(FileError::Stream { stream })?;
    let object = || format!("standard stream {stream}");
    // A duplicate shares the runtime's description, as it does at the source; a program counts on not being blocked there.
    flags::set_nonblocking(own, flags).map_err(FileError::call("fcntl(F_SETFL)", object()))?;
    nix::unistd::dup(own).map_err(FileError::call("dup", object()))
}
