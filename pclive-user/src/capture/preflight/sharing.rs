//! What processes share that pclive makes for each of them, and what threads have alone that pclive makes once.

use super::PreflightError;
use crate::capture::tree::{has_ended, read_threads};
use crate::capture::{Obstacles, SourceProcess};
use nix::errno::Errno;
use pclive_sys::kcmp::{Shared, compare_tasks, search};
use pclive_wire::HostPid;
use std::cmp::Ordering;

/// What two processes must not share (`clone(2)`).
const OF_A_PROCESS: [(Shared, &str, &str); 3] = [
    (Shared::Vm, "memory", "it runs in the memory of another process (vfork, or clone with CLONE_VM)"),
    (Shared::Files, "descriptor table", "it shares the descriptor table of another process (CLONE_FILES)"),
    (
        Shared::Fs,
        "working directory",
        "it shares root, working directory and umask with another process (CLONE_FS)",
    ),
];

/// What the threads of a process must share.
const OF_ITS_THREADS: [(Shared, &str); 2] = [
    (Shared::Files, "a thread has a descriptor table of its own (unshare with CLONE_FILES)"),
    (Shared::Fs, "a thread has a working directory of its own (unshare with CLONE_FS)"),
];

/// Adds processes that share too much and threads that share too little.
pub(super) fn survey(processes: &[&SourceProcess], obstacles: &mut Obstacles) -> Result<(), PreflightError> {
    for (what, object, reason) in OF_A_PROCESS {
        for process in sharers(processes, what)? {
            obstacles.add(
                process.ns_pid,
                object,
                reason,
                "try again when that child has started its program",
            );
        }
    }
    for process in processes {
        match lone_threads(process, obstacles) {
            Err(_) if has_ended(process.pid) => {}
            result => result?,
        }
    }
    Ok(())
}

/// Every process that shares `what` with one before it.
fn sharers<'a>(
    processes: &[&'a SourceProcess],
    what: Shared,
) -> Result<Vec<&'a SourceProcess>, PreflightError> {
    let mut ordered: Vec<&SourceProcess> = Vec::with_capacity(processes.len());
    let mut sharers = Vec::new();
    for &process in processes {
        match search(&ordered, |other| compare(other.pid, process.pid, what)) {
            Ok(Ok(_)) => sharers.push(process),
            Ok(Err(place)) => ordered.insert(place, process),
            // One of the two has ended, and shares nothing any more.
            Err(PreflightError::Compare { errno: Errno::ESRCH, .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sharers)
}

fn lone_threads(process: &SourceProcess, obstacles: &mut Obstacles) -> Result<(), PreflightError> {
    for (tid, ns_tid) in read_threads(process.pid)?.into_iter().skip(1) {
        for (what, reason) in OF_ITS_THREADS {
            match compare(process.pid, tid, what) {
                Ok(Ordering::Equal) => {}
                Err(_) if has_ended(tid) => {}
                Ok(_) => {
                    let remedy = "have the program not do that";
                    obstacles.add(process.ns_pid, format!("thread {ns_tid}"), reason, remedy);
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

fn compare(first: HostPid, second: HostPid, what: Shared) -> Result<Ordering, PreflightError> {
    compare_tasks(first, second, what).map_err(|errno| PreflightError::Compare { first, second, errno })
}
