//! TODO

pub mod check;
