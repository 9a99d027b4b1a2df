//! What can go wrong between two hosts.

use nix::errno::Errno;
use pclive_wire::codec::CodecError;
use pclive_wire::control::RemoteError;
use pclive_wire::page_frame::PageFrameError;
use pclive_wire::validate::ManifestError;
use std::net::SocketAddr;
use std::time::Duration;

/// Why a connection failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A call on a socket failed.
    #[error("{call} {peer}")]
    Socket {
        /// What was tried: `connect to`, `send to` …
        call: &'static str,
        /// The other end.
        peer: SocketAddr,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// Cannot listen.
    #[error("listen on {address}")]
    #[allow(missing_docs)]
    Listen { address: SocketAddr, source: std::io::Error },
    /// A resource of this process is missing.
    #[error("{0}")]
    Local(&'static str, #[source] std::io::Error),
    /// The peer closed the connection.
    #[error("{0} closed the connection")]
    Closed(SocketAddr),
    /// Nothing came in time.
    #[error("no {what} from {peer} within {limit:?}")]
    #[allow(missing_docs)]
    TimedOut { what: &'static str, peer: SocketAddr, limit: Duration },
    /// [`super::Cancellation::cancel`] was called.
    #[error("cancelled")]
    Cancelled,
    /// A control frame is malformed.
    #[error("control frame from {peer}")]
    #[allow(missing_docs)]
    Frame { peer: SocketAddr, source: CodecError },
    /// A message of our own cannot be sent.
    #[error("message for {peer}")]
    #[allow(missing_docs)]
    Unsendable { peer: SocketAddr, source: CodecError },
    /// A page frame is malformed, or would be.
    #[error("page frame of the stream with {peer}")]
    #[allow(missing_docs)]
    PageFrame { peer: SocketAddr, source: PageFrameError },
    /// A manifest is malformed.
    #[error("manifest from {peer}")]
    #[allow(missing_docs)]
    Manifest { peer: SocketAddr, source: ManifestError },
    /// The destination refused the migration.
    #[error("refused by {peer}")]
    #[allow(missing_docs)]
    Refused { peer: SocketAddr, source: RemoteError },
    /// The peer sent a message that cannot come now.
    #[error("unexpected message from {peer}: {message}")]
    #[allow(missing_docs)]
    Unexpected { peer: SocketAddr, message: String },
}

/// Result of this module's functions.
pub type Result<T = (), E = Error> = std::result::Result<T, E>;

/// Names the call and the peer of a failed socket operation; for `map_err`.
pub(super) fn socket<E: Into<std::io::Error>>(
    call: &'static str,
    peer: SocketAddr,
) -> impl FnOnce(E) -> Error {
    move |source| Error::Socket { call, peer, source: source.into() }
}

/// Names what was tried in a failed local operation; for `map_err`.
pub(super) fn local(what: &'static str) -> impl FnOnce(Errno) -> Error {
    move |errno| Error::Local(what, errno.into())
}
