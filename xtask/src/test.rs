//! `cargo xtask test`: all tests, with every program they run built before.

mod failures;

use anyhow::{Context, Result};
use clap::Args;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use crate::build::{build_programs, cargo, show, succeeded};
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
    /// A program that a test has left behind may keep the output open for ever.
    const REST: Duration = Duration::from_secs(5);
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("start {command:?}"))?;
    let lines = BufReader::new(child.stdout.take().context("no output")?).split(b'\n');
    let failures = Arc::new(Mutex::new(Failures::default()));
    let (found, (ended, end)) = (failures.clone(), mpsc::channel::<()>());
    std::thread::spawn(move || {
        let _ended = ended;
        for line in lines.map_while(Result::ok) {
            found.lock().expect("no panic").line(&String::from_utf8_lossy(&line));
            // The tests go on, even if nobody reads what they say.
            let _ = std::io::stdout().write_all(&[&line[..], b"\n"].concat());
        }
    });
    let status = child.wait()?;
    let _ = end.recv_timeout(REST);
    let failures = failures.lock().expect("no panic");
    if !failures.is_empty() {
        writeln!(std::io::stdout(), "\n{failures}")?;
    }
    succeeded(command, status)
}
