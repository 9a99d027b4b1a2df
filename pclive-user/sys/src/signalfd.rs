//! `signalfd(2)` with the kernel's own 64-bit mask: libc's `sigset_t` cannot name the signals that it keeps for itself.

use nix::errno::Errno;
use std::os::fd::{FromRawFd, OwnedFd};

/// Makes a descriptor that accepts the signals in `mask` (bit 0 is signal 1), close-on-exec and blocking.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`.
pub fn signalfd(mask: u64) -> nix::Result<OwnedFd> {
    let size = size_of_val(&mask);
    // SAFETY: the kernel reads `size` bytes behind the pointer to `mask`, which lives until the call returns.
    let fd = unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, size, libc::SFD_CLOEXEC) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn the_mask_is_taken_as_it_is() {
        let mask = 1 << (libc::SIGUSR1 - 1) | 1 << 32; // signal 33 belongs to libc
        let fd = signalfd(mask).unwrap();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
        assert!(info.contains(&format!("sigmask:\t{mask:016x}")), "{info}");
    }
}
