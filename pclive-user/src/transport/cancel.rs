//! Stopping a migration from outside: Ctrl-C, or the end of the server.

use super::error::{Error, Result, local};
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::signal::unix::{SignalKind, signal};

/// A request to stop, seen by everything that holds a clone. It interrupts waiting for a control message; work between
/// messages asks [`Cancellation::is_cancelled`] where it can stop.
#[derive(Clone, Debug)]
pub struct Cancellation(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cancelled: AtomicBool,
    /// Readable once cancelled, and never read: it wakes every `poll`, now and later.
    wake: EventFd,
}

impl Cancellation {
    /// Not cancelled yet.
    pub fn new() -> Result<Self> {
        let wake =
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(local("eventfd"))?;
        Ok(Self(Arc::new(Inner { cancelled: AtomicBool::new(false), wake })))
    }

    /// Asks to stop. Can be called any number of times.
    pub fn cancel(&self) {
        if !self.0.cancelled.swap(true, Ordering::SeqCst)
            && let Err(errno) = self.0.wake.write(1)
        {
            // Cannot happen: the counter is 0. The flag is still seen at the next message.
            tracing::warn!("write to an eventfd: {errno}");
        }
    }

    /// Whether stopping was asked for.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// An error if stopping was asked for.
    pub fn check(&self) -> Result {
        if self.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Cancels on SIGINT and SIGTERM from now on, for the rest of the process's life.
    pub fn watch_signals(&self) -> Result {
        let failed = |source| Error::Local("watch for signals", source);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
        let (mut interrupt, mut terminate) = {
            let _inside = runtime.enter();
            let watch = |kind| signal(kind).map_err(failed);
            (watch(SignalKind::interrupt())?, watch(SignalKind::terminate())?)
        };
        let cancellation = self.clone();
        let watch = move || {
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                    }
                    cancellation.cancel();
                }
            })
        };
        std::thread::Builder::new().name("signals".into()).spawn(watch).map_err(failed)?;
        Ok(())
    }

    /// To be polled together with a socket.
    pub(super) fn poll_fd(&self) -> PollFd<'_> {
        PollFd::new(self.0.wake.as_fd(), PollFlags::POLLIN)
    }
}
