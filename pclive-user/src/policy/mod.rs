//! Decisions, as pure functions over plain numbers: no I/O, no clock.

pub mod bandwidth;
