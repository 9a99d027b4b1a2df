//! While the container still runs, it and its neighbours come first: the rounds are background work.
//!
//! They read, compare, send and place pages for seconds, and are not in a hurry. So the threads that do it at both hosts
//! have a high nice value while a round is long (`rounds` decides); in the short ones just before the freeze, and from it on,
//! nobody's work is more urgent. The kernel weighs a nice value against others of the same group of tasks only (sched(7),
//! "The autogroup feature", and the cgroup controller `cpu`).
//!
//! That alone is not enough where there are no idle processors: a thread that had to wait for one pauses after each piece of its
//! work ([`crate::policy::courtesy`]). And where others take all of them, nothing would ever be sent at nice 19: one busy task
//! leaves it 1.4 %. So a thread that hardly gets to run comes forward again, step by step.

use crate::host::has_capability;
use crate::policy::courtesy::{is_starved, pause};
use nix::time::{ClockId, clock_gettime};
use pclive_sys::thread::{scheduling, set_scheduling};
use pclive_wire::HostPid;
use pclive_wire::manifest::Scheduling;
use procfs::FromRead;
use procfs::process::Schedstat;
use std::fs::File;
use std::marker::PhantomData;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// The calling thread, as `sched_setattr(2)` numbers it.
const SELF: HostPid = HostPid(0);
/// Without it nobody gets a lower nice value back.
const CAP_SYS_NICE: u32 = 23;

/// How often a thread looks whether it gets to run.
const LOOK: Duration = Duration::from_secs(1);
/// How far it comes forward at once: about three times the share of a processor.
const STEP: i32 = 5;

/// The calling thread steps back behind others as long as this lives.
#[derive(Debug)]
pub struct Background {
    usual: Scheduling,
    nice: i32,
    /// `None` if the kernel does not count what a thread waits for: then it neither pauses nor comes forward.
    meter: Option<Meter>,
    /// When it looked last whether it gets to run, and what it had had by then.
    looked: Instant,
    had_then: Had,
    /// What it had had after its last piece of work.
    had: Had,
    paused: Duration,
    /// It is this thread's.
    thread: PhantomData<*const ()>,
}

impl Background {
    /// Adds `nice` to the nice value of the calling thread. `None` if that is nothing, or could not be done and taken back.
    pub fn enter(nice: u8) -> Option<Self> {
        if nice == 0 || !has_capability(CAP_SYS_NICE).unwrap_or(false) {
            return None;
        }
        // Its processors stay as they are.
        let usual = Scheduling { cpus: Vec::new(), ..scheduling(SELF, &[]).ok()? };
        let nice = usual.nice.saturating_add(nice.into()).min(19);
        set_scheduling(SELF, &Scheduling { nice, ..usual.clone() }).ok()?;
        let meter = Meter::open();
        let had = meter.as_ref().and_then(Meter::read).unwrap_or_default();
        let (looked, paused, thread) = (Instant::now(), Duration::ZERO, PhantomData);
        Some(Self { usual, nice, meter, looked, had_then: had, had, paused, thread })
    }

    /// To be called after each small piece of work: leaves the processor to others for a while if it had to wait for it, and
    /// comes forward a step if it has hardly got to run.
    pub fn give_way(&mut self) {
        if let Some(has) = self.meter.as_ref().and_then(Meter::read) {
            self.yield_for(has);
        }
    }

    fn yield_for(&mut self, has: Had) {
        if self.looked.elapsed() >= LOOK {
            let (ran, waited) = has.since(self.had_then);
            if is_starved(ran, waited, LOOK) {
                self.come_forward();
            }
            (self.looked, self.had_then) = (Instant::now(), has);
        }
        let (ran, waited) = has.since(self.had);
        let pause = pause(ran, waited);
        if !pause.is_zero() {
            std::thread::sleep(pause);
            self.paused += pause;
        }
        self.had = has;
    }

    /// For how long it has left the processors to others.
    pub fn paused(&self) -> Duration {
        self.paused
    }

