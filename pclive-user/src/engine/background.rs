//! While the container still runs, it and its neighbours come first: the rounds are background work.
//!
//! They read, compare, send and place pages for seconds, and are not in a hurry. So the threads that do it at both hosts
//! have a high nice value while a round is long (`rounds` decides); in the short ones just before the freeze, and from it on,
//! nobody's work is more urgent. The kernel weighs a nice value against others of the same group of tasks only (sched(7),
//! "The autogroup feature", and the cgroup controller `cpu`).

use crate::host::has_capability;
use pclive_sys::thread::{scheduling, set_scheduling};
use pclive_wire::HostPid;
use pclive_wire::manifest::Scheduling;
use std::marker::PhantomData;

/// The calling thread, as `sched_setattr(2)` numbers it.
const SELF: HostPid = HostPid(0);
/// Without it nobody gets a lower nice value back.
const CAP_SYS_NICE: u32 = 23;

/// The calling thread steps back behind others as long as this lives.
#[derive(Debug)]
pub struct Background {
    usual: Scheduling,
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
        let behind = Scheduling { nice: usual.nice.saturating_add(nice.into()).min(19), ..usual.clone() };
        set_scheduling(SELF, &behind).ok()?;
        Some(Self { usual, thread: PhantomData })
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
}
