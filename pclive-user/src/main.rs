//! The `pclive` command.
fn main() {}
