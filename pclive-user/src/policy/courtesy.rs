//! How far background work stands back behind others on busy processors.
//!
//! A high nice value alone is not far enough. Whoever sleeps now and then, as a server and its clients do, leaves gaps, and
//! once somebody else has a gap, the scheduler lets him have a slice of it before the sleeper is back (`RUN_TO_PARITY` in
//! kernel/sched/features.h). So the 1.4 % of nice 19 become 15, and the server waits for its clients meanwhile. Whoever
//! runs as `SCHED_IDLE` leaves the processor as soon as somebody else wants it (`check_preempt_wakeup_fair` in
//! kernel/sched/fair.c).
//!
//! But then it may get nothing at all. There is a limit to politeness: of the time in which it wants to run, background work
//! wants to have a sixteenth, and comes forward step by step while it has less.

use std::time::Duration;

/// One in so many of the moments in which background work wants to run is enough for it.
const SHARE: u32 = 16;
/// How far it comes forward at once, and goes back again: about three times the share of a processor.
const STEP: u8 = 5;

/// Where a thread stands: how much higher its nice value is than usual, or behind all of those values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Standing(u8);

impl Standing {
    /// Where a thread stands that is not in the background.
    pub const USUAL: Self = Self(0);
    /// Behind whoever has a nice value (`SCHED_IDLE`).
    pub const LAST: Self = Self(20);

    /// As far back as the asked `nice` means: 19 is as far as it goes.
    pub fn behind(nice: u8) -> Self {
        if nice < 19 { Self(nice) } else { Self::LAST }
    }

    /// What the nice value is higher by; `None` for [`Self::LAST`].
    pub fn nice(self) -> Option<u8> {
        (self < Self::LAST).then_some(self.0)
    }

    /// Where to stand after a while in which the thread ran for so long, and waited for so long to run; never behind
    /// `farthest`.
    pub fn next(self, ran: Duration, waited: Duration, farthest: Self) -> Self {
        if SHARE * ran >= ran + waited {
            return Self(self.0 + STEP).min(farthest);
        }
        // Before the last place, even a nice value of 19 is a long way ahead.
        if self == Self::LAST { Self(19) } else { Self(self.0.saturating_sub(STEP)) }
    }
}

/// Whether the container writes about as fast as its pages are sent: the round found so many pages dirty, and left so many.
/// Then rounds that take their time get nowhere.
pub fn loses_the_race(found: u64, left: u64) -> bool {
    left > found / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_should_leave_much_less_than_it_found() {
        assert!(!loses_the_race(300_000, 110_000));
        assert!(loses_the_race(220_000, 200_000));
        assert!(!loses_the_race(0, 0));
    }

    #[test]
    fn who_gets_little_comes_forward_and_who_gets_enough_goes_back() {
        const MS: Duration = Duration::from_millis(1);
        let next = |standing: Standing, ran_ms: u32, waited_ms: u32, nice| {
            standing.next(ran_ms * MS, waited_ms * MS, Standing::behind(nice))
        };
        let steps = |ran_ms, waited_ms, from, nice| {
            let step = |standing: &Standing| Some(next(*standing, ran_ms, waited_ms, nice));
            std::iter::successors(Some(from), step).take(6).map(|standing| standing.0).collect::<Vec<_>>()
        };
        assert_eq!(steps(15, 235, Standing::LAST, 19), [20, 19, 14, 9, 4, 0], "less than a sixteenth");
        assert_eq!(steps(16, 234, Standing(0), 19), [0, 5, 10, 15, 20, 20], "a sixteenth");
        assert_eq!(steps(250, 0, Standing(0), 7), [0, 5, 7, 7, 7, 7], "idle processors");
        assert_eq!(steps(0, 0, Standing(3), 7)[1], 7, "wants nothing");
        assert_eq!(Standing::behind(19).nice(), None);
        assert_eq!(Standing::behind(18).nice(), Some(18));
    }
}
