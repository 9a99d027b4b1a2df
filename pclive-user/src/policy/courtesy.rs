//! How far background work steps back behind others on busy processors.
//!
//! A high nice value alone does not do it. Whoever sleeps now and then, as a server and its clients do, leaves gaps, and once
//! somebody else has a gap, the scheduler lets him have a slice of it before the sleeper is back (`RUN_TO_PARITY` in
//! kernel/sched/features.h); a kernel that is not preemptible takes even longer. So 1.4 % become 20. But having to wait for a
//! processor shows that others want it, and then background work leaves it alone for a multiple of that time. Where there are
//! idle processors nobody waits, and nothing is slowed down.
//!
//! There is a limit to politeness, too: of what it asks for, background work wants to have a sixteenth.

use std::time::Duration;

/// One in so many of the moments in which background work wants to run is enough for it.
const ENOUGH: u32 = 16;
/// For each moment that it had to wait for a processor it leaves it alone for so many.
const COURTESY: u32 = 8;

/// How long a thread should pause that has run for so long, and waited for so long meanwhile.
pub fn pause(ran: Duration, waited: Duration) -> Duration {
    (COURTESY * waited).min((ENOUGH * ran).saturating_sub(ran + waited))
}

/// Whether a thread that ran for so long in the last `interval`, and waited for so long meanwhile, got too little.
pub fn is_starved(ran: Duration, waited: Duration, interval: Duration) -> bool {
    waited > interval / 2 && ENOUGH * ran < waited
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn who_had_to_wait_pauses_but_not_for_ever() {
        for (ran_ms, waited_ms, pause_ms) in [
            (10, 0, 0),    // idle processors
            (10, 1, 8),    // somebody else was there
            (10, 15, 120), //
            (10, 20, 130), // a sixteenth of the whole
            (10, 150, 0),  // has less than that anyway
            (0, 10, 0),
        ] {
            assert_eq!(pause(ran_ms * MS, waited_ms * MS), pause_ms * MS, "{ran_ms} {waited_ms}");
        }
    }

    #[test]
    fn who_hardly_runs_is_starved() {
        for (ran_ms, waited_ms, starved) in
            [(15, 985, true), (60, 940, false), (1, 200, false), (0, 0, false), (50, 280, false)]
        {
            assert_eq!(is_starved(ran_ms * MS, waited_ms * MS, 1000 * MS), starved, "{ran_ms} {waited_ms}");
        }
    }
}
