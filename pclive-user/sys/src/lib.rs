//! Safe, typed wrappers around the kernel interfaces that pclive needs and no well-kept crate offers.
//!
//! This is the only crate of the workspace with `unsafe` code.

pub mod kcmp;
pub mod pidfd;
