//! Streams that belong to the runtime: at the destination they are replaced by what its own runtime gave the container.
//!
//! A description is such a stream if it leads out of the container (a file on a mount that the container cannot see, or
//! a pipe whose other end is held outside only) and some process has it as descriptor 0, 1 or 2.

use super::error::Refusal;
use pclive_wire::manifest::DescriptionKind;

/// The kind of a description that leads out of the container, `what` it is, and the standard stream it serves as, if any.
pub(super) fn capture(what: &str, stream: Option<u8>) -> Result<DescriptionKind, Refusal> {
    match stream {
        Some(stream) => Ok(DescriptionKind::Stdio { stream }),
        None => Err(Refusal::unsupported(
            format!("{what}, and it is no standard stream"),
            "start the container without passing it extra descriptors",
        )),
    }
}
