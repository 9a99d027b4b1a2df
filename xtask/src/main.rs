//! `cargo xtask setup|run|test|bench|vm`.
fn main() {}
