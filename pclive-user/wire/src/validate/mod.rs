//! Checks a manifest from a peer before any of it is used.
//!
//! A manifest that passes refers only to what it has: processes to parents that come before them, descriptors to
//! descriptions, epoll sets to descriptors. Its mappings are sorted ranges of user pages, its byte strings have the
//! sizes that the kernel's structures have, its paths are absolute and without NUL. What only the destination's kernel
//! can judge (register values, socket options, capabilities) is left to it: it checks those for every process.

mod description;
mod process;
#[cfg(test)]
mod tests;

use crate::limits::{MAX_DESCRIPTIONS, MAX_PATH, MAX_PROCESSES};
use crate::manifest::{DescriptionId, Manifest, Process};
use crate::units::{NsPid, VirtAddr};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::fmt;

/// What is wrong with a manifest, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{at}: {fault}")]
pub struct ManifestError {
    /// The part that is wrong.
    pub at: Place,
    /// What is wrong with it.
    pub fault: Fault,
}

/// A part of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Place {
    Manifest,
    Process(NsPid),
    Thread(NsPid),
    Mapping(NsPid, VirtAddr),
    Descriptor(NsPid, i32),
    Description(DescriptionId),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manifest => f.write_str("manifest"),
            Self::Process(pid) => write!(f, "process {pid}"),
            Self::Thread(tid) => write!(f, "thread {tid}"),
            Self::Mapping(pid, start) => write!(f, "mapping {start} of process {pid}"),
            Self::Descriptor(pid, fd) => write!(f, "fd {fd} of process {pid}"),
            Self::Description(id) => write!(f, "description {}", id.0),
        }
    }
}

/// What can be wrong with a part of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Fault {
    #[error("{0} are missing or too many")]
    Count(Item),
    #[error("{0} has a size that it cannot have")]
    Size(Item),
    #[error("{0} is out of range")]
    Range(Item),
    #[error("{0} is used twice")]
    Duplicate(Item),
    #[error("{0} does not exist in this manifest")]
    Dangling(Item),
    #[error("{0} is not an absolute path without NUL")]
    Path(Item),
    #[error("the first process is not PID 1 without a parent, or the first thread not the leader")]
    Leader,
    #[error("mapping lies in or before the one before it")]
    Order,
    #[error("state is missing from the last manifest")]
    StateMissing,
    #[error("sizes of one shared object differ")]
    SharedSize,
    #[error("address family differs from the socket's")]
    Family,
}

/// The field that a [`Fault`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // fields of the manifest
pub enum Item {
    Processes,
    Threads,
    Mappings,
    Descriptions,
    Descriptors,
    Signals,
    Actions,
    Limits,
    Groups,
    Id,
    Parent,
    Executable,
    WorkingDirectory,
    BackingPath,
    FilePath,
    Addresses,
    AuxiliaryVector,
    Protection,
    MappingFlags,
    FileOffset,
    ExtendedState,
    SignalInfo,
    SignalNumber,
    Name,
    Rseq,
    Umask,
    Dumpable,
    OomScoreAdjustment,
    Timer,
    Stream,
    Contents,
    Capacity,
    EpollTarget,
    SocketAddress,
    SocketType,
    SocketPeer,
    Shutdown,
    Unsent,
    WindowScale,
    SegmentSize,
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = format!("{self:?}");
        for (i, c) in name.chars().enumerate() {
            if i > 0 && c.is_ascii_uppercase() {
                f.write_str(" ")?;
            }
            write!(f, "{}", c.to_ascii_lowercase())?;
        }
        Ok(())
    }
}

type Result<T = ()> = std::result::Result<T, ManifestError>;

impl Place {
    fn ensure(self, holds: bool, fault: Fault) -> Result {
        if holds { Ok(()) } else { Err(ManifestError { at: self, fault }) }
    }

    /// An absolute path as the kernel would take it.
    fn ensure_path(self, path: &[u8], item: Item) -> Result {
        let good = path.first() == Some(&b'/') && path.len() < MAX_PATH && !path.contains(&0);
        self.ensure(good, Fault::Path(item))
    }

    fn ensure_unique<T: std::hash::Hash + Eq>(self, seen: &mut HashSet<T>, value: T, item: Item) -> Result {
        self.ensure(seen.insert(value), Fault::Duplicate(item))
    }
}

/// Largest process id that Linux can be configured for (`PID_MAX_LIMIT`).
const PID_MAX: i32 = 4 << 20;

fn is_pid(pid: NsPid) -> bool {
    (1..=PID_MAX).contains(&pid.0)
}

impl Manifest {
    /// Checks everything that can be checked without looking at the destination.
    pub fn validate(&self) -> std::result::Result<(), ManifestError> {
        let at = Place::Manifest;
        let counted = (1..=MAX_PROCESSES).contains(&self.processes.len());
        at.ensure(counted, Fault::Count(Item::Processes))?;
        at.ensure(self.descriptions.len() <= MAX_DESCRIPTIONS, Fault::Count(Item::Descriptions))?;
        check_tree(&self.processes)?;
        let mut shared = HashMap::new();
        for process in &self.processes {
            process::check(process, self.last, self.descriptions.len(), &mut shared)?;
        }
        description::check_all(self)
    }
}

/// PID 1 first, parents before children, every id used once.
fn check_tree(processes: &[Process]) -> Result {
    let mut seen = HashSet::new();
    let mut parents = HashSet::from([NsPid(0)]);
    for (index, process) in processes.iter().enumerate() {
        let at = Place::Process(process.pid);
        let init = process.pid == NsPid(1) && process.ppid == NsPid(0);
        at.ensure(init == (index == 0), Fault::Leader)?;
        at.ensure(parents.contains(&process.ppid), Fault::Dangling(Item::Parent))?;
        // Group and session may be 0: led by a process outside the container.
        let groups_valid = [process.pgid, process.sid].iter().all(|id| id.0 == 0 || is_pid(*id));
        at.ensure(groups_valid, Fault::Range(Item::Id))?;
        let led = process.threads.first().is_some_and(|thread| thread.tid == process.pid);
        at.ensure(led, Fault::Leader)?;
        for thread in &process.threads {
            let at = Place::Thread(thread.tid);
            at.ensure(is_pid(thread.tid), Fault::Range(Item::Id))?;
            at.ensure_unique(&mut seen, thread.tid, Item::Id)?;
        }
        parents.insert(process.pid);
        // Only PID 1 has no parent.
        parents.remove(&NsPid(0));
    }
    Ok(())
}
