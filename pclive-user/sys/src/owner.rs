//! Who gets the signals of an open file description: `F_GETOWN_EX`, `F_GETSIG` (`fcntl(2)`).

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

// uapi/asm-generic/fcntl.h; not in the libc crate.
const F_GETSIG: i32 = 11;
const F_GETOWN_EX: i32 = 16;

/// Receiver of `SIGIO` and `SIGURG`, with ids of the caller's pid namespace; all zero when none was set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    pub kind: i32,
    /// Thread, process or process group; 0 if it is not in the caller's pid namespace.
    pub id: i32,
    /// Signal sent in the place of `SIGIO`, or 0.
    pub signal: i32,
}

/// `struct f_owner_ex`.
#[repr(C)]
#[derive(Default)]
struct OwnerEx {
    kind: i32,
    pid: i32,
}

/// Reads the signal owner of the description behind `fd`.
///
/// # Errors
/// `EBADF` for a descriptor opened with `O_PATH`.
pub fn owner(fd: BorrowedFd<'_>) -> nix::Result<Owner> {
    let mut ex = OwnerEx::default();
    // SAFETY: F_GETOWN_EX fills a struct f_owner_ex (two ints), which `ex` is.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, &raw mut ex) })?;
    // SAFETY: F_GETSIG takes no argument and returns an integer.
    let signal = Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) })?;
    // The kernel reports "nobody" as thread 0.
    let kind = if ex.pid == 0 { 0 } else { ex.kind };
    Ok(Owner { kind, id: ex.pid, signal })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn nobody_until_set() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(owner(a.as_fd()).unwrap(), Owner::default());
        let me = std::process::id() as i32;
        // SAFETY: both commands take integers.
        unsafe {
            assert_eq!(libc::fcntl(a.as_raw_fd(), libc::F_SETOWN, me), 0);
            assert_eq!(libc::fcntl(a.as_raw_fd(), 10 /* F_SETSIG */, libc::SIGUSR1), 0);
        }
        assert_eq!(owner(a.as_fd()).unwrap(), Owner { kind: 1, id: me, signal: libc::SIGUSR1 });
    }
}
