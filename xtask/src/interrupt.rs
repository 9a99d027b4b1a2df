//! Ctrl-C while a lab stands.

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use pclive_tests::lab::remove_own_labs;

/// From now on an interrupt takes the labs of this process down before it ends it. To be called before any thread is
/// started: the signals are blocked in this one and in all that it starts, and taken by a thread of their own.
/// Programs that are run do not inherit that: the standard library unblocks all signals for them.
///
/// # Errors
/// When the signals cannot be blocked.
pub fn remove_labs_on_interrupt() -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block().context("block signals")?;
    std::thread::spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        eprintln!("{signal}: removing the lab");
        if let Err(error) = remove_own_labs() {
            eprintln!("{error:#}; the next lab tries again");
        }
        std::process::exit(128 + signal as i32);
    });
    Ok(())
}
