//! What the container's processes have in common: its root, its network namespace and its mounts.

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use pclive_wire::HostPid;
use std::collections::HashSet;
use std::os::fd::OwnedFd;

/// The surroundings of the container's PID 1, as this host sees them.
#[derive(Debug)]
pub struct ContainerEnv {
    /// PID 1 of the container on this host.
    pub init: HostPid,
    /// `/proc/INIT/root`, opened with `O_PATH`.
    pub root: OwnedFd,
    /// The container's network namespace.
    pub netns: OwnedFd,
    /// Ids of the mounts that the container can see; a file on any other mount came from outside.
    pub mounts: HashSet<u64>,
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
        Ok(Self {
            init,
            root: open_path("root", OFlag::O_PATH | OFlag::O_DIRECTORY)?,
            netns: open_path("ns/net", OFlag::O_RDONLY)?,
            mounts: parse_mount_ids(&mountinfo),
        })
    }
}

/// The mount ids (first field) of a `mountinfo` file (proc_pid_mountinfo(5)).
fn parse_mount_ids(mountinfo: &str) -> HashSet<u64> {
    mountinfo.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_ids_are_the_first_fields() {
        let text = "712 650 0:58 / / rw,relatime - overlay overlay rw,lowerdir=/a\\040b\n\
                    713 712 0:61 / /proc rw,nosuid shared:3 - proc proc rw\n";
        assert_eq!(parse_mount_ids(text), HashSet::from([712, 713]));
    }

    #[test]
    fn our_own_surroundings() {
        let env = ContainerEnv::open(HostPid(std::process::id() as i32)).unwrap();
        assert!(!env.mounts.is_empty());
        assert!(ContainerEnv::open(HostPid(i32::MAX)).is_err());
    }
}
