//! While the container still runs, it and its neighbours come first: the rounds are background work.
//!
//! They read, compare, send and place pages for seconds, and are not in a hurry. So the threads that do it at both hosts
//! have a high nice value while a round is long (`rounds` decides); in the short ones just before the freeze, and from it on,
//! nobody's work is more urgent. The kernel weighs a nice value against others of the same group of tasks only (sched(7),
//! "The autogroup feature", and the cgroup controller `cpu`).
//!
//! Not everything can wait, though. While pclive reads the container's memory it holds locks of that address space
//! (`mmap_lock`), and if it lost the processor with them for long, the container could not map memory meanwhile. So that is
//! done at the usual priority ([`urgently`]).
//!
//! Where there are no idle processors it decides more than speed: [`crate::policy::courtesy`] says how far a thread stands
//! back, by what it gets to run.

use crate::host::has_capability;
use crate::policy::courtesy::Standing;
use nix::libc::SCHED_IDLE;
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
const LOOK: Duration = Duration::from_millis(250);

/// The calling thread stands back behind others as long as this lives.
#[derive(Debug)]
pub struct Background {
    usual: Scheduling,
    farthest: Standing,
    standing: Standing,
    /// `None` if the kernel does not count what a thread waits for: then it is only nice.
    meter: Option<Meter>,
    /// When it looked last whether it gets to run, and what it had had by then.
    looked: Instant,
    had: Had,
    /// What it had had when it stepped back.
    had_at_first: Had,
    /// It is this thread's.
    thread: PhantomData<*const ()>,
}

impl Background {
    /// Adds `nice` to the nice value of the calling thread; 19 has it stand behind all others. `None` if that is nothing, or
    /// could not be done and taken back.
    pub fn enter(nice: u8) -> Option<Self> {
        if nice == 0 || !has_capability(CAP_SYS_NICE).unwrap_or(false) {
            return None;
        }
        // Its processors stay as they are.
        let usual = Scheduling { cpus: Vec::new(), ..scheduling(SELF, &[]).ok()? };
        let meter = Meter::open();
        let had = meter.as_ref().and_then(Meter::read).unwrap_or_default();
        // Nobody would see that it never gets to run there.
        let farthest = if meter.is_some() { Standing::behind(nice) } else { Standing::behind(nice.min(18)) };
        let (looked, thread) = (Instant::now(), PhantomData);
        let mut background =
            Self { usual, farthest, standing: farthest, meter, looked, had, had_at_first: had, thread };
        background.stand_at(farthest).ok()?;
        Some(background)
    }

    /// To be called after each small piece of work: where the thread stands depends on what it has got to run lately.
    pub fn give_way(&mut self) {
        if self.looked.elapsed() < LOOK {
            return;
        }
        if let Some(has) = self.meter.as_ref().and_then(Meter::read) {
            self.take_stand(has);
        }
    }

    fn take_stand(&mut self, has: Had) {
        let (ran, waited) = has.since(self.had);
        let next = self.standing.next(ran, waited, self.farthest);
        self.try_to_stand_at(next);
        (self.looked, self.had) = (Instant::now(), has);
    }

    fn try_to_stand_at(&mut self, standing: Standing) {
        if standing != self.standing
            && let Err(error) = self.stand_at(standing)
        {
            tracing::debug!("pclive cannot change its priority: {error}");
        }
    }

    fn stand_at(&mut self, standing: Standing) -> nix::Result<()> {
        let usual = &self.usual;
        let nice = |by: u8| usual.nice.saturating_add(by.into()).min(19);
        let scheduling = match standing.nice() {
            Some(by) => Scheduling { nice: nice(by), ..usual.clone() },
            None => Scheduling { policy: SCHED_IDLE, nice: 19, ..usual.clone() },
        };
        set_scheduling(SELF, &scheduling)?;
        self.standing = standing;
        Ok(())
    }

    /// The thread has its usual priority as long as `work` takes.
    fn urgently<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let standing = self.standing;
        self.try_to_stand_at(Standing::USUAL);
        let done = work();
        self.try_to_stand_at(standing);
        done
    }

    /// For how long it has waited for a processor.
    pub fn waited(&self) -> Duration {
        let has = self.meter.as_ref().and_then(Meter::read).unwrap_or_default();
        has.since(self.had_at_first).1
    }
}

/// Does what holds locks that the container needs, too: at the thread's usual priority.
pub fn urgently<T>(background: &mut Option<Background>, work: impl FnOnce() -> T) -> T {
    match background {
        Some(background) => background.urgently(work),
        None => work(),
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

    fn own() -> (i32, i32) {
        let own = scheduling(SELF, &[]).unwrap();
        (own.policy, own.nice)
    }

    #[test]
    fn a_thread_has_its_own_priority_back_afterwards() {
        let usual = own();
        let mut background = Background::enter(7);
        assert_eq!(own(), (usual.0, usual.1 + 7));
        assert_eq!(urgently(&mut background, own), usual);
        assert_eq!(own(), (usual.0, usual.1 + 7));
        let elsewhere = std::thread::spawn(move || Background::enter(40).map(|_| own()));
        assert_eq!(elsewhere.join().unwrap(), Some((SCHED_IDLE, 19)), "no farther than the kernel knows");
        assert_eq!(own(), (usual.0, usual.1 + 7));
        drop(background);
        assert_eq!(own(), usual);
        assert!(Background::enter(0).is_none());
    }

    #[test]
    fn a_thread_that_hardly_runs_comes_forward_and_goes_back_when_it_does() {
        let usual = own();
        let mut background = Background::enter(19).expect("tests run as root");
        let starving = Had { waited: background.had.waited + LOOK, ..background.had };
        background.take_stand(starving);
        assert_eq!(own(), (usual.0, 19));
        let starving = Had { waited: starving.waited + LOOK, ..starving };
        background.take_stand(starving);
        assert_eq!(own(), (usual.0, (usual.1 + 14).min(19)));
        for _ in 0..2 {
            background.take_stand(Had { ran: background.had.ran + LOOK, ..background.had });
        }
        assert_eq!(own(), (SCHED_IDLE, 19));
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
            while meter.read().unwrap().since(before).1.is_zero() && start.elapsed() < 40 * LOOK {
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
