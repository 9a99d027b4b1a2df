//! `cargo xtask test`: all tests, with every program they run built before.

use anyhow::Result;
use clap::Args;

use crate::build::{build_programs, cargo, show};
use crate::setup::prepare;

#[derive(Args)]
pub struct Options {
    /// Further arguments for `cargo test`, such as `-p pclive-tests --test lab -- --nocapture`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    cargo_test: Vec<String>,
}

/// Runs the tests.
///
/// # Errors
/// When something does not build or a test fails.
pub fn test(options: &Options) -> Result<()> {
    prepare()?;
    build_programs()?;
    let mut test = cargo(["test"]);
    if !options.cargo_test.iter().any(|argument| argument == "-p" || argument.starts_with("--package")) {
        // Doctests and suites that fail do not keep the others from running.
        test.args(["--workspace", "--no-fail-fast"]);
    }
    show(test.args(&options.cargo_test))
}
