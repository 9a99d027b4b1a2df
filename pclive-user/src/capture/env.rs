//! What the container's processes have in common: its root, its network namespace and its mounts.

use super::sockets::{SocketError, SocketTables};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open};
use nix::sys::stat::{FileStat, Mode, fstatat};
use pclive_wire::HostPid;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

/// The surroundings of the container's PID 1, as this host sees them.
#[derive(Debug)]
pub struct ContainerEnv {
    /// PID 1 of the container on this host.
    pub init: HostPid,
    /// `/proc/INIT/root`, opened with `O_PATH`.
    pub root: OwnedFd,
    /// The container's network namespace.
    pub netns: OwnedFd,
    /// The sockets of that namespace.
    pub sockets: Arc<SocketTables>,
    /// The mounts that the container can see, by id; a file on any other mount came from outside.
    mounts: HashMap<u64, Mount>,
}

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    /// Where, in the container.
    point: String,
    /// File system type.
    fs_type: String,
}

/// The surroundings could not be read.
#[derive(Debug, thiserror::Error)]
pub enum EnvError {
    /// A file of PID 1 could not be opened.
    #[error("open {path}")]
    Open {
        /// What was opened.
        path: String,
        /// Why not.
        #[source]
        errno: Errno,
    },
    /// The mount table could not be read.
    #[error("read {path}")]
    Read {
        /// What was read.
        path: String,
        /// Why not.
        #[source]
        error: std::io::Error,
    },
    /// The tables of its sockets could not be opened.
    #[error(transparent)]
    Sockets(#[from] SocketError),
}

impl ContainerEnv {
    /// Reads the surroundings of `init`.
    ///
    /// # Errors
    /// `init` is gone, or this process may not look at it.
    pub fn open(init: HostPid) -> Result<Self, EnvError> {
        let open_path = |name: &str, flags| {
            let path = format!("/proc/{init}/{name}");
            open(path.as_str(), flags | OFlag::O_CLOEXEC, Mode::empty())
                .map_err(|errno| EnvError::Open { path, errno })
        };
        let path = format!("/proc/{init}/mountinfo");
        let mountinfo = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) => return Err(EnvError::Read { path, error }),
        };
        let netns = open_path("ns/net", OFlag::O_RDONLY)?;
        Ok(Self {
            init,
            root: open_path("root", OFlag::O_PATH | OFlag::O_DIRECTORY)?,
            sockets: Arc::new(SocketTables::open(netns.as_fd())?),
            netns,
            mounts: parse_mounts(&mountinfo),
        })
    }

    /// Whether the container sees the mount with this id.
    pub fn has_mount(&self, id: u64) -> bool {
        self.mounts.contains_key(&id)
    }

    /// Whether the files on this mount are interfaces of the kernel.
    pub fn is_kernel_mount(&self, id: u64) -> bool {
        const KERNEL: [&str; 8] =
            ["proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs"];
        self.mounts.get(&id).is_some_and(|mount| KERNEL.contains(&mount.fs_type.as_str()))
    }

    /// Where file systems of this type are mounted.
    pub fn mounts_of_type(&self, fs_type: &str) -> impl Iterator<Item = &str> {
        self.mounts.values().filter(move |mount| mount.fs_type == fs_type).map(|mount| mount.point.as_str())
    }

    /// Whether a path, as procfs gives it (absolute, without symbolic links), leads to the inode of `stat` in the
    /// container.
    ///
    /// # Errors
    /// The path cannot be looked up for another reason than not existing.
    pub fn leads_to(&self, path: &[u8], stat: &FileStat) -> nix::Result<bool> {
        let relative = match path.strip_prefix(b"/") {
            Some([]) | None => OsStr::new("."),
            Some(relative) => OsStr::from_bytes(relative),
        };
        match fstatat(&self.root, relative, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(there) => Ok((there.st_dev, there.st_ino) == (stat.st_dev, stat.st_ino)),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ENAMETOOLONG) => Ok(false),
            Err(errno) => Err(errno),
        }
    }
}

/// The mounts of a `mountinfo` file (proc_pid_mountinfo(5)), by id.
fn parse_mounts(mountinfo: &str) -> HashMap<u64, Mount> {
    let parse = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ');
        let id = fields.next()?.parse().ok()?;
        let mount = Mount { point: fields.nth(3)?.into(), fs_type: after.split(' ').next()?.into() };
        Some((id, mount))
    };
    mountinfo.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_have_id_point_and_type() {
        let text = "712 650 0:58 / / rw,relatime - overlay overlay rw,lowerdir=/a\\040b\n\
                    713 712 0:61 / /dev/mqueue rw,nosuid shared:3 - mqueue mqueue rw\n";
        let mount = |point: &str, fs_type: &str| Mount { point: point.into(), fs_type: fs_type.into() };
        let mounts = [(712, mount("/", "overlay")), (713, mount("/dev/mqueue", "mqueue"))];
        assert_eq!(parse_mounts(text), HashMap::from(mounts));
    }

    #[test]
    fn our_own_surroundings() {
        let env = ContainerEnv::open(HostPid(std::process::id() as i32)).unwrap();
        assert!(!env.mounts.is_empty());
        assert!(ContainerEnv::open(HostPid(i32::MAX)).is_err());
    }
}
