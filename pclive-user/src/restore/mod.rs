//! Builds the container at the destination: the mirror image of [`crate::capture`], file by file.

mod descriptors;
pub mod files;
pub mod memory;
pub mod parked;
mod process;
pub mod skeleton;
pub mod sockets;
mod threads;
mod timers;
mod vmas;

use pclive_wire::HostPid;
use std::os::fd::OwnedFd;

/// The sandbox that the container's own runtime made: namespaces, rootfs, cgroup, and an init that waits.
#[derive(Debug)]
pub struct Sandbox {
    /// The init on this host; PID 1 inside.
    pub init: HostPid,
    /// `/proc/INIT/root`, opened with `O_PATH`: container paths are resolved below it with `RESOLVE_IN_ROOT`.
    pub root: OwnedFd,
    /// The container's network namespace.
    pub netns: OwnedFd,
    /// What the destination's runtime gave the container as standard input, output and error.
    pub stdio: [OwnedFd; 3],
}
