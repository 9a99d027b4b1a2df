//! Signals: handlers, the alternate stack, pending ones with their values, a signalfd.
//!
//! One thread, [`serve`], receives; all others keep these signals blocked, so that a call there that returns EINTR has
//! no signal to blame. Handlers do no more than write down that they ran, and how, in atomic variables.

use super::probe::{Findings, Probe};
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, getpid, gettid, getuid};
use std::io;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Real-time signals by their use; the C library keeps 32 and 33 for itself.
pub const TIMER: i32 = 40;
/// From a timer that names the thread.
pub const THREAD_TIMER: i32 = 41;
/// Blocked and pending for the process, twice.
const PENDING: i32 = 42;
/// Blocked and pending for the main thread.
const PENDING_THREAD: i32 = 43;
/// Blocked, pending, and readable from a signalfd.
const READABLE: i32 = 44;
/// Handled on the alternate stack.
const ON_ALTERNATE_STACK: i32 = libc::SIGUSR1;
/// Handled on the ordinary stack.
const ON_STACK: i32 = libc::SIGUSR2;
/// What [`serve`] receives.
const SERVED: [i32; 6] = [ON_ALTERNATE_STACK, ON_STACK, libc::SIGALRM, libc::SIGVTALRM, TIMER, THREAD_TIMER];
/// `SI_QUEUE` of `sigqueue(3)`.
const SI_QUEUE: i32 = -1;
const ALTERNATE_STACK: usize = 64 << 10;

/// What a handler wrote down.
#[derive(Debug)]
struct Note {
    count: AtomicU64,
    value: AtomicUsize,
    code: AtomicI32,
    thread: AtomicI32,
    stack: AtomicUsize,
}

static NOTES: [Note; 65] = [const {
    Note {
        count: AtomicU64::new(0),
        value: AtomicUsize::new(0),
        code: AtomicI32::new(0),
        thread: AtomicI32::new(0),
        stack: AtomicUsize::new(0),
    }
}; 65];
/// The thread that runs [`serve`], and its alternate stack.
static SERVER: AtomicI32 = AtomicI32::new(0);
static SERVER_STACK: AtomicUsize = AtomicUsize::new(0);

/// How often the handler of `signal` ran.
pub fn count(signal: i32) -> u64 {
    NOTES[signal as usize].count.load(Ordering::Acquire)
}

/// The thread that receives signals.
pub fn server() -> i32 {
    SERVER.load(Ordering::Acquire)
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let note = &NOTES[signal as usize];
    // SAFETY: the kernel passes a siginfo_t; every signal used here has a value in it.
    let (code, value) = unsafe { ((*info).si_code, (*info).si_value().sival_ptr.addr()) };
    note.code.store(code, Ordering::Relaxed);
    note.value.store(value, Ordering::Relaxed);
    note.thread.store(gettid().as_raw(), Ordering::Relaxed);
    note.stack.store((&raw const code).addr(), Ordering::Relaxed);
    note.count.fetch_add(1, Ordering::Release);
}

/// Lets [`count`] and its like follow a signal.
///
/// # Errors
/// Those of `sigaction(2)`.
pub fn follow(signal: i32, flags: i32) -> io::Result<()> {
    // SAFETY: all-zero is a good sigaction (an empty mask); the handler is async-signal-safe.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = flags | libc::SA_SIGINFO;
        libc::sigaddset(&mut action.sa_mask, libc::SIGWINCH);
        libc::sigaction(signal, &action, std::ptr::null_mut())
    };
    Errno::result(result).map(drop).map_err(Into::into)
}

