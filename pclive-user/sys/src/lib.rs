//! Safe, typed wrappers around the kernel interfaces that pclive needs and no well-kept crate offers.
//!
//! This is the only crate of the workspace with `unsafe` code.

pub mod codicil;
pub mod cpu;
pub mod init;
pub mod kcmp;
pub mod mem;
pub mod mountns;
pub mod namespace;
pub mod netlink;
pub mod owner;
pub mod packet;
pub mod pagemap;
pub mod pidfd;
pub mod prctl;
pub mod ptrace;
pub mod registers;
pub mod script;
pub mod signalfd;
pub mod sock_diag;
pub mod sockopt;
pub mod tcp;
pub mod thread;
pub mod timerfd;
pub mod uffd;
pub mod will;
pub mod zerocopy;

use nix::errno::Errno;
use pclive_wire::{HostPid, PageRange, VirtAddr};
use std::path::PathBuf;

/// Why a kernel interface said no.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A call about a process or thread failed.
    #[error("{call} on {pid}: {errno}")]
    Call {
        /// Name of the call or request.
        call: &'static str,
        /// Its object.
        pid: HostPid,
        /// What the kernel said.
        errno: Errno,
    },
    /// A call about an address range failed.
    #[error("{call} on {range}: {errno}")]
    Range {
        /// Name of the call or request.
        call: &'static str,
        /// Its object.
        range: PageRange,
        /// What the kernel said.
        errno: Errno,
    },
    /// The thread ended while it was waited for.
    #[error("thread {0} has ended")]
    Gone(HostPid),
    /// A thread stopped for a reason that cannot be.
    #[error("thread {tid} stopped unexpectedly: {stop:?}")]
    UnexpectedStop {
        /// The thread.
        tid: HostPid,
        /// Why it stopped.
        stop: ptrace::Stop,
    },
    /// It has not yet come back from what it did for a pclive that was killed.
    #[error(
        "thread {0} still comes back from calls for a pclive that was killed: try again (if stopped, continue it)"
    )]
    Returning(HostPid),
    /// A file under /proc could not be opened.
    #[error("cannot open {path}")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Memory of another process could not be read or written.
    #[error("cannot {access} memory of {pid} at {addr}")]
    Memory {
        /// `read` or `write`.
        access: &'static str,
        /// Whose.
        pid: HostPid,
        /// Where.
        addr: VirtAddr,
        /// Why.
        source: std::io::Error,
    },
    /// A call of a script failed; the ones after it were not made.
    #[error("{label} in {tid}: {errno}")]
    ScriptCall {
        /// The thread that ran the script.
        tid: HostPid,
        /// What the call was for.
        label: String,
        /// What the kernel said.
        errno: Errno,
    },
    /// A call of a script returned something else than it had to.
    #[error("{label} in {tid}: returned {result:#x}, expected {expected:#x}")]
    ScriptResult {
        /// The thread that ran the script.
        tid: HostPid,
        /// What the call was for.
        label: String,
        /// What it returned.
        result: u64,
        /// What it had to return.
        expected: u64,
    },
    /// A script does not fit into its arena.
    #[error("a script of {len} bytes does not fit into an arena of {capacity}")]
    ScriptTooLarge {
        /// Bytes needed.
        len: usize,
        /// Bytes there are.
        capacity: usize,
    },
    /// No `syscall` instruction was found where the process keeps its vDSO.
    #[error("process {0} has no vDSO with a system call instruction")]
    NoSyscallInstruction(HostPid),
}

impl Error {
    /// The kernel's error number, if that is what failed.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Call { errno, .. } | Self::Range { errno, .. } | Self::ScriptCall { errno, .. } => {
                Some(*errno)
            }
            _ => None,
        }
    }
}

/// Result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Turns the −1 of a call about `pid` into an error.
fn check(call: &'static str, pid: HostPid, result: i64) -> Result<i64> {
    if result == -1 { Err(Error::Call { call, pid, errno: Errno::last() }) } else { Ok(result) }
}

/// Turns the −1 of a call about `range` into an error.
fn check_range(call: &'static str, range: PageRange, result: i32) -> Result<i32> {
    if result == -1 { Err(Error::Range { call, range, errno: Errno::last() }) } else { Ok(result) }
}
