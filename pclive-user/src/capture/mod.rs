//! Reads the state of a running or frozen container: one file per kind of state.
//!
//! Capture runs twice with the same code. Preflight surveys the running container and collects every [`Obstacle`]; after
//! the freeze the same functions read the final state, and an obstacle that appeared since is an error.

pub mod descriptors;
pub mod env;
pub mod files;
pub mod preflight;
pub mod proc;
pub mod process;
pub mod sockets;
pub mod threads;
pub mod tree;
pub mod vmas;

use pclive_wire::{HostPid, NsPid};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// How capture may treat the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The container runs: look at it, change nothing, leave contents (queues, pipes, ghost files) out.
    Survey,
    /// Every thread is stopped and the links are down: read everything.
    Frozen,
}

/// A process of the container at the source.
#[derive(Clone, Debug)]
pub struct SourceProcess {
    /// Thread group id on this host.
    pub pid: HostPid,
    /// Thread group id in the container.
    pub ns_pid: NsPid,
    /// Its parent, as the host numbers it.
    pub parent: HostPid,
    /// Process group, as the container numbers it; 0 if the leader is outside.
    pub pgid: NsPid,
    /// Session, as the container numbers it; 0 if the leader is outside.
    pub sid: NsPid,
    /// Handle that survives pid reuse; also the key to the process's descriptors (`pidfd_getfd(2)`, Linux 5.6).
    pub pidfd: Arc<OwnedFd>,
}

/// Something that pclive cannot move yet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Obstacle {
    /// Process that has it, as the container numbers it.
    pub pid: NsPid,
    /// The object: `fd 7`, `mapping 7f12…`, `namespace user` …
    pub object: String,
    /// What it is and why it cannot be moved.
    pub reason: String,
    /// What the operator can do.
    pub remedy: String,
}

/// Every obstacle found so far.
#[derive(Debug, Default)]
pub struct Obstacles(Vec<Obstacle>);

impl Obstacles {
    /// Adds an obstacle.
    pub fn add(
        &mut self,
        pid: NsPid,
        object: impl Into<String>,
        reason: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.0.push(Obstacle { pid, object: object.into(), reason: reason.into(), remedy: remedy.into() });
    }

    /// All obstacles, sorted by process and object, each once.
    pub fn into_sorted(mut self) -> Vec<Obstacle> {
        self.0.sort();
        self.0.dedup();
        self.0
    }

    /// Whether none was found.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
