//! Namespaces of a process: which they are, and running code in another network namespace (`namespaces(7)`).

use nix::sched::{CloneFlags, setns};
use pclive_wire::HostPid;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// The kinds of namespace that a process is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // the names that namespaces(7) uses
pub enum NamespaceKind {
    Cgroup,
    Ipc,
    Mount,
    Network,
    Pid,
    Time,
    User,
    Uts,
}

impl NamespaceKind {
    /// Every kind.
    pub const ALL: [Self; 8] =
        [Self::Cgroup, Self::Ipc, Self::Mount, Self::Network, Self::Pid, Self::Time, Self::User, Self::Uts];

    /// The kind's file in `/proc/PID/ns`.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Ipc => "ipc",
            Self::Mount => "mnt",
            Self::Network => "net",
            Self::Pid => "pid",
            Self::Time => "time",
            Self::User => "user",
            Self::Uts => "uts",
        }
    }

    fn path(self, pid: HostPid) -> PathBuf {
        format!("/proc/{pid}/ns/{}", self.file_name()).into()
    }
}

impl fmt::Display for NamespaceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.file_name())
    }
}

/// What went wrong with a namespace.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// `/proc/PID/ns/KIND` cannot be opened or read; the process may be gone.
    #[error("open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The thread that should enter the namespace cannot be made.
    #[error("start a thread for another network namespace")]
    Thread {
        /// Cause.
        source: io::Error,
    },
    /// `setns(2)` refuses.
    #[error("setns to a network namespace")]
    Enter {
        /// Cause.
        source: nix::Error,
    },
}

/// Identity of one namespace: device and inode of its file (`ioctl_ns(2)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NamespaceId {
    /// Device of nsfs.
    pub device: u64,
    /// Inode in nsfs.
    pub inode: u64,
}

/// The namespaces of one process. A kind that this kernel does not have is absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespaces([Option<NamespaceId>; NamespaceKind::ALL.len()]);

impl Namespaces {
    /// The namespace of the given kind.
    pub fn get(&self, kind: NamespaceKind) -> Option<NamespaceId> {
        self.0[kind as usize]
    }

    /// The kinds in which the two differ.
    pub fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = NamespaceKind> + 'a {
        NamespaceKind::ALL.into_iter().filter(|&kind| self.get(kind) != other.get(kind))
    }

    /// Whether both are in the same namespace of that kind.
    pub fn share(&self, other: &Self, kind: NamespaceKind) -> bool {
        self.get(kind) == other.get(kind)
    }
}

/// The namespaces of `pid`.
pub fn namespaces(pid: HostPid) -> Result<Namespaces, NamespaceError> {
    let mut found = [None; NamespaceKind::ALL.len()];
    for kind in NamespaceKind::ALL {
        let path = kind.path(pid);
        match std::fs::metadata(&path) {
            Ok(file) => found[kind as usize] = Some(NamespaceId { device: file.dev(), inode: file.ino() }),
            // A kernel without time namespaces, or a process that is gone: a second look tells.
            Err(error) if error.kind() == io::ErrorKind::NotFound && kind == NamespaceKind::Time => (),
            Err(source) => return Err(NamespaceError::Open { path, source }),
        }
    }
    Ok(Namespaces(found))
}

/// A descriptor for a namespace of `pid`, which keeps the namespace alive.
pub fn open_namespace(pid: HostPid, kind: NamespaceKind) -> Result<OwnedFd, NamespaceError> {
    let path = kind.path(pid);
    match File::open(&path) {
        Ok(file) => Ok(file.into()),
        Err(source) => Err(NamespaceError::Open { path, source }),
    }
}

/// Runs `f` in the network namespace `netns` and returns its result.
///
/// `f` runs on a thread of its own, because `setns(2)` moves a single thread and a thread of a pool would stay moved.
/// A socket that `f` makes belongs to `netns` for good and works from every thread. `/proc/sys/net` shows `netns` too.
pub fn run_in_netns<T: Send>(
    netns: BorrowedFd<'_>,
    f: impl FnOnce() -> T + Send,
) -> Result<T, NamespaceError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, move || {
                setns(netns, CloneFlags::CLONE_NEWNET).map_err(|source| NamespaceError::Enter { source })?;
                Ok(f())
            })
            .map_err(|source| NamespaceError::Thread { source })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::unshare;
    use std::os::fd::AsFd;

    fn own_pid() -> HostPid {
        HostPid(std::process::id() as i32)
    }

    /// A network namespace that exists as long as the descriptor.
    fn new_netns() -> OwnedFd {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap().into()
        })
        .join()
        .unwrap()
    }

    #[test]
    fn a_process_differs_from_another_in_the_unshared_kinds_only() {
        let mut child = std::process::Command::new("unshare")
            .args(["--net", "--uts", "sh", "-c", "echo ready; exec sleep 60"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let (own, other) = (namespaces(own_pid()).unwrap(), namespaces(HostPid(child.id() as i32)).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(own.differing(&other).collect::<Vec<_>>(), [NamespaceKind::Network, NamespaceKind::Uts]);
        assert!(own.share(&other, NamespaceKind::Pid));
        assert!(!own.share(&other, NamespaceKind::Network));
        let gone = namespaces(HostPid(child.id() as i32)).unwrap_err();
        assert!(gone.to_string().contains(&format!("/proc/{}/ns/", child.id())), "{gone}");
    }

    #[test]
    fn code_runs_in_the_other_namespace_and_the_caller_stays() {
        let netns = new_netns();
        let before = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let links =
            run_in_netns(netns.as_fd(), || std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
        assert_eq!(links.unwrap().lines().filter(|line| line.contains(':')).count(), 1, "only lo");
        assert_eq!(std::fs::read_link("/proc/thread-self/ns/net").unwrap(), before);
    }

    #[test]
    fn a_descriptor_that_is_no_network_namespace_is_refused() {
        let mount = open_namespace(own_pid(), NamespaceKind::Mount).unwrap();
        let error = run_in_netns(mount.as_fd(), || ()).unwrap_err();
        assert!(matches!(error, NamespaceError::Enter { source: nix::Error::EINVAL }), "{error:?}");
    }
}
