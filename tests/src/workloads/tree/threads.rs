//! Threads that wait in the kernel, each in another call, or compute; each looks after what it alone can see.
//!
//! A thread proves that it lives by a beat. Those that wait without a timeout are nudged by a check and beat then. A
//! call that returns early, late in the sense of never, or with EINTR although no signal reaches the thread, is a
//! complaint, with the one exception of `epoll_wait(2)`, which signal(7) lets fail with EINTR when a process is stopped.

use super::probe::{Findings, Probe};
use super::registers::{Meanwhile, Vectors};
use super::signals;
use crate::workloads::pattern::mix;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::{Pid, gettid, pipe};
use std::cell::Cell;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

thread_local! {
    /// A value that only this thread has; it is reached through the register FS.
    static SECRET: Cell<u64> = const { Cell::new(0) };
}

/// What a thread says of itself.
#[derive(Debug, Default)]
pub struct Pulse {
    beats: AtomicU64,
    complaint: Mutex<Option<String>>,
}

impl Pulse {
    /// Still alive; an error is what the thread has to complain of.
    pub fn beat(&self, result: Result<(), String>) {
        if let Err(complaint) = result {
            let mut first = self.complaint.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(complaint);
        }
        self.beats.fetch_add(1, Ordering::Release);
    }
}

type Nudge = Box<dyn Fn() -> io::Result<()> + Send>;

struct Watched {
    name: &'static str,
    pulse: Arc<Pulse>,
    nudge: Option<Nudge>,
}

/// See the module.
pub struct Threads {
    list: Vec<Watched>,
    /// Tells the thread that computes to change its GS base.
    spoilt: Arc<AtomicBool>,
}

impl Threads {
    /// Starts all of them.
    ///
    /// # Errors
    /// Those of the calls that make threads and what they wait for.
    pub fn new() -> io::Result<Self> {
        let mut threads = Threads { list: Vec::new(), spoilt: Arc::default() };
        threads.start_signals()?;
        threads.start_futexes()?;
        threads.start_polls()?;
        threads.start_reads()?;
        threads.start_registers()?;
        threads.repeat("rseq", None, check_rseq())?;
        Ok(threads)
    }

    /// Starts a thread that does one thing again and again.
    pub fn repeat(
        &mut self,
        name: &'static str,
        nudge: Option<Nudge>,
        mut once: impl FnMut() -> Result<(), String> + Send + 'static,
    ) -> io::Result<()> {
        self.start(name, nudge, move |pulse| {
            let secret = mix(gettid().as_raw() as u64);
            SECRET.set(secret);
            loop {
                let result = once();
                let found = SECRET.get();
                pulse.beat(result.and_then(|()| match found == secret {
                    true => Ok(()),
                    false => Err(format!("thread-local value: expected {secret:#x}, found {found:#x}")),
                }));
            }
        })
    }

    fn start(
        &mut self,
        name: &'static str,
        nudge: Option<Nudge>,
        life: impl FnOnce(&Pulse) + Send + 'static,
    ) -> io::Result<()> {
        let pulse = Arc::new(Pulse::default());
        let own = Arc::clone(&pulse);
        let (started, has_started) = channel();
        thread::Builder::new().name(name.into()).spawn(move || {
            // Whoever started it has waited for this, and looks at the thread from now on.
            let _ = started.send(());
            life(&own);
        })?;
        has_started.recv().map_err(io::Error::other)?;
        self.list.push(Watched { name, pulse, nudge });
        Ok(())
    }

