//! What can go wrong while files are opened.

use nix::errno::Errno;
use std::fmt;

/// A description could not be made at the destination.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// A socket.
    #[error(transparent)]
    Socket(#[from] crate::restore::sockets::RestoreError),
    /// A system call failed.
    #[error("{call} for {object}")]
    Call {
        /// The call.
        call: &'static str,
        /// What it was made for.
        object: String,
        /// Why it failed.
        #[source]
        errno: Errno,
    },
    /// The file at the destination has another size than at the source.
    #[error("{path} has {found} bytes here and {expected} at the source")]
    Size {
        /// The file.
        path: String,
        /// Its size at the source.
        expected: u64,
        /// Its size here.
        found: u64,
    },
    /// The path leads to a file of another type than at the source.
    #[error("{path} is not the {expected} that it is at the source")]
    Type {
        /// The path.
        path: String,
        /// What it should be.
        expected: &'static str,
    },
    /// The source asks for a kernel interface to be opened for writing with this host's privileges.
    #[error("{path} belongs to the kernel and may not be opened for writing")]
    KernelFile {
        /// The path.
        path: String,
    },
    /// A standard stream that does not exist.
    #[error("standard stream {stream}")]
    Stream {
        /// What the source asks for.
        stream: u8,
    },
    /// A pipe does not take what the source's pipe had.
    #[error("pipe {pipe} takes {written} of {length} bytes")]
    PipeFull {
        /// Number of the pipe in the manifest.
        pipe: u32,
        /// Bytes that were in it.
        length: usize,
        /// Bytes that fit.
        written: usize,
    },
    /// Made elsewhere, and missing there.
    #[error("{what} was not made")]
    NotHere {
        /// What is missing.
        what: String,
    },
}

impl FileError {
    /// For `map_err`: names the call and the object that it was made for.
    pub(super) fn call(call: &'static str, object: impl fmt::Display) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::Call { call, object: object.to_string(), errno }
    }
}
