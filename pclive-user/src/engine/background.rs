//! While the container still runs, it and its neighbours come first: the rounds are background work.
//!
//! They read, compare, send and place pages for seconds, and are not in a hurry. So the threads that do it at both hosts
//! have a high nice value while a round is long (`rounds` decides); in the short ones just before the freeze, and from it on,
//! nobody's work is more urgent. The kernel weighs a nice value against others of the same group of tasks only (sched(7),
//! "The autogroup feature", and the cgroup controller `cpu`).
//!
//! Where others take all processors, nothing would ever be sent at nice 19: one busy task leaves it 1.4 %. So a thread that
//! hardly gets to run comes forward again, step by step.

use crate::host::has_capability;
use nix::unistd::gettid;
use pclive_sys::thread::{scheduling, set_scheduling};
use pclive_wire::HostPid;
use pclive_wire::manifest::Scheduling;
use procfs::process::{Process, Schedstat};
use std::marker::PhantomData;
use std::time::{Duration, Instant};

/// The calling thread, as `sched_setattr(2)` numbers it.
const SELF: HostPid = HostPid(0);
/// Without it nobody gets a lower nice value back.
const CAP_SYS_NICE: u32 = 23;

/// How often a thread looks whether it gets to run.
const LOOK: Duration = Duration::from_secs(1);
/// How far it comes forward at once: about three times the share of a processor.
const STEP: i32 = 5;
/// One in so many of the moments in which it wants to run is enough.
const ENOUGH: u64 = 16;

/// The calling thread steps back behind others as long as this lives.
#[derive(Debug)]
pub struct Background {
    usual: Scheduling,
    nice: i32,
    /// When it looked last, and what it had had by then; `None` if the kernel does not count that.
    looked: Instant,
    had: Option<Schedstat>,
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
        Some(Self { usual, nice, looked: Instant::now(), had: own_schedstat(), thread: PhantomData })
    }

    /// Comes forward a step, if it has hardly got to run. To be called often.
    pub fn insist(&mut self) {
        if self.looked.elapsed() < LOOK {
            return;
        }
        let has = own_schedstat();
        if let (Some(had), Some(has)) = (&self.had, &has)
            && is_starved(
                has.sum_exec_runtime.wrapping_sub(had.sum_exec_runtime),
                has.run_delay.wrapping_sub(had.run_delay),
            )
        {
            let nice = (self.nice - STEP).max(self.usual.nice);
            if set_scheduling(SELF, &Scheduling { nice, ..self.usual.clone() }).is_ok() {
                self.nice = nice;
            }
        }
        (self.looked, self.had) = (Instant::now(), has);
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

/// Whether a thread that ran for so many nanoseconds since the last look, and waited so many for a processor, got too little.
fn is_starved(ran: u64, waited: u64) -> bool {
    u128::from(waited) > LOOK.as_nanos() / 2 && ran < waited / ENOUGH
}

/// What the calling thread has had, and waited for (`/proc/PID/task/TID/schedstat`, `CONFIG_SCHED_INFO`).
fn own_schedstat() -> Option<Schedstat> {
    Process::myself().ok()?.task_from_tid(gettid().as_raw()).ok()?.schedstat().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

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
        const MS: u64 = 1_000_000;
        for (ran_ms, waited_ms, starved) in
            [(15, 985, true), (60, 940, false), (1, 200, false), (0, 0, false), (50, 280, false)]
        {
            assert_eq!(is_starved(ran_ms * MS, waited_ms * MS), starved, "{ran_ms} {waited_ms}");
        }
        let mut background = Background::enter(19).expect("tests run as root");
        let before = own_schedstat().expect("tests run where the kernel counts");
        background.insist();
        assert_eq!(background.nice, 19, "not yet");
        // As if it had waited for two seconds since.
        let run_delay = before.run_delay.wrapping_sub(2 * LOOK.as_nanos() as u64);
        background.had = Some(Schedstat { run_delay, ..before });
        background.looked -= LOOK;
        background.insist();
        assert_eq!(background.nice, 19 - STEP);
        assert_eq!(scheduling(SELF, &[]).unwrap().nice, 19 - STEP);
    }
}
