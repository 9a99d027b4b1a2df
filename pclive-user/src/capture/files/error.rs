//! What can go wrong, and what can be refused, while descriptors are read.

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
    /// The kernel's description of a descriptor lacks something.
    #[error("fdinfo of {object} has no usable `{field}`")]
    FdInfo {
        /// The descriptor, with its process.
        object: String,
        /// The missing field.
        field: &'static str,
    },
}

impl FileError {
    /// For `map_err`: names the call and the object that it was made for.
    pub(super) fn call(call: &'static str, object: &dyn fmt::Display) -> impl FnOnce(Errno) -> Self {
        let object = object.to_string();
        move |errno| Self::Call { call, object, errno }
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
    /// Reading it failed.
    Failed(FileError),
}

impl Refusal {
    pub(super) fn unsupported(reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Unsupported { reason: reason.into(), remedy: remedy.into() }
    }
}

impl From<FileError> for Refusal {
    fn from(error: FileError) -> Self {
        Self::Failed(error)
    }
}
