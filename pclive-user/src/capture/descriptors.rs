//! Descriptor numbers of a stopped process, and which of them `execve(2)` closes.
//!
//! That flag belongs to the number and not to the file behind it: no duplicate tells it. `/proc/PID/fdinfo` does, in 8 µs for
//! each; the process itself says it in 0.3 µs, in the script that it runs anyway.

use super::proc::{self, ProcError};
use pclive_sys::script::{Arg, CallRef, Outcome, Script};
use pclive_wire::HostPid;
use std::os::fd::RawFd;

/// Descriptors that a process is asked about at a time: what a script fills counts as memory of the container.
const BATCH: usize = 1024;

/// A descriptor of a stopped process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number.
    pub fd: RawFd,
    /// `FD_CLOEXEC`.
    pub cloexec: bool,
}

/// What a process is asked about some of its descriptors, as a part of its leader's script.
pub(super) struct Questions(Vec<(RawFd, CallRef)>);

impl Questions {
    /// All descriptors of a stopped process, in the batches in which it is to be asked about them.
    pub(super) fn batches(pid: HostPid) -> Result<Vec<Vec<RawFd>>, ProcError> {
        Ok(proc::descriptors(pid)?.chunks(BATCH).map(<[RawFd]>::to_vec).collect())
    }

    /// Adds the questions to a script.
    pub(super) fn ask(script: &mut Script, fds: &[RawFd]) -> Self {
        let ask = |&fd: &RawFd| {
            let args: [Arg; 2] = [fd.into(), libc::F_GETFD.into()];
            (fd, script.call("fcntl(F_GETFD)", libc::SYS_fcntl, args))
        };
        Self(fds.iter().map(ask).collect())
    }

    /// What the process has said.
    pub(super) fn descriptors(&self, answers: &Outcome) -> impl Iterator<Item = Descriptor> {
        self.0.iter().map(|&(fd, flags)| {
            let cloexec = answers.result(flags) & i64::from(libc::FD_CLOEXEC) != 0;
            Descriptor { fd, cloexec }
        })
    }
}
