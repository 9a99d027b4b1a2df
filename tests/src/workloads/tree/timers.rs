//! Timers of every kind: ticking ones, whose signals [`super::signals`] counts, and ones that are far from done.

use super::probe::{Findings, Probe};
use super::signals::{THREAD_TIMER, TIMER, server};
use nix::errno::Errno;
use nix::libc;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::clock_gettime;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsFd;
use std::time::Duration;

const INTERVAL: Duration = Duration::from_millis(40);
const FAR: Duration = Duration::from_secs(3600);
/// Timers are late by as much as the machine is busy, never early.
const SLACK: Duration = Duration::from_millis(1);

/// A timer that is far from done: its rest may only shrink, and no faster than time passes.
#[derive(Debug)]
struct Countdown {
    rest: Duration,
    /// When it was that, at the earliest.
    at: Duration,
}

impl Countdown {
    fn check(
        &mut self,
        what: &str,
        rest: impl FnOnce() -> io::Result<Duration>,
        findings: &mut Findings,
    ) -> io::Result<()> {
        let at = monotonic();
        let rest = rest()?;
        let least = self.rest.saturating_sub(monotonic().saturating_sub(self.at) + SLACK);
        let range = least..=self.rest;
        findings.that(range.contains(&rest), format!("{what} has {rest:?} to go, not within {range:?}"));
        (self.rest, self.at) = (rest, at);
        Ok(())
    }
}

fn monotonic() -> Duration {
    clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(Into::into).unwrap_or_default()
}

/// See the module.
#[derive(Debug)]
pub struct Timers {
    ticking: File,
    ticks: u64,
    far: TimerFd,
    far_countdown: Countdown,
    /// Kernel ids; there is a gap between them.
    signal_timer: i32,
    thread_timer: i32,
    far_timer: i32,
    far_timer_countdown: Countdown,
    clock: Duration,
}

