//! The container's cgroup v2 directory: who is in it, and freezing all of them (`cgroups(7)`; freezer: Linux 5.2).

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pclive_wire::HostPid;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Deepest nesting below the container that is followed.
const MAX_DEPTH: usize = 64;

/// What went wrong with a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file of procfs or cgroupfs cannot be used.
    #[error("cannot {call} {}", path.display())]
    File {
        /// What was being done.
        call: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Waiting for a change of `cgroup.events` fails.
    #[error("poll {}", path.display())]
    Poll {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: Errno,
    },
    /// No cgroup2 file system is mounted.
    #[error(
        "no cgroup2 file system is mounted: `mount -t cgroup2 none /sys/fs/cgroup/unified` makes one visible"
    )]
    NotMounted,
    /// The process is outside the part of the hierarchy that is mounted here.
    #[error("process {pid} is in cgroup {cgroup}, which is not below any cgroup2 mount here")]
    NotVisible {
        /// The process.
        pid: HostPid,
        /// Its cgroup, as `/proc/PID/cgroup` names it.
        cgroup: String,
    },
    /// The process is in the root cgroup, which cannot be frozen and does not tell the container from the host.
    #[error(
        "process {0} is in the root cgroup: its runtime gave the container no cgroup v2 directory of its own"
    )]
    Root(HostPid),
    /// A file of cgroupfs says something unexpected.
    #[error("cannot understand {}: {line:?}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What it says.
        line: String,
    },
    /// The cgroup did not become frozen, or thawed, in time.
    #[error("{} did not become {} within {} ms", path.display(), if *.frozen { "frozen" } else { "thawed" }, limit.as_millis())]
    TimedOut {
        /// The cgroup.
        path: PathBuf,
        /// What it should have become.
        frozen: bool,
        /// How long was waited.
        limit: Duration,
    },
    /// The processors of the host's first process cannot be told.
    #[error("sched_getaffinity")]
    Affinity(#[source] Errno),
    /// The cgroup changes faster than it can be listed.
    #[error("{} is nested deeper than 64 levels", .0.display())]
    TooDeep(PathBuf),
}

/// A cgroup v2 directory with everything below it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    id: u64,
    events: File,
}

impl Cgroup {
    /// The cgroup of a process: of PID 1 of the container, that is the container's.
    pub fn of(pid: HostPid) -> Result<Self, CgroupError> {
        let membership = read(&PathBuf::from(format!("/proc/{pid}/cgroup")))?;
        let mounts = read(Path::new("/proc/self/mountinfo"))?;
        let cgroup = parse_membership(&membership).ok_or(CgroupError::NotMounted)?;
        let mounts = parse_mounts(&mounts, is_v2);
        if mounts.is_empty() {
            return Err(CgroupError::NotMounted);
        }
        if cgroup == "/" {
            return Err(CgroupError::Root(pid));
        }
        let path = mounts
            .iter()
            .find_map(|mount| mount.path_of(cgroup))
            .ok_or_else(|| CgroupError::NotVisible { pid, cgroup: cgroup.into() })?;
        Self::open(path)
    }

    fn open(path: PathBuf) -> Result<Self, CgroupError> {
        let metadata = std::fs::metadata(&path).map_err(file_error("open", &path))?;
        let events = path.join("cgroup.events");
        let events = File::open(&events).map_err(file_error("open", &events))?;
        Ok(Self { id: metadata.ino(), path, events })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What `bpf_get_current_cgroup_id` returns for its processes: the directory's inode number (Linux 5.5).
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Every process in the cgroup and below it, in no order. Complete only if it is frozen.
    pub fn processes(&self) -> Result<Vec<HostPid>, CgroupError> {
        let mut found = Vec::new();
        collect(&self.path, 0, &mut found)?;
        Ok(found)
    }

    /// Stops every process, and returns once all are stopped, whatever they were doing.
    ///
    /// # Errors
    /// [`CgroupError::TimedOut`] if a process stays in the kernel longer than `limit`; the cgroup is thawed again.
    pub fn freeze(&self, limit: Duration) -> Result<(), CgroupError> {
        let result = self.write_freeze("1").and_then(|()| self.wait(true, limit));
        if result.is_err() {
            // The error that counts is the first; a cgroup that is gone cannot be thawed either.
            let _ = self.write_freeze("0");
        }
        result
    }

    /// Lets every process go on, and returns once the kernel says so.
    pub fn thaw(&self, limit: Duration) -> Result<(), CgroupError> {
        self.write_freeze("0")?;
        self.wait(false, limit)
    }

    /// The file by which it is frozen and thawed.
    pub fn freezer(&self) -> Result<File, CgroupError> {
        let path = self.path.join("cgroup.freeze");
        File::options().write(true).open(&path).map_err(file_error("open", &path))
    }

    /// Whether every process is stopped now.
    pub fn is_frozen(&self) -> Result<bool, CgroupError> {
        let path = self.path.join("cgroup.events");
        let mut text = String::new();
        let mut events = &self.events;
        // Reading from the start also arms the next notification (`kernfs_fop_poll` in fs/kernfs/file.c).
        events.rewind().map_err(file_error("rewind", &path))?;
        events.read_to_string(&mut text).map_err(file_error("read", &path))?;
        match text.lines().find_map(|line| line.strip_prefix("frozen ")) {
            Some("0") => Ok(false),
            Some("1") => Ok(true),
            _ => Err(CgroupError::Format { path, line: text }),
        }
    }

    fn write_freeze(&self, value: &str) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.freeze");
        std::fs::write(&path, value).map_err(file_error("write", &path))
    }

