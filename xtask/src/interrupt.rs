//! Ctrl-C while a lab stands.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use pclive_tests::lab::remove_own_labs;

/// Whether the user wants it to end.
static REQUESTED: AtomicBool = AtomicBool::new(false);

/// From now on an interrupt takes the labs of this process down before it ends it. To be called before any thread is
/// started: the signals are blocked in this one and in all that it starts, and taken by a thread of their own.
/// Programs that are run do not inherit that: the standard library unblocks all signals for them.
///
/// # Errors
/// When the signals cannot be blocked.
pub fn remove_labs_on_interrupt() -> Result<()> {
    on_interrupt(end)
}

/// As [`remove_labs_on_interrupt`], but the process goes on: whoever uses a lab notices that it is gone, sees that
/// [`requested`] is true and saves what it has. A second interrupt ends it.
///
/// # Errors
/// When the signals cannot be blocked.
pub fn stop_on_interrupt() -> Result<()> {
    on_interrupt(|signal| {
        if REQUESTED.load(Ordering::Relaxed) {
            end(signal);
        }
    })
}

/// Whether there was an interrupt.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// Removes the labs at each interrupt, after it was handed to `then`.
fn on_interrupt(then: impl Fn(Signal) + Send + 'static) -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block().context("block signals")?;
    std::thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            eprintln!("{signal}: removing the lab");
            then(signal);
            REQUESTED.store(true, Ordering::Relaxed);
            remove_labs();
        }
    });
    Ok(())
}

fn remove_labs() {
    if let Err(error) = remove_own_labs() {
        eprintln!("{error:#}; the next lab tries again");
    }
}

fn end(signal: Signal) {
    remove_labs();
    std::process::exit(128 + signal as i32);
}
