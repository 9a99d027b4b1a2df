//! What both hosts agree on: units, the manifest, and (in later modules) frames and their validation. No I/O.
//!
//! Everything that arrives from a peer is one of these types only after its bounds have been checked.

pub mod manifest;
pub mod units;

pub use units::{HostPid, NsPid, PAGE_SIZE, PageRange, Round, VirtAddr};
