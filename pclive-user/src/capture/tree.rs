//! The process tree: who is in the container, who is whose parent, and which thread is which.

use super::SourceProcess;
use super::proc::{self, NsNumbers, ProcError, Stat, Status};
use super::threads::StoppedProcess;
use pclive_sys::pidfd::{has_exited, pidfd_open};
use pclive_wire::{HostPid, NsPid};
use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Why the process tree could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A file under `/proc` is of no use; the process may have ended.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// The process has no number in the container's pid namespace.
    #[error("process {0} is not in a pid namespace of its own container")]
    NoNamespacePid(HostPid),
    /// No handle on the process could be had.
    #[error("cannot open a pidfd of {pid}")]
    Pidfd {
        /// Whose.
        pid: HostPid,
        /// Why.
        source: nix::Error,
    },
    /// A process whose parent is outside the container.
    #[error("process {0} entered the container from outside (an exec session?): wait until it ends")]
    Entered(HostPid),
}

impl TreeError {
    /// Whether the process ended while it was looked at.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Proc(error) => error.is_gone(),
            Self::Pidfd { source, .. } => *source == nix::Error::ESRCH,
            _ => false,
        }
    }
}

/// Reads the processes `pids` (all of the container's, in any order) and sorts parents before children, PID 1 first.
/// Processes that end meanwhile are left out.
pub fn read_tree(pids: &[HostPid]) -> Result<Vec<SourceProcess>, TreeError> {
    reread_tree(&[], pids)
}

/// The same when some of the processes are `known` from before: of them only what changes is read.
pub fn reread_tree(known: &[SourceProcess], pids: &[HostPid]) -> Result<Vec<SourceProcess>, TreeError> {
    let known: HashMap<HostPid, &SourceProcess> =
        known.iter().map(|process| (process.pid, process)).collect();
    let mut processes = Vec::with_capacity(pids.len());
    for &pid in pids {
        let process = match known.get(&pid) {
            Some(known) => reread_process(known),
            None => read_process(pid),
        };
        match process {
            Ok(process) => processes.push(process),
            Err(e) if e.is_gone() => {}
            Err(e) => return Err(e),
        }
    }
    sort_parents_first(processes)
}

fn read_process(pid: HostPid) -> Result<SourceProcess, TreeError> {
    let pidfd = pidfd_open(pid).map_err(|source| TreeError::Pidfd { pid, source })?;
    source_process(pid, Arc::new(pidfd))
}

/// A process's number is its own until it ends: if it has not ended when its file has been read, it was its file.
fn reread_process(known: &SourceProcess) -> Result<SourceProcess, TreeError> {
    let reread = source_process(known.pid, known.pidfd.clone());
    match has_exited(known.pidfd.as_fd()) {
        Ok(false) => reread,
        _ => read_process(known.pid),
    }
}

fn source_process(pid: HostPid, pidfd: Arc<OwnedFd>) -> Result<SourceProcess, TreeError> {
    let status = Status::of_process(pid)?;
    let inside = |numbers: Option<NsNumbers>| {
        let nested = numbers.filter(|numbers| numbers.nested);
        nested.map(|numbers| numbers.innermost).ok_or(TreeError::NoNamespacePid(pid))
    };
    Ok(SourceProcess {
        pid,
        ns_pid: inside(status.ns_pid)?,
        parent: status.parent,
        pgid: inside(status.ns_pgid)?,
        sid: inside(status.ns_sid)?,
        pidfd,
    })
}

fn sort_parents_first(mut processes: Vec<SourceProcess>) -> Result<Vec<SourceProcess>, TreeError> {
    let parents: HashMap<HostPid, HostPid> = processes.iter().map(|p| (p.pid, p.parent)).collect();
    let depth = |process: &SourceProcess| {
        let mut depth = 0;
        let mut pid = process.parent;
        while let Some(&parent) = parents.get(&pid) {
            pid = parent;
            depth += 1;
        }
        depth
    };
    if let Some(entered) = processes.iter().find(|p| p.ns_pid != NsPid(1) && !parents.contains_key(&p.parent))
    {
        return Err(TreeError::Entered(entered.pid));
    }
    processes.sort_by_cached_key(|p| (depth(p), p.ns_pid));
    Ok(processes)
}

/// The threads of a process: as the host numbers them and as the container does, the leader first. Threads that end
/// meanwhile are left out.
pub fn read_threads(pid: HostPid) -> Result<Vec<(HostPid, NsPid)>, TreeError> {
    let mut threads = Vec::new();
    for tid in proc::threads(pid)? {
        match Status::of_thread(pid, tid) {
            Ok(status) => threads.push((tid, ns_tid(tid, &status)?)),
            // The leader's number is free only when the process's is.
            Err(e) if e.is_gone() && tid != pid => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(threads)
}

/// The number of a thread inside the container.
pub fn ns_tid(tid: HostPid, status: &Status) -> Result<NsPid, TreeError> {
    status.ns_pid.map(|numbers| numbers.innermost).ok_or(TreeError::NoNamespacePid(tid))
}

/// Processes that have ended and that their parents have not yet waited for, as (parent, child). All of the container's
/// `processes` are `stopped`, or the answer would be old when it comes.
pub fn unreaped(
    processes: &[SourceProcess],
    stopped: &[StoppedProcess],
) -> Result<Vec<(NsPid, HostPid)>, TreeError> {
    let known: HashSet<HostPid> = processes.iter().map(|process| process.pid).collect();
    let mut found = Vec::new();
    for process in stopped {
        let parent = process.leader().ns_tid;
        for thread in &process.threads {
            let children = proc::children(process.pid, thread.tracee.tid())?;
            let ended = children.into_iter().filter(|child| !known.contains(child));
            found.extend(ended.map(|child| (parent, child)));
        }
    }
    Ok(found)
}

/// Whether a process or thread no longer runs: its number is free, it waits to be reaped, or it is on its way there.
pub fn has_ended(pid: HostPid) -> bool {
    const PF_EXITING: u32 = 4; // include/linux/sched.h
    let ended = |stat: Stat| matches!(stat.state, 'Z' | 'X') || stat.flags & PF_EXITING != 0;
    Stat::of(pid).map_or(true, ended)
}
