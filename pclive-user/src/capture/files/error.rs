//! What can go wrong, and what can be refused, while descriptors are read.

use crate::capture::proc::ProcError;
use crate::capture::sockets::SocketError;
use nix::errno::Errno;
use std::fmt;

/// Descriptors could not be read. Not an obstacle: the kernel refused a call that should have worked.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// A system call failed.
    #[error("{call} for {object}")]
    Call {
        /// The call.
        call: &'static str,
        /// The descriptor, with its process.
        object: String,
        /// Why it failed.
        #[source]
        errno: Errno,
    },
    /// A file of procfs could not be read.
    #[error("read {path}")]
    Proc {
        /// The file.
        path: String,
        /// Why not.
        #[source]
        error: std::io::Error,
    },
    /// The descriptors of a process could not be listed.
    #[error(transparent)]
    List(#[from] ProcError),
    /// The kernel's description of a descriptor lacks something.
    #[error("fdinfo of {object} has no usable `{field}`")]
    FdInfo {
        /// The descriptor, with its process.
        object: String,
        /// The missing field.
        field: &'static str,
    },
    /// A socket, or the tables of all sockets, could not be read.
    #[error("capture of {object}")]
    Socket {
        /// The descriptor, with its process, or all sockets.
        object: String,
        /// Why not.
        #[source]
        error: SocketError,
    },
}

impl FileError {
    /// For `map_err`: names the call and the object that it was made for.
    pub(super) fn call<'a>(
        call: &'static str,
        object: &'a dyn fmt::Display,
    ) -> impl FnOnce(Errno) -> Self + 'a {
        move |errno| Self::Call { call, object: object.to_string(), errno }
    }
}

/// Why a description got no [`pclive_wire::manifest::DescriptionKind`].
#[derive(Debug)]
pub(super) enum Refusal {
    /// pclive cannot move it: an obstacle.
    Unsupported {
        /// What it is and why it cannot be moved.
        reason: String,
        /// What the operator can do.
        remedy: String,
    },
    /// It is in a state that passes: trying again later helps.
    Transient(String),
    /// Reading it failed.
    Failed(FileError),
}

impl Refusal {
    pub(super) fn unsupported(reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Unsupported { reason: reason.into(), remedy: remedy.into() }
    }

    /// What a socket's error means for the description of `object`.
    pub(super) fn socket(error: SocketError, object: &dyn fmt::Display) -> Self {
        match error {
            SocketError::Unsupported { reason, remedy } => Self::Unsupported { reason, remedy },
            SocketError::Transient { reason } => Self::Transient(reason),
            error => Self::Failed(FileError::Socket { object: object.to_string(), error }),
        }
    }
}

impl From<FileError> for Refusal {
    fn from(error: FileError) -> Self {
        Self::Failed(error)
    }
}