/// A set also of real-time signals, which nix has no names for.
fn set_of(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: sigemptyset initializes it, whatever it held.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for &signal in signals {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}

fn as_nix(set: libc::sigset_t) -> SigSet {
    // SAFETY: made by `set_of`.
    unsafe { SigSet::from_sigset_t_unchecked(set) }
}

/// Blocks everything that this module uses, in the calling thread and all that it starts, and installs the handlers.
///
/// # Errors
/// Those of `sigaction(2)`.
pub fn prepare() -> io::Result<()> {
    let all: Vec<i32> = SERVED.into_iter().chain([PENDING, PENDING_THREAD, READABLE]).collect();
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&as_nix(set_of(&all))), None)?;
    for signal in SERVED {
        let stack = if signal == ON_ALTERNATE_STACK { libc::SA_ONSTACK } else { 0 };
        follow(signal, stack | if signal == ON_STACK { libc::SA_NODEFER } else { libc::SA_RESTART })?;
    }
    // SAFETY: ignoring a signal installs no code.
    unsafe { libc::signal(libc::SIGWINCH, libc::SIG_IGN) };
    Ok(())
}

/// The life of the thread that receives; `beat` is called after each signal.
pub fn serve(mut beat: impl FnMut(Result<(), String>)) {
    let stack = Vec::leak(vec![0u8; ALTERNATE_STACK]);
    let wanted = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
    let mut found = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    // SAFETY: the stack is leaked, hence always there.
    unsafe { libc::sigaltstack(&wanted, std::ptr::null_mut()) };
    SERVER_STACK.store(wanted.ss_sp.addr(), Ordering::Release);
    let open = as_nix(set_of(&SERVED));
    // From here on handlers may run, here and nowhere else.
    if let Err(error) = pthread_sigmask(SigmaskHow::SIG_UNBLOCK, Some(&open), None) {
        beat(Err(format!("pthread_sigmask: {error}")));
    }
    SERVER.store(gettid().as_raw(), Ordering::Release);
    loop {
        // SAFETY: waits for a handler to run.
        unsafe { libc::pause() };
        // SAFETY: reads the current setting.
        unsafe { libc::sigaltstack(std::ptr::null(), &mut found) };
        let same = (found.ss_sp, found.ss_size) == (wanted.ss_sp, wanted.ss_size);
        beat(if same { Ok(()) } else { Err(format!("the alternate stack is at {:?} now", found.ss_sp)) });
    }
}

/// The part of a siginfo_t that `rt_sigqueueinfo(2)` fills.
#[repr(C)]
struct Queued {
    signal: i32,
    errno: i32,
    code: i32,
    padding: i32,
    pid: i32,
    uid: u32,
    value: usize,
    rest: [u64; 12],
}
const _: () = assert!(size_of::<Queued>() == 128);

/// Sends a signal with a value to this process, or to one thread of it.
fn queue(signal: i32, value: usize, thread: Option<Pid>) -> io::Result<()> {
    let (pid, uid) = (getpid().as_raw(), getuid().as_raw());
    let mut info = Queued { signal, errno: 0, code: SI_QUEUE, padding: 0, pid, uid, value, rest: [0; 12] };
    // SAFETY: both calls read 128 bytes of siginfo.
    let result = unsafe {
        match thread {
            Some(tid) => libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid.as_raw(), signal, &raw mut info),
            None => libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, &raw mut info),
        }
    };
    Errno::result(result).map(drop).map_err(Into::into)
}

/// Takes a pending signal: code, sender and value.
fn take(signal: i32) -> Option<(i32, i32, usize)> {
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: all-zero is a good siginfo_t, which the call fills; all signals taken here carry a value.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let taken = libc::sigtimedwait(&set_of(&[signal]), &mut info, &none) == signal;
        taken.then(|| (info.si_code, info.si_pid(), info.si_value().sival_ptr.addr()))
    }
}

/// See the module.
#[derive(Debug)]
pub struct Signals {
    readable: SignalFd,
    main: Pid,
    sent: usize,
}

