//! When to freeze.
//!
//! After each round it is known how many pages have been written meanwhile, about how many bytes they will take, and how
//! fast bytes go. Freezing now would send them during the blackout:
//!
//! ```text
//!   predicted blackout = fixed cost + bytes to send / bandwidth
//! ```
//!
//! Another round is worth its traffic only if it makes this smaller. Writes to a working set that is rewritten faster
//! than it can be sent do not get fewer; then waiting costs the network and the clients, and gains nothing.
//!
//! With delayed restoration the first rounds wait at the destination. To freeze then would have all their pages placed in
//! the blackout; and the round that they are placed in takes so long that the ones before it are no measure for those after it.

use super::bandwidth::Bandwidth;
use std::time::Duration;

/// What the operator asked for, and what is known of the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest blackout wanted.
    pub max_blackout: Duration,
    /// Most rounds before the freeze, the first (of all pages) included. With 0 the container is frozen at once.
    pub max_rounds: u32,
    /// Rounds whose pages wait at the destination, all of which are placed at the end of the last of them.
    pub held_rounds: u32,
    /// What a blackout costs beside sending pages: freezing, capturing, restoring, round trips.
    pub fixed_cost: Duration,
}

/// What the next step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send another round.
    Round,
    /// Freeze now.
    Freeze(FreezeReason),
}

/// Why now is the time to freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FreezeReason {
    /// The predicted blackout is as short as asked.
    ShortEnough,
    /// Further rounds do not make it shorter.
    NoProgress,
    /// There have been as many rounds as allowed.
    RoundLimit,
}

/// How long the blackout would be if the container were frozen with `bytes` left to send; `None` while nothing is known
/// of the bandwidth.
pub fn predicted_blackout(bytes: u64, bandwidth: &Bandwidth, limits: &Limits) -> Option<Duration> {
    let sending = bandwidth.time_for(bytes)?;
    Some(limits.fixed_cost.saturating_add(sending))
}

/// How many rounds in a row may fail to get ahead.
const PATIENCE: usize = 2;
/// A round gets ahead if it leaves at most this part of the fewest bytes left before.
const AHEAD: f64 = 0.9;

/// Decides after a round. `left` has the bytes left to send after each round so far, oldest first: of pages written during
/// the round, and of those held back ([`super::hot`]).
pub fn decide(left: &[u64], bandwidth: &Bandwidth, limits: &Limits) -> Decision {
    if left.len() >= limits.max_rounds as usize {
        return Decision::Freeze(FreezeReason::RoundLimit);
    }
    let left = left.get(limits.held_rounds.saturating_sub(1) as usize..).unwrap_or_default();
    let Some(&bytes) = left.last() else { return Decision::Round };
    if predicted_blackout(bytes, bandwidth, limits).is_some_and(|blackout| blackout <= limits.max_blackout) {
        return Decision::Freeze(FreezeReason::ShortEnough);
    }
    if rounds_without_progress(left) >= PATIENCE {
        return Decision::Freeze(FreezeReason::NoProgress);
    }
    Decision::Round
}

/// How many rounds there have been since the last one that got ahead. The first round got ahead of nothing.
fn rounds_without_progress(left: &[u64]) -> usize {
    let mut fewest = u64::MAX;
    let mut stalled = 0;
    for &bytes in left {
        stalled = if bytes as f64 <= fewest as f64 * AHEAD { 0 } else { stalled + 1 };
        fewest = fewest.min(bytes);
    }
    stalled
}

#[cfg(test)]
mod tests {
    use super::*;
    use Decision::{Freeze, Round};
    use FreezeReason::{NoProgress, RoundLimit, ShortEnough};
    use pclive_wire::PAGE_SIZE;

    const MS: Duration = Duration::from_millis(1);

    /// 4096 bytes in 0.04 ms: 1 Gbit/s or so.
    fn gigabit() -> Bandwidth {
        let mut bandwidth = Bandwidth::default();
        bandwidth.observe(102_400_000, Duration::from_secs(1));
        bandwidth
    }

