//! The process tree: who is in the container, who is whose parent, and which thread is which.

use super::SourceProcess;
use pclive_sys::pidfd::pidfd_open;
use pclive_wire::{HostPid, NsPid};
use procfs::process::{Process as ProcfsProcess, Stat, Status};
use std::collections::{HashMap, HashSet};

/// Why the process tree could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A file under `/proc` could not be read; the process may have ended.
    #[error("cannot read /proc/{pid}")]
    Proc {
        /// Whose.
        pid: HostPid,
        /// Why.
        source: procfs::ProcError,
    },
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
            Self::Proc { source, .. } => {
                matches!(source, procfs::ProcError::NotFound(_)) || is_no_process(source)
            }
            Self::Pidfd { source, .. } => *source == nix::Error::ESRCH,
            _ => false,
        }
    }
}

fn is_no_process(error: &procfs::ProcError) -> bool {
    matches!(error, procfs::ProcError::Io(io, _) if io.raw_os_error() == Some(libc::ESRCH))
}

/// Reads the processes `pids` (all of the container's, in any order) and sorts parents before children, PID 1 first.
/// Processes that end meanwhile are left out.
pub fn read_tree(pids: &[HostPid]) -> Result<Vec<SourceProcess>, TreeError> {
    let mut processes = Vec::with_capacity(pids.len());
    for &pid in pids {
        match read_process(pid) {
            Ok(process) => processes.push(process),
            Err(e) if e.is_gone() => {}
            Err(e) => return Err(e),
        }
    }
    sort_parents_first(processes)
}

fn read_process(pid: HostPid) -> Result<SourceProcess, TreeError> {
    let pidfd = pidfd_open(pid).map_err(|source| TreeError::Pidfd { pid, source })?;
    let (stat, status) = stat_and_status(pid)?;
    let innermost = |numbers: &Option<Vec<i32>>| {
        let inside = numbers.as_ref().filter(|numbers| numbers.len() > 1).and_then(|numbers| numbers.last());
        inside.map(|&number| NsPid(number)).ok_or(TreeError::NoNamespacePid(pid))
    };
    Ok(SourceProcess {
        pid,
        ns_pid: innermost(&status.nspid)?,
        parent: HostPid(stat.ppid),
        pgid: innermost(&status.nspgid)?,
        sid: innermost(&status.nssid)?,
        pidfd,
    })
}

fn stat_and_status(pid: HostPid) -> Result<(Stat, Status), TreeError> {
    let read = || {
        let process = ProcfsProcess::new(pid.0)?;
        Ok((process.stat()?, process.status()?))
    };
    read().map_err(|source| TreeError::Proc { pid, source })
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

/// The threads of a process: as the host numbers them and as the container does, the leader first.
pub fn read_threads(pid: HostPid) -> Result<Vec<(HostPid, NsPid)>, TreeError> {
    let read = || -> Result<Vec<(HostPid, Option<i32>)>, procfs::ProcError> {
        let tasks = ProcfsProcess::new(pid.0)?.tasks()?;
        tasks
            .map(|task| {
                let task = task?;
                let status = task.status()?;
                Ok((HostPid(task.tid), status.nspid.and_then(|numbers| numbers.last().copied())))
            })
            .collect()
    };
    let mut threads = read()
        .map_err(|source| TreeError::Proc { pid, source })?
        .into_iter()
        .map(|(tid, inside)| inside.map(|inside| (tid, NsPid(inside))).ok_or(TreeError::NoNamespacePid(tid)))
        .collect::<Result<Vec<_>, _>>()?;
    threads.sort_by_key(|&(tid, _)| (tid != pid, tid));
    Ok(threads)
}

/// The number of a thread inside the container, if it still exists.
pub fn namespace_tid(pid: HostPid, tid: HostPid) -> Option<NsPid> {
    let task = ProcfsProcess::new(pid.0).ok()?.task_from_tid(tid.0).ok()?;
    task.status().ok()?.nspid?.last().copied().map(NsPid)
}

/// Processes that have ended and that their parents have not yet waited for, as (parent, child). The container's
/// processes must be stopped, or the answer is old when it comes.
pub fn unreaped(processes: &[SourceProcess]) -> Result<Vec<(NsPid, HostPid)>, TreeError> {
    let known: HashSet<HostPid> = processes.iter().map(|process| process.pid).collect();
    let mut found = Vec::new();
    for process in processes {
        let pid = process.pid;
        let children = || -> procfs::ProcResult<Vec<HostPid>> {
            let mut children = Vec::new();
            for task in ProcfsProcess::new(pid.0)?.tasks()? {
                children.extend(task?.children()?.into_iter().map(|child| HostPid(child as i32)));
            }
            Ok(children)
        };
        let children = children().map_err(|source| TreeError::Proc { pid, source })?;
        found.extend(
            children.into_iter().filter(|child| !known.contains(child)).map(|child| (process.ns_pid, child)),
        );
    }
    Ok(found)
}

/// Whether a process or thread no longer runs: its number is free, it waits to be reaped, or it is on its way there.
pub fn has_ended(pid: HostPid) -> bool {
    const PF_EXITING: u32 = 4; // include/linux/sched.h
    let stat = ProcfsProcess::new(pid.0).and_then(|process| process.stat());
    stat.map_or(true, |stat| matches!(stat.state, 'Z' | 'X') || stat.flags & PF_EXITING != 0)
}
