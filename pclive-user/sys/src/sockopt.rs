//! Socket options as bytes, and queue lengths: what `getsockopt(2)`, `setsockopt(2)` and the ioctls of `tcp(7)` and
//! `unix(7)` give.
//!
//! nix wraps each option in a type of its own; a migration handles some seventy options alike, so here they are bytes.
//! A value from a peer must never be passed to [`set`] for an option whose value holds pointers (`SO_ATTACH_FILTER`):
//! callers keep a list of the options that they accept.

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Reads an option into `buffer`; returns the length of the value, at most the buffer's.
///
/// # Errors
/// `ENOPROTOOPT` if the kernel or the protocol does not know the option, or it is one of those for which the kernel
/// writes elsewhere than into `len` bytes of `buffer`.
pub fn get(socket: BorrowedFd<'_>, level: i32, name: i32, buffer: &mut [u8]) -> nix::Result<usize> {
    /// `linux/tcp.h`.
    const TCP_ZEROCOPY_RECEIVE: i32 = 35;
    if matches!(
        (level, name),
        (libc::SOL_SOCKET, libc::SO_GET_FILTER) | (libc::IPPROTO_TCP, TCP_ZEROCOPY_RECEIVE)
    ) {
        return Err(Errno::ENOPROTOOPT);
    }
    let mut len = buffer.len() as libc::socklen_t;
    // SAFETY: `buffer` is writable for the `len` bytes that the kernel is told of, and it writes no more: the exceptions,
    // one that counts in instructions and one that maps memory at an address in the buffer, have been refused.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut len)
    };
    Errno::result(result)?;
    Ok((len as usize).min(buffer.len()))
}

/// Sets an option.
///
/// # Errors
/// The kernel's: `ENOPROTOOPT`, `EINVAL`, `EPERM` …
pub fn set(socket: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> nix::Result<()> {
    // SAFETY: `value` is readable for the length that is passed with it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop)
}

/// Reads an option that is a C `int`.
///
/// # Errors
/// As [`get`]; `EINVAL` if the value is not four bytes long.
pub fn get_int(socket: BorrowedFd<'_>, level: i32, name: i32) -> nix::Result<i32> {
    let mut value = [0; 4];
    if get(socket, level, name, &mut value)? != value.len() {
        return Err(Errno::EINVAL);
    }
    Ok(i32::from_ne_bytes(value))
}

/// Sets an option that is a C `int`.
///
/// # Errors
/// As [`set`].
pub fn set_int(socket: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> nix::Result<()> {
    set(socket, level, name, &value.to_ne_bytes())
}

/// Whether a filter program is attached to the socket (`SO_GET_FILTER`, Linux 3.8).
///
/// # Errors
/// The kernel's.
pub fn has_filter(socket: BorrowedFd<'_>) -> nix::Result<bool> {
    let mut instructions: libc::socklen_t = 0;
    // SAFETY: with a length of 0 the kernel writes nothing but the number of instructions to `instructions`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            std::ptr::null_mut(),
            &raw mut instructions,
        )
    };
    match Errno::result(result) {
        Ok(_) => Ok(instructions > 0),
        // An eBPF program, which has no classic form to show.
        Err(Errno::EACCES) => Ok(true),
        Err(errno) => Err(errno),
    }
}

/// What `poll(2)` says of a socket now: `POLLRDHUP`, `POLLERR`, `POLLHUP`, which nix's flags lack in part.
///
/// # Errors
/// The kernel's.
pub fn poll_now(socket: BorrowedFd<'_>) -> nix::Result<i16> {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: `poll` is one pollfd, and the count says so.
    let result = unsafe { libc::poll(&raw mut poll, 1, 0) };
    Errno::result(result).map(|_| poll.revents)
}

/// Bytes that can be read (`SIOCINQ`). For a unix datagram socket: the length of the first message.
///
/// # Errors
/// `EINVAL` for a listening socket.
pub fn readable_bytes(socket: BorrowedFd<'_>) -> nix::Result<usize> {
    queue_length(socket, libc::FIONREAD)
}

/// Bytes that were written and not yet acknowledged, or for a unix socket not yet read (`SIOCOUTQ`).
///
/// # Errors
/// `EINVAL` for a listening socket.
pub fn unacknowledged_bytes(socket: BorrowedFd<'_>) -> nix::Result<usize> {
    queue_length(socket, libc::TIOCOUTQ)
}

/// Bytes that were written to a TCP socket and never sent (`SIOCOUTQNSD`, Linux 2.6.39).
///
/// # Errors
/// `EINVAL` for a listening socket.
pub fn unsent_bytes(socket: BorrowedFd<'_>) -> nix::Result<usize> {
    /// `linux/sockios.h`; absent from the libc crate.
    const SIOCOUTQNSD: libc::Ioctl = 0x894b;
    queue_length(socket, SIOCOUTQNSD)
}

fn queue_length(socket: BorrowedFd<'_>, request: libc::Ioctl) -> nix::Result<usize> {
    let mut length: libc::c_int = 0;
    // SAFETY: these requests write one int, which `length` is.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut length) };
    Errno::result(result)?;
    Ok(usize::try_from(length).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn options_and_queue_lengths_are_the_kernels() {
        let (mut a, b) = UnixStream::pair().unwrap();
        set_int(a.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, 1).unwrap();
        assert_eq!(get_int(a.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED).unwrap(), 1);
        assert_eq!(get_int(b.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED).unwrap(), 0);
        assert_eq!(get_int(b.as_fd(), libc::IPPROTO_TCP, libc::TCP_NODELAY).unwrap_err(), Errno::EOPNOTSUPP);
        let mut linger = [0; 64];
        assert_eq!(get(a.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &mut linger).unwrap(), 8);
        a.write_all(b"12345").unwrap();
        assert_eq!(readable_bytes(b.as_fd()).unwrap(), 5);
        assert!(unacknowledged_bytes(a.as_fd()).unwrap() >= 5);
    }
}