    /// The thread that receives signals; returns when it does.
    fn start_signals(&mut self) -> io::Result<()> {
        self.start("signals", None, |pulse| signals::serve(|result| pulse.beat(result)))?;
        while signals::server() == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn start_futexes(&mut self) -> io::Result<()> {
        let word = Arc::new(AtomicU32::new(0));
        let waker = Arc::clone(&word);
        let nudge: Nudge = Box::new(move || {
            waker.fetch_add(1, Ordering::Release);
            futex(&waker, libc::FUTEX_WAKE, 1, None).map(drop).map_err(Into::into)
        });
        let mut seen = 0;
        self.repeat("futex", Some(nudge), move || {
            while word.load(Ordering::Acquire) == seen {
                match futex(&word, libc::FUTEX_WAIT, seen, None) {
                    Ok(_) | Err(Errno::EAGAIN) => {}
                    Err(error) => return Err(format!("FUTEX_WAIT: {error}")),
                }
            }
            seen = word.load(Ordering::Acquire);
            Ok(())
        })?;
        let silent = AtomicU32::new(7);
        self.repeat("futex-timeout", None, move || {
            timed(Duration::from_millis(150), |timeout| {
                match futex(&silent, libc::FUTEX_WAIT, 7, Some(timeout)) {
                    Err(Errno::ETIMEDOUT) => Ok(()),
                    other => Err(format!("FUTEX_WAIT with a timeout: {other:?}")),
                }
            })
        })
    }

    fn start_polls(&mut self) -> io::Result<()> {
        let (silent, writer) = pipe()?;
        self.repeat("poll", None, move || {
            let _open = &writer;
            timed(Duration::from_millis(170), |timeout| {
                let mut fds = [PollFd::new(silent.as_fd(), PollFlags::POLLIN)];
                match poll(&mut fds, PollTimeout::try_from(timeout).unwrap_or(PollTimeout::ZERO)) {
                    Ok(0) => Ok(()),
                    other => Err(format!("poll: {other:?}")),
                }
            })
        })?;
        let epoll = Epoll::new(EpollCreateFlags::empty())?;
        self.repeat("epoll", None, move || {
            let wait = |timeout| {
                epoll.wait(
                    &mut [EpollEvent::empty()],
                    EpollTimeout::try_from(timeout).unwrap_or(EpollTimeout::ZERO),
                )
            };
            match timed(Duration::from_millis(190), |timeout| match wait(timeout) {
                Ok(0) => Ok(true),
                Err(Errno::EINTR) => Err(String::new()),
                other => Err(format!("epoll_wait: {other:?}")),
            }) {
                Err(complaint) if !complaint.is_empty() => Err(complaint),
                _ => Ok(()),
            }
        })
    }

    fn start_reads(&mut self) -> io::Result<()> {
        let counter = Arc::new(EventFd::from_value_and_flags(0, EfdFlags::empty())?);
        let writer = Arc::clone(&counter);
        let nudge: Nudge = Box::new(move || writer.write(5).map(drop).map_err(Into::into));
        self.repeat("eventfd", Some(nudge), move || match counter.read() {
            Ok(5) => Ok(()),
            other => Err(format!("read of an eventfd: {other:?}")),
        })?;
        let (mut reader, writer) = UnixStream::pair()?;
        let nudge: Nudge = Box::new(move || (&writer).write_all(b"n"));
        self.repeat("socket", Some(nudge), move || {
            let mut byte = [0];
            // `read_exact` would hide EINTR.
            match reader.read(&mut byte) {
                Ok(1) if byte == *b"n" => Ok(()),
                other => Err(format!("read of a socket: {other:?}")),
            }
        })
    }

    fn start_registers(&mut self) -> io::Result<()> {
        let (spinning, sleeping) = (Vectors::new(1), Vectors::new(2));
        let time = libc::timespec { tv_sec: 0, tv_nsec: 180_000_000 };
        let spoilt = Arc::clone(&self.spoilt);
        let mut segment = None;
        self.repeat("spin", None, move || {
            let base = *segment.get_or_insert_with(|| set_gs(0x5555_0000_1000));
            spinning.hold(Meanwhile::Spin(100_000))?;
            if spoilt.load(Ordering::Relaxed) {
                set_gs(0);
            }
            match gs() {
                found if found == base => Ok(()),
                found => Err(format!("GS base: expected {base:#x}, found {found:#x}")),
            }
        })?;
        self.repeat("sleep", None, move || sleeping.hold(Meanwhile::Sleep(time)))
    }
}

/// What the kernel says of the thread of that name, if there is one: why it stands still.
pub fn seen_by_kernel(name: &str) -> String {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten().map(|task| task.path());
    let mut named =
        tasks.filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim_end() == name));
    named.next().map_or_else(String::new, |task| {
        let [stat, call, place] =
            ["stat", "syscall", "wchan"].map(|file| fs::read_to_string(task.join(file)).unwrap_or_default());
        format!(" (stat: {}; call: {}; in {place})", stat.trim_end(), call.trim_end())
    })
}

