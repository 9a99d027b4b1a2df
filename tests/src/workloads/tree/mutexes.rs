//! The C library's mutexes and condition variables: two threads that take turns, and one that dies with a robust mutex.

use super::probe::{Findings, Probe};
use super::threads::Threads;
use nix::errno::Errno;
use nix::libc;
use std::cell::UnsafeCell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// A robust mutex and a condition variable that never move.
struct Monitor {
    mutex: UnsafeCell<libc::pthread_mutex_t>,
    changed: UnsafeCell<libc::pthread_cond_t>,
    /// Guarded by `mutex`.
    turn: UnsafeCell<u64>,
}

// SAFETY: the C library's objects are made for many threads, and `turn` is used with the mutex held.
unsafe impl Sync for Monitor {}

impl Monitor {
    fn new() -> &'static Self {
        let monitor = Box::leak(Box::new(Monitor {
            mutex: UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER),
            changed: UnsafeCell::new(libc::PTHREAD_COND_INITIALIZER),
            turn: UnsafeCell::new(0),
        }));
        // SAFETY: the attributes are initialized before use; nobody has the mutex yet.
        unsafe {
            let mut attributes = std::mem::zeroed();
            libc::pthread_mutexattr_init(&mut attributes);
            libc::pthread_mutexattr_setrobust(&mut attributes, libc::PTHREAD_MUTEX_ROBUST);
            libc::pthread_mutex_init(monitor.mutex.get(), &attributes);
            libc::pthread_mutexattr_destroy(&mut attributes);
        }
        monitor
    }

    fn lock(&self) -> nix::Result<()> {
        // SAFETY: initialized in `new`.
        check(unsafe { libc::pthread_mutex_lock(self.mutex.get()) })
    }

    fn try_lock(&self) -> nix::Result<()> {
        // SAFETY: initialized in `new`.
        check(unsafe { libc::pthread_mutex_trylock(self.mutex.get()) })
    }

    fn unlock(&self) -> nix::Result<()> {
        // SAFETY: initialized in `new`; the caller has it locked, or gets EPERM.
        check(unsafe { libc::pthread_mutex_unlock(self.mutex.get()) })
    }

    /// Makes good of a mutex whose owner died, and frees it.
    fn recover(&self) -> nix::Result<()> {
        // SAFETY: initialized in `new`.
        check(unsafe { libc::pthread_mutex_consistent(self.mutex.get()) })?;
        self.unlock()
    }

    /// Waits for an odd or an even turn and ends it.
    fn take_turn(&self, parity: u64) -> nix::Result<()> {
        self.lock()?;
        let mut result = Ok(());
        // SAFETY: the mutex is held whenever `turn` is used.
        unsafe {
            while *self.turn.get() % 2 != parity && result.is_ok() {
                result = check(libc::pthread_cond_wait(self.changed.get(), self.mutex.get()));
            }
            *self.turn.get() += 1;
            libc::pthread_cond_broadcast(self.changed.get());
        }
        self.unlock().and(result)
    }
}

fn check(result: i32) -> nix::Result<()> {
    if result == 0 { Ok(()) } else { Err(Errno::from_raw(result)) }
}

/// Starts the two that take turns.
///
/// # Errors
/// Those of starting a thread.
pub fn start_turns(threads: &mut Threads) -> io::Result<()> {
    let monitor = Monitor::new();
    let turn =
        move |parity| monitor.take_turn(parity).map_err(|error| format!("condition variable: {error}"));
    threads.repeat("ping", None, move || turn(0))?;
    threads.repeat("pong", None, move || {
        thread::sleep(Duration::from_millis(10));
        turn(1)
    })
}

/// A thread that holds a robust mutex and, when told, ends without unlocking it.
pub struct Robust {
    monitor: &'static Monitor,
    holder: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Robust {
    /// Starts the first.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn new() -> io::Result<Self> {
        let mut robust = Robust { monitor: Monitor::new(), holder: None };
        robust.start_holder()?;
        Ok(robust)
    }

    fn start_holder(&mut self) -> io::Result<()> {
        let monitor = self.monitor;
        let (end, told) = channel();
        let (ready, is_ready) = channel();
        let thread = thread::Builder::new().name("holder".into()).spawn(move || {
            // Held from here on, for good or until `recover`.
            let _ = ready.send(monitor.lock());
            let _ = told.recv();
        })?;
        self.holder = Some((end, thread));
        is_ready.recv().map_err(io::Error::other)?.map_err(Into::into)
    }

    fn try_check(&mut self, findings: &mut Findings) -> io::Result<()> {
        let Some((end, thread)) = self.holder.take() else { return self.start_holder() };
        let held = self.monitor.try_lock();
        findings.equal("locking a mutex that is held", Err(Errno::EBUSY), held);
        drop(end);
        let result = if held == Err(Errno::EBUSY) { patiently(|| self.monitor.try_lock()) } else { held };
        findings.equal("locking a mutex whose owner died", Err(Errno::EOWNERDEAD), result);
        match result {
            Err(Errno::EOWNERDEAD) => self.monitor.recover()?,
            _ => self.monitor = Monitor::new(),
        }
        let thread = thread.into_pthread_t();
        // SAFETY: a thread that nobody else joins.
        let join = || check(unsafe { libc::pthread_tryjoin_np(thread, std::ptr::null_mut()) });
        findings.equal("joining a thread that ended", Ok(()), patiently(join));
        self.start_holder()
    }
}

/// Repeats a call that says EBUSY, for a while.
fn patiently(call: impl Fn() -> nix::Result<()>) -> nix::Result<()> {
    let start = Instant::now();
    loop {
        match call() {
            Err(Errno::EBUSY) if start.elapsed() < Duration::from_secs(10) => {
                thread::sleep(Duration::from_millis(1))
            }
            result => return result,
        }
    }
}

impl Probe for Robust {
    fn name(&self) -> &'static str {
        "mutexes"
    }

    fn check(&mut self, findings: &mut Findings) {
        let result = self.try_check(findings);
        findings.succeed("use a robust mutex", result);
    }

    fn spoil(&mut self) {
        // Ends the holder before it is asked to.
        if let Some((end, _)) = &self.holder {
            let _ = end.send(());
            thread::sleep(Duration::from_millis(100));
        }
    }
}
