//! `eventfd(2)`.

use super::error::FileError;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::OwnedFd;

pub(super) fn open(count: u64, semaphore: bool) -> Result<OwnedFd, FileError> {
    let flags = EfdFlags::EFD_CLOEXEC | if semaphore { EfdFlags::EFD_SEMAPHORE } else { EfdFlags::empty() };
    // The call takes 32 bits; the rest is written, which cannot block: the kernel refuses a sum that has no room.
    let first = u32::try_from(count).unwrap_or(0);
    let eventfd =
        EventFd::from_value_and_flags(first, flags).map_err(FileError::call("eventfd2", "eventfd"))?;
    let rest = count - u64::from(first);
    if rest > 0 {
        eventfd.write(rest).map_err(FileError::call("write", "eventfd"))?;
    }
    Ok(eventfd.into())
}