    fn wait(&self, frozen: bool, limit: Duration) -> Result<(), CgroupError> {
        let deadline = Instant::now() + limit;
        while self.is_frozen()? != frozen {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CgroupError::TimedOut { path: self.path.clone(), frozen, limit });
            }
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.events.as_fd(), PollFlags::POLLPRI)], timeout) {
                Ok(_) | Err(Errno::EINTR) => (),
                Err(source) => {
                    return Err(CgroupError::Poll { path: self.path.join("cgroup.events"), source });
                }
            }
        }
        Ok(())
    }
}

/// Adds the processes of `directory` and of every directory below it.
fn collect(directory: &Path, depth: usize, found: &mut Vec<HostPid>) -> Result<(), CgroupError> {
    if depth > MAX_DEPTH {
        return Err(CgroupError::TooDeep(directory.to_path_buf()));
    }
    let path = directory.join("cgroup.procs");
    let text = match read(&path) {
        // A cgroup below may be removed meanwhile; EOPNOTSUPP says that it is threaded and the list is in its parent.
        Err(CgroupError::File { source, .. }) if depth > 0 && is_gone_or_threaded(&source) => String::new(),
        text => text?,
    };
    for line in text.lines() {
        let pid = line.parse().map_err(|_| CgroupError::Format { path: path.clone(), line: line.into() })?;
        found.push(HostPid(pid));
    }
    let entries = match std::fs::read_dir(directory) {
        Err(error) if depth > 0 && is_gone_or_threaded(&error) => return Ok(()),
        entries => entries.map_err(file_error("list", directory))?,
    };
    for entry in entries.filter_map(Result::ok) {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth + 1, found)?;
        }
    }
    Ok(())
}

fn is_gone_or_threaded(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP))
}

/// A mounted part of a cgroup hierarchy.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mount<'a> {
    /// Which cgroup is visible at the mount point, as this process's cgroup namespace names it.
    root: &'a str,
    point: PathBuf,
}

impl Mount<'_> {
    /// Where `cgroup` is visible.
    pub(super) fn path_of(&self, cgroup: &str) -> Option<PathBuf> {
        let below = match self.root {
            "/" => cgroup,
            root => cgroup.strip_prefix(root).filter(|rest| rest.is_empty() || rest.starts_with('/'))?,
        };
        // A cgroup outside this process's cgroup namespace is named /../x, which would lead out of the mount.
        let leads_out = below.split('/').any(|part| part == "..");
        (!leads_out).then(|| self.point.join(below.trim_start_matches('/')))
    }
}

/// The cgroup v2 line of `/proc/PID/cgroup`. A removed cgroup is marked; such a process has exited.
pub(super) fn parse_membership(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::")).filter(|path| !path.ends_with(" (deleted)"))
}

/// Whether a mount, told by type, source and options, is of cgroup v2.
pub(super) fn is_v2(kind: &str) -> bool {
    kind.starts_with("cgroup2 ")
}

/// The mounts in `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`) whose type, source and options are `wanted`.
pub(super) fn parse_mounts(text: &str, wanted: impl Fn(&str) -> bool) -> Vec<Mount<'_>> {
    let parse = |line| -> Option<Mount<'_>> {
        let (fields, rest) = str::split_once(line, " - ")?;
        let mut fields = fields.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        wanted(rest).then(|| Mount { root, point: unescape(point).into() })
    };
    text.lines().filter_map(parse).collect()
}

/// Undoes the octal escapes of space, tab, newline and backslash (`mangle` in fs/proc_namespace.c).
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(field.to_owned(), |text, (escape, character)| text.replace(escape, character))
}

pub(super) fn read(path: &Path) -> Result<String, CgroupError> {
    std::fs::read_to_string(path).map_err(file_error("read", path))
}

