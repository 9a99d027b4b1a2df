//! The few process calls of the memory workload that the compiler cannot vouch for.

use nix::libc;
use nix::unistd::{ForkResult, fork};
use std::os::fd::RawFd;

/// Which side of [`split`] this is.
#[derive(Clone, Copy, Debug)]
pub enum Side {
    /// The caller, with the child's pid.
    Parent(i32),
    /// The copy, with one thread.
    Child,
}

/// `fork(2)`.
///
/// # Errors
/// Those of `fork(2)`.
pub fn split() -> nix::Result<Side> {
    // SAFETY: the child has one thread and touches no lock that another thread of the parent may have held: glibc
    // makes malloc usable after fork, and the child ends with `leave`, which runs no destructors.
    Ok(match unsafe { fork() }? {
        ForkResult::Parent { child } => Side::Parent(child.as_raw()),
        ForkResult::Child => Side::Child,
    })
}

/// `_exit(2)`: no destructors, no atexit handlers, no flushing of buffers that the parent owns too.
pub fn leave(code: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

/// Closes every descriptor from 3 on except these.
pub fn close_all_except(kept: &mut [RawFd]) {
    kept.sort_unstable();
    let mut first = 3;
    for &mut fd in kept {
        close_range(first, fd - 1);
        first = fd + 1;
    }
    close_range(first, RawFd::MAX);
}

fn close_range(first: RawFd, last: RawFd) {
    if first <= last {
        // SAFETY: called in a child whose descriptor table is its own and that never looks at these again.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// Children that end leave no zombie; what became of them is learnt from their socket.
pub fn reap_automatically() {
    // SAFETY: ignoring a signal installs no code.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}
