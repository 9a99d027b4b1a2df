//! Process handles that survive pid reuse, and the descriptors behind them: `pidfd_open(2)`, `pidfd_getfd(2)`.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pclive_wire::HostPid;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Opens a handle on the process whose thread group leader is `pid` (Linux 5.3).
///
/// # Errors
/// `ESRCH` if there is no such process, `EINVAL` if `pid` is a thread that does not lead its group.
pub fn pidfd_open(pid: HostPid) -> nix::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, 0) };
    own(fd)
}

/// Duplicates descriptor `fd` of another process into this one, close-on-exec (Linux 5.6).
///
/// The duplicate names the same open file description: offset and status flags are shared with the process, and the
/// description lives on while the duplicate is open. Needs `PTRACE_MODE_ATTACH_REALCREDS` access to the process.
///
/// # Errors
/// `EBADF` if the process has no such descriptor, `ESRCH` if it exited, `EPERM` without access.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: RawFd) -> nix::Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes three integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    own(fd)
}

/// Whether the process has ended, reaped or not. Until then its number is its own.
///
/// # Errors
/// `ENOMEM`.
pub fn has_exited(pidfd: BorrowedFd<'_>) -> nix::Result<bool> {
    let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).map(|ready| ready > 0)
}

/// Takes over the descriptor that a system call has just returned.
fn own(returned: libc::c_long) -> nix::Result<OwnedFd> {
    let fd = Errno::result(returned)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_duplicate_shares_the_description() {
        let pidfd = pidfd_open(HostPid(std::process::id() as i32)).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"abcdef").unwrap();
        let mut copy = std::fs::File::from(pidfd_getfd(pidfd.as_fd(), file.as_raw_fd()).unwrap());
        file.seek(SeekFrom::Start(4)).unwrap();
        let mut rest = String::new();
        copy.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "ef");
    }

    #[test]
    fn errors_are_the_kernels() {
        let pidfd = pidfd_open(HostPid(std::process::id() as i32)).unwrap();
        assert_eq!(pidfd_getfd(pidfd.as_fd(), 1 << 20).unwrap_err(), Errno::EBADF);
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert_eq!(pidfd_open(HostPid(child.id() as i32)).unwrap_err(), Errno::ESRCH);
    }

    #[test]
    fn a_process_has_exited_when_it_is_reaped_or_can_be() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pidfd = pidfd_open(HostPid(child.id() as i32)).unwrap();
        assert!(!has_exited(pidfd.as_fd()).unwrap());
        child.kill().unwrap();
        while !has_exited(pidfd.as_fd()).unwrap() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(has_exited(pidfd.as_fd()).unwrap());
    }
}
