//! The processors that a container may use: its cgroup's, by the controller `cpuset` of cgroup v2 or v1.
//!
//! A thread that may run on all of them is bound to none: it shall have those of the destination's cgroup there, whatever
//! their numbers, and follow when the operator changes them. The kernel does not tell the two apart in
//! `sched_getaffinity(2)`.

use super::cgroup::{CgroupError, Mount, parse_mounts, read};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use pclive_wire::HostPid;
use std::path::Path;

/// The processors that the cgroup of `pid` may use. Where none limits them, those of this thread.
///
/// # Errors
/// Files of procfs or cgroupfs cannot be read or understood.
pub fn processors(pid: HostPid) -> Result<CpuSet, CgroupError> {
    // A kernel without the controller has no such file.
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cpuset")).unwrap_or_default();
    let mounts = read(Path::new("/proc/self/mountinfo"))?;
    let v1 = parse_mounts(&mounts, |kind| kind.starts_with("cgroup ") && has_option(kind, "cpuset"));
    let v2 = parse_mounts(&mounts, |kind| kind.starts_with("cgroup2 "));
    let file = |mounts: Vec<Mount<'_>>, name| {
        let paths = mounts.into_iter().filter_map(|mount| mount.path_of(cgroup.trim_end()));
        paths.map(|path| path.join(name)).find(|path| path.exists())
    };
    match file(v1, "cpuset.effective_cpus").or_else(|| file(v2, "cpuset.cpus.effective")) {
        Some(path) => {
            let line = read(&path)?;
            parse_list(line.trim_end()).ok_or(CgroupError::Format { path, line })
        }
        None => sched_getaffinity(Pid::from_raw(0)).map_err(CgroupError::Affinity),
    }
}

/// Whether the mount that `kind` (type, source and options) tells of has this option.
fn has_option(kind: &str, option: &str) -> bool {
    kind.rsplit(' ').next().is_some_and(|options| options.split(',').any(|other| other == option))
}

/// A list of processors, as `0-3,8` (`cpuset(7)`, "List format").
fn parse_list(list: &str) -> Option<CpuSet> {
    let mut cpus = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        for cpu in first.parse().ok()?..=last.parse().ok()? {
            cpus.set(cpu).ok()?;
        }
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(cpus: &CpuSet) -> Vec<usize> {
        (0..CpuSet::count()).filter(|&cpu| cpus.is_set(cpu) == Ok(true)).collect()
    }

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        let parsed = |list| parse_list(list).map(|cpus| numbers(&cpus));
        assert_eq!(parsed("3"), Some(vec![3]));
        assert_eq!(parsed("0-2,8,10-11"), Some(vec![0, 1, 2, 8, 10, 11]));
        assert_eq!((parsed(""), parsed("0-x"), parsed("99999")), (None, None, None));
    }

    #[test]
    fn options_are_the_last_of_what_tells_of_a_mount() {
        assert!(has_option("cgroup cgroup rw,cpuset", "cpuset"));
        assert!(!has_option("cgroup cpuset rw,cpu", "cpuset"));
    }

    #[test]
    fn a_process_without_limits_may_use_what_its_cgroup_may() {
        let own = HostPid(std::process::id() as i32);
        let (mut mine, all) = (sched_getaffinity(Pid::from_raw(0)).unwrap(), processors(own).unwrap());
        // Tests may be bound to some of them.
        numbers(&all).into_iter().for_each(|cpu| mine.set(cpu).unwrap());
        assert_eq!(numbers(&mine), numbers(&all));
        assert!(!numbers(&all).is_empty());
    }
}
