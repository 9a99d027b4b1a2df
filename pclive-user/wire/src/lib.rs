//! What both hosts agree on: units, the manifest, messages and frames, and their validation. No I/O.
//!
//! Everything that arrives from a peer is one of these types only after its bounds have been checked.

pub mod codec;
pub mod control;
pub mod facts;
pub mod layout;
pub mod limits;
pub mod manifest;
pub mod page_frame;
pub mod page_set;
pub mod phase;
pub mod units;
pub mod validate;

pub use page_set::PageSet;
pub use units::{HostPid, NsPid, PAGE_SIZE, PageRange, Round, VirtAddr};
