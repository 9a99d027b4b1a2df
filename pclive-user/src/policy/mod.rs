//! Decisions, as pure functions over plain numbers: no I/O, no clock.

pub mod bandwidth;
pub mod convergence;
pub mod courtesy;
pub mod hot;
pub mod mode;