    fn limits(max_blackout: u32, max_rounds: u32) -> Limits {
        Limits { max_blackout: max_blackout * MS, max_rounds, held_rounds: 0, fixed_cost: 20 * MS }
    }

    #[test]
    fn the_prediction_is_fixed_cost_and_transfer() {
        assert_eq!(predicted_blackout(1000 * PAGE_SIZE, &gigabit(), &limits(0, 0)), Some(60 * MS));
        assert_eq!(predicted_blackout(0, &gigabit(), &limits(0, 0)), Some(20 * MS));
        assert_eq!(predicted_blackout(u64::MAX, &Bandwidth::default(), &limits(0, 0)), None);
        assert!(predicted_blackout(u64::MAX, &gigabit(), &limits(0, 0)).is_some());
    }

    #[test]
    fn the_time_to_freeze() {
        for (left, max_blackout, max_rounds, expected) in [
            // Frozen at once: one-shot.
            (&[][..], 60, 0, Freeze(RoundLimit)),
            (&[], 60, 10, Round),
            // Exactly as long as asked, and just over.
            (&[1000], 60, 10, Freeze(ShortEnough)),
            (&[1001], 60, 10, Round),
            // A limit below the fixed cost is never reached; the rounds end when they gain nothing.
            (&[9000, 800, 100, 10, 1], 10, 10, Round),
            (&[9000, 800, 100, 100], 10, 10, Round),
            (&[9000, 800, 100, 95, 99], 10, 10, Freeze(NoProgress)),
            // A hot set of 2500 pages.
            (&[40_000, 2600, 2500], 60, 10, Round),
            (&[40_000, 2600, 2500, 2550], 60, 10, Freeze(NoProgress)),
            // One bad round is forgiven if the next gets ahead.
            (&[9000, 5000, 6000, 4000], 60, 10, Round),
            // Worse and worse.
            (&[9000, 10_000, 11_000], 60, 10, Freeze(NoProgress)),
            (&[9000, 8000, 7000], 60, 3, Freeze(RoundLimit)),
            (&[0], 20, 10, Freeze(ShortEnough)),
        ] {
            let left: Vec<u64> = left.iter().map(|pages| pages * PAGE_SIZE).collect();
            assert_eq!(decide(&left, &gigabit(), &limits(max_blackout, max_rounds)), expected, "{left:?}");
        }
    }

    #[test]
    fn rounds_that_wait_at_the_destination_are_no_measure() {
        for (left, expected) in [
            // Nothing is left, but nothing is placed yet either.
            (&[0, 0][..], Round),
            (&[0, 0, 0], Freeze(ShortEnough)),
            // The third took long, as all was placed in it.
            (&[5000, 4000, 20_000, 5000], Round),
            (&[5000, 4000, 20_000, 19_000, 19_000], Freeze(NoProgress)),
            (&[0, 0, 0, 1001, 1001, 1001, 1001, 1001, 1001, 1001], Freeze(RoundLimit)),
        ] {
            let left: Vec<u64> = left.iter().map(|pages| pages * PAGE_SIZE).collect();
            let limits = Limits { held_rounds: 3, ..limits(60, 10) };
            assert_eq!(decide(&left, &gigabit(), &limits), expected, "{left:?}");
        }
        let limits = Limits { held_rounds: 30, ..limits(60, 2) };
        assert_eq!(decide(&[0, 0], &gigabit(), &limits), Freeze(RoundLimit), "as the operator has it");
    }

    #[test]
    fn without_a_bandwidth_only_the_other_rules_hold() {
        let unknown = Bandwidth::default();
        assert_eq!(decide(&[1], &unknown, &limits(1000, 10)), Round);
        assert_eq!(decide(&[1, 1, 1], &unknown, &limits(1000, 10)), Freeze(NoProgress));
    }
}
