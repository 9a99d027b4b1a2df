//! `cargo xtask test`: all tests, with every program they run built before.

mod failures;

use anyhow::{Context, Result, bail};
use clap::Args;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::process::{Command, Stdio};

use crate::build::{build_programs, cargo, show};
use crate::setup::prepare;
use failures::Failures;

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
    test.args(&options.cargo_test);
    // A terminal gets the runner's colours and each line as it grows; a log is read from its end.
    if std::io::stdout().is_terminal() { show(&mut test) } else { show_with_failures(&mut test) }
}

/// Runs the tests, passes their output on, and says again at the end what failed.
fn show_with_failures(command: &mut Command) -> Result<()> {
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("start {command:?}"))?;
    let mut failures = Failures::default();
    let mut output = std::io::stdout().lock();
    for line in BufReader::new(child.stdout.take().context("no output")?).split(b'\n') {
        let line = line.context("read the tests' output")?;
        failures.line(&String::from_utf8_lossy(&line));
        output.write_all(&[&line[..], b"\n"].concat())?;
    }
    let status = child.wait()?;
    if !failures.is_empty() {
        write!(output, "\n{failures}")?;
    }
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}