impl Timers {
    /// Starts them; the thread that receives signals must run already.
    ///
    /// # Errors
    /// Those of the calls that make timers.
    pub fn new() -> io::Result<Self> {
        for which in [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL] {
            set_interval_timer(which)?;
        }
        let ticking = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?;
        ticking.set(Expiration::Interval(INTERVAL.into()), TimerSetTimeFlags::empty())?;
        let far = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC)?;
        let countdown = || Countdown { rest: FAR, at: monotonic() };
        let far_countdown = countdown();
        far.set(Expiration::OneShot(FAR.into()), TimerSetTimeFlags::empty())?;
        let signal_timer = create_timer(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, TIMER)?;
        let gap = create_timer(libc::CLOCK_REALTIME, libc::SIGEV_NONE, 0)?;
        let thread_timer = create_timer(libc::CLOCK_REALTIME, libc::SIGEV_THREAD_ID, THREAD_TIMER)?;
        let far_timer = create_timer(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0)?;
        // SAFETY: deletes a timer that was just made.
        unsafe { libc::syscall(libc::SYS_timer_delete, gap) };
        set_timer(signal_timer, INTERVAL, INTERVAL)?;
        set_timer(thread_timer, INTERVAL, INTERVAL)?;
        let far_timer_countdown = countdown();
        set_timer(far_timer, FAR, Duration::ZERO)?;
        Ok(Timers {
            ticking: ticking.as_fd().try_clone_to_owned()?.into(),
            ticks: 0,
            far,
            far_countdown,
            signal_timer,
            thread_timer,
            far_timer,
            far_timer_countdown,
            clock: monotonic(),
        })
    }

    fn try_check(&mut self, findings: &mut Findings) -> io::Result<()> {
        for which in [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL] {
            findings.equal(format!("interval of itimer {which}"), INTERVAL, interval_timer(which)?);
        }
        for timer in [self.signal_timer, self.thread_timer] {
            findings.equal(format!("interval of timer {timer}"), INTERVAL, get_timer(timer)?.1);
        }
        findings.equal("interval of the far timer", Duration::ZERO, get_timer(self.far_timer)?.1);
        let rest = || Ok(get_timer(self.far_timer)?.0);
        self.far_timer_countdown.check("the far timer", rest, findings)?;
        let rest = || match self.far.get()? {
            Some(Expiration::OneShot(rest)) => Ok(rest.into()),
            other => Err(io::Error::other(format!("the far timerfd: {other:?}"))),
        };
        self.far_countdown.check("the far timerfd", rest, findings)?;
        let clock = monotonic();
        findings.that(clock >= self.clock, format!("the clock went back from {:?} to {clock:?}", self.clock));
        self.clock = clock;
        self.read_ticks()
    }

    fn read_ticks(&mut self) -> io::Result<()> {
        let mut count = [0; 8];
        match self.ticking.read_exact(&mut count) {
            Ok(()) => self.ticks += u64::from_ne_bytes(count),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

fn create_timer(clock: i32, notify: i32, signal: i32) -> io::Result<i32> {
    let mut timer = 0;
    // SAFETY: all-zero is a good sigevent; the call reads it and writes the id.
    let result = unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = notify;
        event.sigev_signo = signal;
        event.sigev_value.sival_ptr = std::ptr::without_provenance_mut(0x7000 + signal as usize);
        event.sigev_notify_thread_id = server();
        libc::syscall(libc::SYS_timer_create, clock, &raw mut event, &raw mut timer)
    };
    Errno::result(result)?;
    Ok(timer)
}

fn set_timer(timer: i32, first: Duration, interval: Duration) -> io::Result<()> {
    let [it_value, it_interval] = [first, interval].map(|duration| *TimeSpec::from(duration).as_ref());
    let value = libc::itimerspec { it_interval, it_value };
    // SAFETY: reads the itimerspec.
    let result = unsafe { libc::syscall(libc::SYS_timer_settime, timer, 0, &raw const value, 0usize) };
    Errno::result(result).map(drop).map_err(Into::into)
}

/// Time to go and interval.
fn get_timer(timer: i32) -> io::Result<(Duration, Duration)> {
    let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut value = libc::itimerspec { it_interval: zero, it_value: zero };
    // SAFETY: writes the itimerspec.
    let result = unsafe { libc::syscall(libc::SYS_timer_gettime, timer, &raw mut value) };
    Errno::result(result)?;
    Ok((TimeSpec::from(value.it_value).into(), TimeSpec::from(value.it_interval).into()))
}

fn set_interval_timer(which: i32) -> io::Result<()> {
    let interval = libc::timeval { tv_sec: 0, tv_usec: INTERVAL.as_micros() as i64 };
    let value = libc::itimerval { it_interval: interval, it_value: interval };
    // SAFETY: reads the itimerval.
    Errno::result(unsafe { libc::syscall(libc::SYS_setitimer, which, &raw const value, 0usize) })?;
    Ok(())
}

fn interval_timer(which: i32) -> io::Result<Duration> {
    let zero = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let mut value = libc::itimerval { it_interval: zero, it_value: zero };
    // SAFETY: writes the itimerval.
    Errno::result(unsafe { libc::syscall(libc::SYS_getitimer, which, &raw mut value) })?;
    Ok(Duration::new(value.it_interval.tv_sec as u64, value.it_interval.tv_usec as u32 * 1000))
}

impl Probe for Timers {
    fn name(&self) -> &'static str {
        "timers"
    }

    fn check(&mut self, findings: &mut Findings) {
        std::thread::sleep(INTERVAL);
        let result = self.try_check(findings);
        findings.succeed("use a timer", result);
    }

    fn counters(&mut self) -> Vec<(&'static str, u64)> {
        // What cannot be read stands still; a check says why.
        let _ = self.read_ticks();
        vec![("timerfd", self.ticks)]
    }

    fn spoil(&mut self) {
        // A failure would show as a check that succeeds.
        let _ = set_timer(self.signal_timer, Duration::ZERO, Duration::ZERO);
    }
}
