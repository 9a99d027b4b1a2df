//! Processes in the container's pid namespace that its cgroup does not list: zombies, and those that were put into
//! another cgroup. Neither the freezer nor the tracker would reach them.

use super::{PreflightError, field, read};
use crate::capture::tree::has_ended;
use crate::capture::{Obstacles, SourceProcess};
use pclive_wire::{HostPid, NsPid};
use std::collections::HashSet;
use std::path::PathBuf;

/// Adds every process that is in the pid namespace but not in `processes`.
pub(super) fn survey(processes: &[SourceProcess], obstacles: &mut Obstacles) -> Result<(), PreflightError> {
    let known: HashSet<HostPid> = processes.iter().map(|process| process.pid).collect();
    let Some(namespace) = pid_namespace(processes[0].pid) else { return Ok(()) };
    let home = read(processes[0].pid, "cgroup")?;
    for pid in all_processes()? {
        if known.contains(&pid) || pid_namespace(pid).as_ref() != Some(&namespace) {
            continue;
        }
        match read(pid, "status") {
            Ok(status) if is_zombie(&status) => add_zombie(innermost_pid(&status), obstacles),
            Ok(status) => match read(pid, "cgroup") {
                // Made since the cgroup was read.
                Ok(cgroup) if cgroup == home => {}
                Ok(_) => add_stray(innermost_pid(&status), obstacles),
                Err(_) if has_ended(pid) => {}
                Err(error) => return Err(error),
            },
            Err(_) if has_ended(pid) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn innermost_pid(status: &str) -> NsPid {
    let pid = field(status, "NSpid:").and_then(|pids| pids.split_whitespace().last()?.parse().ok());
    NsPid(pid.unwrap_or_default())
}

fn add_stray(pid: NsPid, obstacles: &mut Obstacles) {
    obstacles.add(
        pid,
        "cgroup",
        "the process is in the container's pid namespace but not in its cgroup",
        "end the session that entered the container, or move the process into the container's cgroup",
    );
}

/// The processes that have more to tell than that they ended, which is an obstacle.
pub(super) fn without_zombies<'a>(
    processes: &'a [SourceProcess],
    obstacles: &mut Obstacles,
) -> Result<Vec<&'a SourceProcess>, PreflightError> {
    let mut living = Vec::with_capacity(processes.len());
    for process in processes {
        match read(process.pid, "status") {
            Ok(status) if is_zombie(&status) => add_zombie(process.ns_pid, obstacles),
            Ok(_) => living.push(process),
            Err(_) if has_ended(process.pid) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(living)
}

/// Adds the processes that are in a cgroup below the container's.
pub(super) fn survey_cgroups(
    living: &[&SourceProcess],
    obstacles: &mut Obstacles,
) -> Result<(), PreflightError> {
    let Some((init, others)) = living.split_first() else { return Ok(()) };
    let home = read(init.pid, "cgroup")?;
    for process in others {
        match read(process.pid, "cgroup") {
            Ok(cgroup) if cgroup == home => {}
            Ok(_) => obstacles.add(
                process.ns_pid,
                "cgroup",
                "the process is in another cgroup than PID 1; cgroups made inside a container are not moved yet",
                "run the container without a manager of cgroups (such as systemd) inside",
            ),
            Err(_) if has_ended(process.pid) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn is_zombie(status: &str) -> bool {
    field(status, "State:").is_some_and(|state| state.starts_with(['Z', 'X']))
}

fn add_zombie(pid: NsPid, obstacles: &mut Obstacles) {
    obstacles.add(
        pid,
        "process",
        "a zombie: its parent has not collected its exit status, or only its first thread has ended",
        "try again; if it stays, the parent (or PID 1) does not wait for its children",
    );
}

fn pid_namespace(pid: HostPid) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

fn all_processes() -> Result<Vec<HostPid>, PreflightError> {
    let error = |error| PreflightError::Read { path: "/proc".into(), error };
    let mut pids = Vec::new();
    for entry in std::fs::read_dir("/proc").map_err(error)? {
        let name = entry.map_err(error)?.file_name();
        pids.extend(name.to_str().and_then(|name| name.parse().ok()).map(HostPid));
    }
    Ok(pids)
}
