//! The container's own OCI runtime: it made the container at the source, makes its sandbox at the destination, and owns
//! it afterwards.
//!
//! [`Runtime`] is what pclive asks of a runtime's command line, [`Bundle`] what it is given, [`Cgroup`] where the
//! processes are, [`Links`] how the world reaches them.

pub mod bundle;
pub mod cgroup;
mod command;
mod cpuset;
pub mod links;
mod oci;
mod runc;
mod sandbox;
#[cfg(test)]
mod testing;

pub use bundle::{Bundle, BundleError, ContainerId, InvalidContainerId};
pub use cgroup::{Cgroup, CgroupError};
pub use command::CommandError;
pub use cpuset::Cpuset;
pub use links::{LinkError, Links};
pub use runc::Runc;
pub use sandbox::SandboxProcess;

use nix::sys::signal::Signal;
use pclive_sys::mountns::CoverError;
use pclive_wire::HostPid;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// What a runtime says about a container (`state` in the OCI runtime specification).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerState {
    /// The container.
    pub id: ContainerId,
    /// Whether it runs.
    pub status: Status,
    /// PID 1 of the container; `None` once it has stopped.
    pub init: Option<HostPid>,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// Absolute path of the root file system on the host.
    pub rootfs: PathBuf,
    /// Whether it is a sandbox that pclive has made and not finished; see [`Runtime::finish_sandbox`].
    pub unfinished: bool,
}

/// Whether a runtime has room for the container of a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// It has no container of that name.
    Free,
    /// It had an unfinished sandbox that was made from this bundle; that is gone now.
    Cleared,
    /// It has another container of that name.
    Taken,
}

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being made.
    Creating,
    /// Made; its program not started.
    Created,
    /// Its program runs.
    Running,
    /// Frozen by the runtime.
    Paused,
    /// Its program has exited.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// An OCI runtime. Its commands are processes: every call blocks for some ten milliseconds, none belongs in the blackout.
pub trait Runtime: fmt::Debug + Send + Sync {
    /// What the runtime knows of a container.
    fn state(&self, id: &ContainerId) -> Result<ContainerState, RuntimeError>;

    /// Creates and starts the bundle's container with pclive's `init` in place of its program.
    ///
    /// `init` is a static executable in a memfd; it finds itself as descriptor 3 and `stdio` as 0, 1 and 2. It runs as
    /// root with every capability that pclive has and without seccomp, AppArmor or SELinux confinement. What later
    /// commands of the runtime (`exec`) give their processes stays what the bundle says. On failure nothing is left.
    ///
    /// It is marked as unfinished in the runtime's own record, from the moment when that exists.
    fn create_sandbox(
        &self,
        bundle: &Bundle,
        init: BorrowedFd<'_>,
        stdio: [BorrowedFd<'_>; 3],
    ) -> Result<SandboxProcess, RuntimeError>;

    /// Makes a sandbox a container like any other, by removing that mark: in one moment, and for good. To be called once.
    fn finish_sandbox(&self, id: &ContainerId) -> Result<(), RuntimeError>;

    /// Removes the sandbox that was made from `bundle` and is not finished, if there is one. Any other container of that
    /// name stays as it is. Because the bundle is locked, nobody else could finish that sandbox.
    fn make_room(&self, bundle: &Bundle) -> Result<Room, RuntimeError>;

    /// Sends a signal to the container's PID 1.
    fn kill(&self, id: &ContainerId, signal: Signal) -> Result<(), RuntimeError>;

    /// Kills whatever runs in the container and removes it; it need not exist.
    fn delete(&self, id: &ContainerId) -> Result<(), RuntimeError>;
}

/// The runtime with the given program, known by its file name, and root directory for its state.
pub fn open(program: &Path, root: Option<&Path>) -> Result<Box<dyn Runtime>, RuntimeError> {
    let root = root.map(Path::to_path_buf);
    match program.file_name().and_then(|name| name.to_str()) {
        Some("runc") => Ok(Box::new(Runc::new(program, root))),
        _ => Err(RuntimeError::Unsupported { program: program.to_path_buf() }),
    }
}

/// What went wrong with a runtime.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// No runtime that pclive knows how to use.
    #[error("{} is no runtime that pclive knows; it knows runc", program.display())]
    Unsupported {
        /// As given.
        program: PathBuf,
    },
    /// The runtime has no such container.
    #[error("no container {id} under {}: `list` shows the containers, --root chooses another directory", root.display())]
    NotFound {
        /// The container.
        id: ContainerId,
        /// The runtime's root directory.
        root: PathBuf,
    },
    /// A container of that name is there already.
    #[error(
        "container {id} exists already ({status}): `delete --force {id}` with the runtime makes room for it"
    )]
    Exists {
        /// The container.
        id: ContainerId,
        /// What it is doing.
        status: Status,
    },
    /// The runtime's command failed or could not be run.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The runtime's answer does not make sense.
    #[error("cannot understand what {command} says")]
    Answer {
        /// The command line.
        command: String,
        /// Cause.
        source: AnswerError,
    },
    /// The modified configuration cannot be shown to the runtime.
    #[error("cannot show the runtime a configuration for the sandbox")]
    Cover(#[from] CoverError),
    /// The sandbox's init is not there any more.
    #[error("the init of container {id} exited before it ran pclive's program")]
    InitExited {
        /// The container.
        id: ContainerId,
    },
    /// The sandbox's init does not become pclive's program.
    #[error("the init {pid} of container {id} still runs {} instead of pclive's program", exe.display())]
    InitTimeout {
        /// The container.
        id: ContainerId,
        /// The init.
        pid: HostPid,
        /// What `/proc/PID/exe` leads to.
        exe: PathBuf,
    },
    /// A call of our own on the init fails.
    #[error("{call} on the sandbox's init {pid}")]
    Init {
        /// The call.
        call: &'static str,
        /// The init.
        pid: HostPid,
        /// Cause.
        source: nix::Error,
    },
    /// The runtime's record of the container cannot be corrected.
    #[error("cannot {call} {}", path.display())]
    Record {
        /// What was being done.
        call: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The bundle's seccomp profile has something that the runtime's record cannot express.
    #[error("the seccomp profile of bundle {} {problem}", bundle.display())]
    Seccomp {
        /// The bundle.
        bundle: PathBuf,
        /// What is wrong, naming the value.
        problem: String,
    },
    /// The sandbox failed, and so did removing what there was of it.
    #[error("{error}; and removing the container failed too")]
    Undo {
        /// Why the sandbox failed.
        error: Box<RuntimeError>,
        /// Why it could not be removed.
        source: Box<RuntimeError>,
    },
}

/// What is wrong with an answer of the runtime.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// No JSON, or not with the fields that it must have.
    #[error("not the expected JSON")]
    Json(#[from] serde_json::Error),
    /// The answer is about another container.
    #[error("it is about container {0:?}")]
    OtherContainer(String),
}