impl Signals {
    /// Makes the pending signals. Call on the thread that will check, after [`prepare`].
    ///
    /// # Errors
    /// Those of `sigqueue(3)` and `signalfd(2)`.
    pub fn new() -> io::Result<Self> {
        let readable = SignalFd::with_flags(&as_nix(set_of(&[READABLE])), SfdFlags::SFD_NONBLOCK)?;
        let signals = Signals { readable, main: gettid(), sent: 0 };
        signals.make_pending()?;
        Ok(signals)
    }

    fn make_pending(&self) -> io::Result<()> {
        queue(PENDING, 0x1_2345_6789, None)?;
        queue(PENDING, 2, None)?;
        queue(PENDING_THREAD, 3, Some(self.main))?;
        queue(READABLE, 4, None)
    }

    fn check_pending(&mut self, findings: &mut Findings) -> io::Result<()> {
        let pid = getpid().as_raw();
        let expect = |value| Some((SI_QUEUE, pid, value));
        findings.equal("first pending signal", expect(0x1_2345_6789), take(PENDING));
        findings.equal("second pending signal", expect(2), take(PENDING));
        findings.equal("third pending signal", None, take(PENDING));
        findings.equal("signal pending for the thread", expect(3), take(PENDING_THREAD));
        findings.equal("second signal pending for the thread", None, take(PENDING_THREAD));
        let read = self.readable.read_signal()?.map(|info| (info.ssi_signo as i32, info.ssi_ptr));
        findings.equal("signalfd", Some((READABLE, 4)), read);
        findings.that(self.readable.read_signal()?.is_none(), "the signalfd has two signals");
        // Drops what a failed check left over.
        while [PENDING, PENDING_THREAD, READABLE].into_iter().any(|signal| take(signal).is_some()) {}
        self.make_pending()
    }

    fn check_handler(&mut self, signal: i32, findings: &mut Findings) -> io::Result<()> {
        self.sent += 1;
        let before = count(signal);
        queue(signal, self.sent, None)?;
        let start = Instant::now();
        while count(signal) == before {
            if start.elapsed() > Duration::from_secs(10) {
                findings.add(format!("the handler of signal {signal} does not run"));
                return Ok(());
            }
            thread::sleep(Duration::from_millis(1));
        }
        let note = &NOTES[signal as usize];
        let stack = SERVER_STACK.load(Ordering::Acquire);
        let on_alternate = (stack..stack + ALTERNATE_STACK).contains(&note.stack.load(Ordering::Acquire));
        findings.equal(format!("value of signal {signal}"), self.sent, note.value.load(Ordering::Acquire));
        findings.equal(format!("code of signal {signal}"), SI_QUEUE, note.code.load(Ordering::Acquire));
        findings.equal(format!("thread of signal {signal}"), server(), note.thread.load(Ordering::Acquire));
        findings.equal(
            format!("signal {signal} on the alternate stack"),
            signal == ON_ALTERNATE_STACK,
            on_alternate,
        );
        Ok(())
    }
}

impl Probe for Signals {
    fn name(&self) -> &'static str {
        "signals"
    }

    fn check(&mut self, findings: &mut Findings) {
        let result = self.check_pending(findings);
        findings.succeed("use pending signals", result);
        for signal in [ON_ALTERNATE_STACK, ON_STACK] {
            let result = self.check_handler(signal, findings);
            findings.succeed("send a signal", result);
        }
        let note = &NOTES[THREAD_TIMER as usize];
        if note.count.load(Ordering::Acquire) > 0 {
            findings.equal("thread of the thread's timer", server(), note.thread.load(Ordering::Acquire));
        }
    }

    fn counters(&mut self) -> Vec<(&'static str, u64)> {
        vec![
            ("interval_timer", count(Signal::SIGALRM as i32)),
            ("virtual_timer", count(Signal::SIGVTALRM as i32)),
            ("posix_timer", count(TIMER)),
            ("thread_timer", count(THREAD_TIMER)),
        ]
    }

    fn spoil(&mut self) {
        take(PENDING);
    }
}