fn file_error(call: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_path_buf();
    move |source| CgroupError::File { call, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    const LIMIT: Duration = Duration::from_secs(2);

    /// A cgroup with processes in it and in one below it; removed at the end.
    struct Lab {
        path: PathBuf,
        children: Vec<Child>,
    }

    impl Lab {
        fn new(name: &str) -> Self {
            let mounts = read(Path::new("/proc/self/mountinfo")).unwrap();
            let path =
                parse_mounts(&mounts, is_v2)[0].point.join(format!("runtime-{name}-{}", std::process::id()));
            std::fs::create_dir_all(path.join("below")).unwrap();
            let children = ["", "", "below"].map(|place| {
                let child = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
                std::fs::write(path.join(place).join("cgroup.procs"), child.id().to_string()).unwrap();
                child
            });
            Self { path, children: children.into() }
        }

        fn pid(&self, index: usize) -> HostPid {
            HostPid(self.children[index].id() as i32)
        }

        /// User time of all children, in clock ticks.
        fn cpu_time(&self) -> u64 {
            let stat = |child: &Child| std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
            let time = |text: String| text.split(' ').nth(13).unwrap().parse::<u64>().unwrap();
            self.children.iter().map(stat).map(time).sum()
        }
    }

    impl Drop for Lab {
        fn drop(&mut self) {
            for child in &mut self.children {
                let _ = child.kill();
                let _ = child.wait();
            }
            let _ = std::fs::remove_dir(self.path.join("below"));
            let _ = std::fs::remove_dir(&self.path);
        }
    }

    #[test]
    fn processes_of_the_cgroup_and_below_are_found_from_its_first_process() {
        let lab = Lab::new("list");
        let cgroup = Cgroup::of(lab.pid(0)).unwrap();
        assert_eq!(cgroup.path(), lab.path);
        assert_eq!(cgroup.id(), std::fs::metadata(&lab.path).unwrap().ino());
        let mut found = cgroup.processes().unwrap();
        let mut expected = vec![lab.pid(0), lab.pid(1), lab.pid(2)];
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
        assert_eq!(Cgroup::of(lab.pid(2)).unwrap().processes().unwrap(), [lab.pid(2)]);
    }

    #[test]
    fn frozen_processes_stand_still_until_thawed() {
        let lab = Lab::new("freeze");
        let cgroup = Cgroup::of(lab.pid(0)).unwrap();
        assert!(!cgroup.is_frozen().unwrap());
        cgroup.freeze(LIMIT).unwrap();
        assert!(cgroup.is_frozen().unwrap());
        let stand_still_for = |ms| {
            let before = lab.cpu_time();
            std::thread::sleep(Duration::from_millis(ms));
            lab.cpu_time() == before
        };
        // A task counts as frozen a moment before it leaves its processor.
        let deadline = Instant::now() + LIMIT;
        while !stand_still_for(20) && Instant::now() < deadline {}
        assert!(stand_still_for(100));
        let before = lab.cpu_time();
        cgroup.freeze(LIMIT).unwrap();
        cgroup.thaw(LIMIT).unwrap();
        assert!(!cgroup.is_frozen().unwrap());
        let deadline = Instant::now() + LIMIT;
        while lab.cpu_time() == before && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(lab.cpu_time() > before);
    }

    #[test]
    fn a_freeze_that_does_not_come_about_in_time_is_taken_back() {
        let lab = Lab::new("late");
        let cgroup = Cgroup::of(lab.pid(0)).unwrap();
        let stopped = cgroup.freeze(Duration::ZERO);
        // A quick kernel may be done before the first look.
        if let Err(error) = stopped {
            assert!(matches!(error, CgroupError::TimedOut { frozen: true, .. }), "{error}");
            cgroup.thaw(LIMIT).unwrap();
        }
    }

    #[test]
    fn mounts_and_memberships_are_read_as_the_kernel_writes_them() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
            32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        let mounts = parse_mounts(hybrid, is_v2);
        assert_eq!(mounts, [Mount { root: "/", point: "/sys/fs/cgroup/unified".into() }]);
        assert_eq!(mounts[0].path_of("/a/b").unwrap(), Path::new("/sys/fs/cgroup/unified/a/b"));
        assert_eq!(mounts[0].path_of("/../b"), None);
        let part = Mount { root: "/a", point: "/m n".into() };
        assert_eq!(part.path_of("/a/b").unwrap(), Path::new("/m n/b"));
        assert_eq!(part.path_of("/ab"), None);
        assert_eq!(parse_mounts("41 31 0:38 /a /m\\040n rw - cgroup2 cgroup2 rw\n", is_v2), [part]);
        assert_eq!(parse_membership("9:name=systemd:/x\n0::/redis\n"), Some("/redis"));
        assert_eq!(parse_membership("9:name=systemd:/x\n"), None);
        assert_eq!(parse_membership("0::/redis (deleted)\n"), None);
    }

    #[test]
    fn the_root_cgroup_is_no_container() {
        assert!(matches!(Cgroup::of(HostPid(1)).unwrap_err(), CgroupError::Root(HostPid(1))));
    }
}