    fn come_forward(&mut self) {
        let nice = (self.nice - STEP).max(self.usual.nice);
        if set_scheduling(SELF, &Scheduling { nice, ..self.usual.clone() }).is_ok() {
            self.nice = nice;
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Err(error) = set_scheduling(SELF, &self.usual) {
            tracing::warn!(
                "the blackout may take longer: pclive cannot have its usual priority back: {error}"
            );
        }
    }
}

/// What a thread has had so far.
#[derive(Clone, Copy, Debug, Default)]
struct Had {
    /// Processor time.
    ran: Duration,
    /// Time in which it wanted a processor and had none.
    waited: Duration,
}

impl Had {
    /// What it ran and waited since it had had `before`.
    fn since(self, before: Self) -> (Duration, Duration) {
        (self.ran.saturating_sub(before.ran), self.waited.saturating_sub(before.waited))
    }
}

/// Tells what the calling thread has had.
#[derive(Debug)]
struct Meter {
    schedstat: File,
}

impl Meter {
    /// `None` without `/proc/thread-self/schedstat` (`CONFIG_SCHED_INFO`, Linux 3.17).
    fn open() -> Option<Self> {
        Some(Self { schedstat: File::open("/proc/thread-self/schedstat").ok()? })
    }

    fn read(&self) -> Option<Had> {
        let mut text = [0; 128];
        let len = self.schedstat.read_at(&mut text, 0).ok()?;
        let waited = Schedstat::from_read(&text[..len]).ok()?.run_delay;
        // That file also has the processor time, but only up to the last tick.
        let ran = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok()?;
        Some(Had { ran: ran.into(), waited: Duration::from_nanos(waited) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    use nix::unistd::Pid;

    const SELF_PID: Pid = Pid::from_raw(0);

    #[test]
    fn a_thread_has_its_own_priority_back_afterwards() {
        let nice = || scheduling(SELF, &[]).unwrap().nice;
        let usual = nice();
        let background = Background::enter(7).expect("tests run as root");
        assert_eq!(nice(), usual + 7);
        let elsewhere = std::thread::spawn(move || Background::enter(40).map(|_| nice()));
        assert_eq!(elsewhere.join().unwrap(), Some(19), "no more than the kernel knows");
        assert_eq!(nice(), usual + 7);
        drop(background);
        assert_eq!(nice(), usual);
        assert!(Background::enter(0).is_none());
    }

    #[test]
    fn a_thread_that_hardly_runs_comes_forward() {
        let mut background = Background::enter(19).expect("tests run as root");
        let starving = Had { waited: background.had.waited + 2 * LOOK, ..background.had };
        background.yield_for(starving);
        assert_eq!(background.nice, 19, "not yet");
        background.looked -= LOOK;
        background.yield_for(starving);
        assert_eq!(background.nice, 19 - STEP);
        assert_eq!(scheduling(SELF, &[]).unwrap().nice, 19 - STEP);
        assert_eq!(background.paused(), Duration::ZERO, "it has not had anything");
    }

    #[test]
    fn a_thread_that_had_to_wait_pauses_once() {
        const MS: Duration = Duration::from_millis(1);
        let mut background = Background::enter(19).expect("tests run as root");
        let busy = Had { ran: background.had.ran + 2 * MS, waited: background.had.waited + MS };
        let start = Instant::now();
        background.yield_for(busy);
        background.yield_for(busy);
        assert_eq!(background.paused(), 8 * MS);
        assert!(start.elapsed() >= 8 * MS);
    }

    #[test]
    fn a_thread_knows_what_it_ran_and_waited() {
        let ours = sched_getaffinity(SELF_PID).unwrap();
        let mut one = CpuSet::new();
        one.set((0..CpuSet::count()).find(|&cpu| ours.is_set(cpu) == Ok(true)).unwrap()).unwrap();
        let share = move || {
            sched_setaffinity(SELF_PID, &one).unwrap();
            let meter = Meter::open().expect("tests run where the kernel counts");
            let before = meter.read().unwrap();
            let start = Instant::now();
            // Until both have had their turns: how soon that is, the scheduler knows.
            while meter.read().unwrap().since(before).1.is_zero() && start.elapsed() < 10 * LOOK {
                std::hint::spin_loop();
            }
            meter.read().unwrap().since(before)
        };
        let threads = [(); 2].map(|()| std::thread::spawn(share));
        for (ran, waited) in threads.map(|thread| thread.join().unwrap()) {
            assert!(!ran.is_zero() && !waited.is_zero(), "{ran:?} {waited:?}");
        }
    }
}
