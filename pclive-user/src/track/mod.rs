//! Dirty sets: which pages were written since they were last read for sending.

pub mod attach;
pub mod btf;
pub mod digests;
pub mod heat;
mod last_look;
pub mod mapping_flags;
pub mod observer;
pub mod option_watch;
pub mod programs;
pub mod tier;

pub use heat::Heat;
pub use observer::WriteObserver;
pub use tier::{Tier, Tracker};
