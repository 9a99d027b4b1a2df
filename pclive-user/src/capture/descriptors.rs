//! Descriptor numbers of a stopped process: which of them `execve(2)` closes, and which are sockets.
//!
//! The flag belongs to the number and not to the file behind it: no duplicate tells it. `/proc/PID/fdinfo` does, in 8 µs for
//! each; the process itself says it in 0.3 µs, in the script that it runs anyway. Not where its scripts are followed call by
//! call (see `way_back` in pclive-sys): there a call costs more than procfs.

use super::proc::{self, ProcError};
use pclive_sys::script::{Arg, CallRef, Expect, Outcome, Script};
use pclive_wire::HostPid;
use std::os::fd::RawFd;

/// Descriptors that a process is asked about at a time: what a script fills counts as memory of the container, and there are
/// other questions beside these.
const BATCH: usize = 128;

/// A descriptor of a stopped process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number.
    pub fd: RawFd,
    /// `FD_CLOEXEC`.
    pub cloexec: bool,
    /// It is one of a socket.
    pub is_socket: bool,
}

/// All descriptors of a stopped process, in the batches in which it is to be asked about them.
pub(super) fn batches(pid: HostPid) -> Result<Vec<Vec<RawFd>>, ProcError> {
    Ok(proc::descriptors(pid)?.chunks(BATCH).map(<[RawFd]>::to_vec).collect())
}

/// What a process is asked about some of its descriptors, as a part of its leader's script.
pub(super) struct Questions(Vec<(RawFd, [CallRef; 2])>);

impl Questions {
    /// Adds the questions to a script.
    pub(super) fn ask(script: &mut Script, fds: &[RawFd]) -> Self {
        let (kind, length) = (script.room(4), script.data(&4u32.to_ne_bytes()));
        let ask = |&fd: &RawFd| {
            let flags: [Arg; 2] = [fd.into(), libc::F_GETFD.into()];
            let flags = script.call("fcntl(F_GETFD)", libc::SYS_fcntl, flags);
            let args: [Arg; 5] =
                [fd.into(), libc::SOL_SOCKET.into(), libc::SO_TYPE.into(), kind.into(), length.into()];
            let kind = script.call_expecting("SO_TYPE", libc::SYS_getsockopt, args, Expect::Any);
            (fd, [flags, kind])
        };
        Self(fds.iter().map(ask).collect())
    }

    /// What the process has said.
    pub(super) fn descriptors(&self, answers: &Outcome) -> impl Iterator<Item = Descriptor> {
        self.0.iter().map(|&(fd, [flags, kind])| Descriptor {
            fd,
            cloexec: answers.result(flags) & i64::from(libc::FD_CLOEXEC) != 0,
            is_socket: answers.result(kind) == 0,
        })
    }
}