/// A call with a timeout: it must not return before.
fn timed<T>(timeout: Duration, call: impl FnOnce(Duration) -> Result<T, String>) -> Result<T, String> {
    let start = Instant::now();
    let result = call(timeout)?;
    let elapsed = start.elapsed();
    if elapsed < timeout { Err(format!("timeout after {elapsed:?} of {timeout:?}")) } else { Ok(result) }
}

fn futex(word: &AtomicU32, operation: i32, value: u32, timeout: Option<Duration>) -> nix::Result<i64> {
    let timeout =
        timeout.map(|t| libc::timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let operation = operation | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word is alive and atomic; the timeout is null or alive.
    Errno::result(unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, timeout) })
}

const ARCH_SET_GS: i32 = 0x1001;
const ARCH_GET_GS: i32 = 0x1004;

/// Sets the GS base, which nothing in a 64-bit process uses.
fn set_gs(base: u64) -> u64 {
    // SAFETY: sets a register that the compiler and the C library do not use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
    gs()
}

fn gs() -> u64 {
    let mut base = 0;
    // SAFETY: writes the word.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_GS, &raw mut base) };
    base
}

/// What the kernel wrote into this thread's rseq area as the current CPU, if the C library registered one (glibc 2.35).
fn rseq_cpu() -> Option<u32> {
    // SAFETY: looks up a variable that, where it exists, is a ptrdiff_t: the area's distance from the thread pointer.
    unsafe {
        let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>();
        let size = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()).cast::<u32>();
        if offset.is_null() || size.is_null() || *size == 0 {
            return None;
        }
        let thread: *const u8;
        std::arch::asm!("mov {}, fs:0", out(reg) thread, options(nostack, readonly, preserves_flags));
        // `struct rseq`: cpu_id is its second word.
        Some(thread.offset(*offset + 4).cast::<u32>().read_volatile())
    }
}

/// Goes to one CPU after the other and looks whether the kernel keeps the rseq area current.
fn check_rseq() -> impl FnMut() -> Result<(), String> {
    let mut turn = 0;
    move || {
        thread::sleep(Duration::from_millis(100));
        let all =
            sched_getaffinity(Pid::from_raw(0)).map_err(|error| format!("sched_getaffinity: {error}"))?;
        let cpus: Vec<usize> = (0..CpuSet::count()).filter(|&cpu| all.is_set(cpu).unwrap_or(false)).collect();
        turn += 1;
        let cpu = cpus[turn % cpus.len()];
        let mut only = CpuSet::new();
        let pin = only.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &only));
        let found = rseq_cpu();
        let unpin = sched_setaffinity(Pid::from_raw(0), &all);
        pin.and(unpin).map_err(|error| format!("sched_setaffinity: {error}"))?;
        match found {
            Some(found) if found as usize != cpu => Err(format!("rseq says CPU {found} on CPU {cpu}")),
            _ => Ok(()),
        }
    }
}

impl Probe for Threads {
    fn name(&self) -> &'static str {
        "threads"
    }

    fn check(&mut self, findings: &mut Findings) {
        for thread in &self.list {
            if let Some(nudge) = &thread.nudge {
                findings.succeed(format!("wake {}", thread.name), nudge());
            }
        }
        // A complaint may come with the next beat only.
        thread::sleep(Duration::from_millis(20));
        for thread in &self.list {
            let complaint = thread.pulse.complaint.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(complaint) = complaint {
                findings.add(format!("{}: {complaint}", thread.name));
            }
        }
    }

    fn counters(&mut self) -> Vec<(&'static str, u64)> {
        self.list.iter().map(|thread| (thread.name, thread.pulse.beats.load(Ordering::Acquire))).collect()
    }

    fn spoil(&mut self) {
        self.spoilt.store(true, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(100));
    }
}
