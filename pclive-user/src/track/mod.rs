//! Dirty sets: which pages were written since they were last read for sending.

pub mod pageset;
