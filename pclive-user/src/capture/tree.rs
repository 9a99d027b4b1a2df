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

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    /// Python in a pid namespace of its own.
    pub(in crate::capture) struct Contained {
        unshare: Child,
        pub init: HostPid,
    }

    impl Contained {
        /// Starts `script` and waits until it prints a line.
        pub fn start(script: &str) -> Self {
            let mut unshare = Command::new("unshare")
                .args(["--pid", "--fork", "--kill-child", "python3", "-c", script])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let stdout = unshare.stdout.as_mut().expect("a pipe");
            BufReader::new(stdout).read_line(&mut String::new()).unwrap();
            let pid = HostPid(unshare.id() as i32);
            let init = proc::children(pid, pid).unwrap()[0];
            Self { unshare, init }
        }
    }

    impl Drop for Contained {
        fn drop(&mut self) {
            self.unshare.kill().ok();
            self.unshare.wait().ok();
        }
    }

    #[test]
    fn a_handle_is_kept_as_long_as_its_process_lives() {
        let script = "import os, signal, time\nfor i in range(3):\n  if not os.fork(): os.setsid(); time.sleep(600)\n\
                      time.sleep(0.2)\nprint('ready', flush=True)\nos.wait()\nprint('waited', flush=True)\nsignal.pause()";
        let mut contained = Contained::start(script);
        let mut pids = proc::children(contained.init, contained.init).unwrap();
        let (first, new) = (pids[0], pids.pop().unwrap());
        pids.push(contained.init);
        let known = read_tree(&pids).unwrap();
        let numbers = |tree: &[SourceProcess]| tree.iter().map(|p| (p.ns_pid.0, p.sid.0)).collect::<Vec<_>>();
        pids.push(new);
        let tree = reread_tree(&known, &pids).unwrap();
        let all = numbers(&tree);
        assert_eq!((numbers(&known).as_slice(), all[0], all.len()), (&all[..3], (1, 0), 4));
        assert!(all[1..].iter().all(|(own, session)| own == session));
        assert!(tree.iter().zip(&known).all(|(tree, known)| Arc::ptr_eq(&tree.pidfd, &known.pidfd)));

        let first = tree.iter().find(|process| process.pid == first).unwrap().clone();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(first.pid.0), nix::sys::signal::SIGKILL).unwrap();
        let stdout = contained.unshare.stdout.as_mut().expect("a pipe");
        BufReader::new(stdout).read_line(&mut String::new()).unwrap();
        assert_eq!(numbers(&reread_tree(&tree, &pids).unwrap()), [all[0], all[2], all[3]]);
        // As if its number had been given to another process.
        let stale = SourceProcess { pid: new, ..first };
        let reread = reread_process(&stale).unwrap();
        assert_eq!((reread.pid, reread.ns_pid), (new, NsPid(all[3].0)));
        assert!(!Arc::ptr_eq(&reread.pidfd, &stale.pidfd));
    }
}
