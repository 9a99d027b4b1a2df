//! The processors that a container may use: its cgroup's, by the controller `cpuset` of cgroup v2 or v1.
//!
//! A thread that may run on all of them is bound to none: it shall have those of the destination's cgroup there, whatever
//! their numbers, and follow when the operator changes them. The kernel does not tell the two apart in
//! `sched_getaffinity(2)`.

use super::cgroup::{CgroupError, is_v2, parse_membership, parse_mounts, read};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use pclive_sys::thread::numbers;
use pclive_wire::HostPid;
use std::path::{Path, PathBuf};

/// The cpuset of a process.
#[derive(Debug)]
pub struct Cpuset {
    /// The file that tells its processors; none if the kernel has no such controller, or it is not mounted.
    file: Option<PathBuf>,
}

impl Cpuset {
    /// That of `pid`.
    ///
    /// # Errors
    /// A file of procfs cannot be read.
    pub fn of(pid: HostPid) -> Result<Self, CgroupError> {
        let membership = read(&PathBuf::from(format!("/proc/{pid}/cgroup")))?;
        let mounts = read(Path::new("/proc/self/mountinfo"))?;
        Ok(Self { file: candidates(&membership, &mounts).into_iter().find(|path| path.exists()) })
    }

    /// What `sched_getaffinity(2)` says of threads in it that nobody has bound to processors: now all that it has, or those
    /// of them that every process of this host inherits from its first one (`CPUAffinity=` of systemd, `isolcpus=`).
    ///
    /// # Errors
    /// The file of cgroupfs cannot be read or understood.
    pub fn unbound(&self) -> Result<Vec<CpuSet>, CgroupError> {
        let inherited = sched_getaffinity(Pid::from_raw(1)).map_err(CgroupError::Affinity)?;
        let Some(path) = &self.file else { return Ok(vec![inherited]) };
        let line = read(path)?;
        let allowed = parse_list(line.trim_end())
            .ok_or_else(|| CgroupError::Format { path: path.clone(), line: line.clone() })?;
        let both = common(&allowed, &inherited);
        Ok(vec![allowed, both])
    }
}

/// The files that may tell the processors of a cgroup; the first that exists does. Where the controller is not enabled in a
/// cgroup of v2 that is one of those above it.
fn candidates(membership: &str, mounts: &str) -> Vec<PathBuf> {
    let (cgroup, mounts, name) = match parse_v1_membership(membership) {
        Some(cgroup) => (Some(cgroup), parse_mounts(mounts, is_v1_cpuset), "cpuset.effective_cpus"),
        None => (parse_membership(membership), parse_mounts(mounts, is_v2), "cpuset.cpus.effective"),
    };
    let path = cgroup.and_then(|cgroup| mounts.iter().find_map(|mount| mount.path_of(cgroup)));
    path.iter().flat_map(|path| path.ancestors()).map(|path| path.join(name)).collect()
}

/// The line of `/proc/PID/cgroup` that is about the controller of cgroup v1.
fn parse_v1_membership(text: &str) -> Option<&str> {
    text.lines().find_map(|line| {
        let (controllers, cgroup) = line.split_once(':')?.1.split_once(':')?;
        controllers.split(',').any(|controller| controller == "cpuset").then_some(cgroup)
    })
}

/// Whether a mount, told by type, source and options, is of the controller of cgroup v1.
fn is_v1_cpuset(kind: &str) -> bool {
    let options = kind.rsplit(' ').next().unwrap_or_default();
    kind.starts_with("cgroup ") && options.split(',').any(|option| option == "cpuset")
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

fn common(a: &CpuSet, b: &CpuSet) -> CpuSet {
    let mut both = CpuSet::new();
    for cpu in numbers(a).filter(|&cpu| b.is_set(cpu) == Ok(true)) {
        both.set(cpu).expect("the other sets have it");
    }
    both
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        let parsed = |list| parse_list(list).map(|cpus| numbers(&cpus).collect::<Vec<_>>());
        assert_eq!(parsed("3"), Some(vec![3]));
        assert_eq!(parsed("0-2,8,10-11"), Some(vec![0, 1, 2, 8, 10, 11]));
        assert_eq!((parsed(""), parsed("0-x"), parsed("99999")), (None, None, None));
        let both = common(&parse_list("0-4").unwrap(), &parse_list("3-9").unwrap());
        assert_eq!(numbers(&both).collect::<Vec<_>>(), [3, 4]);
    }

    #[test]
    fn the_file_is_that_of_the_hierarchy_with_the_controller() {
        const HYBRID: &str = "33 31 0:30 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset\n\
            32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cpuset rw,cpu\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let first = |membership| candidates(membership, HYBRID).into_iter().next();
        let v1 = first("5:cpu:/x\n3:net_cls,cpuset:/redis\n0::/redis\n");
        assert_eq!(v1, Some("/sys/fs/cgroup/cpuset/redis/cpuset.effective_cpus".into()));
        let unified = "41 31 0:38 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n";
        assert_eq!(
            candidates("0::/a/b\n", unified)[..3],
            ["a/b/", "a/", ""].map(|at| PathBuf::from(format!("/sys/fs/cgroup/{at}cpuset.cpus.effective")))
        );
        assert_eq!(candidates("", unified), [""; 0].map(PathBuf::from));
    }

    #[test]
    fn the_hosts_first_process_is_not_bound() {
        let first = HostPid(1);
        let mask = sched_getaffinity(Pid::from_raw(first.0)).unwrap();
        assert!(Cpuset::of(first).unwrap().unbound().unwrap().contains(&mask));
    }
}
