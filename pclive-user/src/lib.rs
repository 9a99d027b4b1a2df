//! pclive: live migration of Linux containers with a blackout of milliseconds.
//!
//! ```text
//! source       track ──▶ capture ──▶ send ═══▶ receive ──▶ apply ──▶ resume      destination
//!            dirty sets   manifest,   frames,     frames,    skeleton   handoff,
//!            (eBPF+scan)  pages       zero-copy   validated  + uffd     tail
//! ```
#![forbid(unsafe_code)]

pub mod capture;
pub mod cli;
pub mod engine;
pub mod handoff;
pub mod host;
pub mod policy;
pub mod restore;
pub mod runtime;
pub mod track;
pub mod transport;
