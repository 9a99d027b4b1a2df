//! Where the time of a migration goes: named spans on both hosts, put on one time line.
//!
//! Each side measures with its own monotonic clock, in microseconds since that side's migration began. Two such clocks
//! share no zero. They are joined by an exchange of two messages that both sides time, as NTP does it: the source
//! sends the commit at `s1`, the destination has it at `d1`, sends *running* at `d2`, the source has that at `s2`.
//! These two are small and the network is idle between them (every page has arrived before), so the ways there and back
//! take equally long, within [`ClockJoin::uncertainty_us`]. See RFC 5905, section 8.

use serde::{Deserialize, Serialize};

/// Which host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Side {
    Source,
    Destination,
}

/// One span of work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// Where.
    pub side: Side,
    /// Begin, in microseconds since the migration began; on the measuring side's clock until [`ClockJoin`] moved it.
    pub start_us: i64,
    /// Length in microseconds.
    pub duration_us: i64,
}

impl Phase {
    /// End, in microseconds on the same clock as the begin.
    pub fn end_us(&self) -> i64 {
        self.start_us.saturating_add(self.duration_us)
    }
}

/// Records the phases of one side, each ending where the next begins: no holes.
#[derive(Clone, Debug)]
pub struct PhaseLog {
    side: Side,
    done: Vec<Phase>,
    current: Option<(String, i64)>,
}

impl PhaseLog {
    /// An empty log.
    pub fn new(side: Side) -> Self {
        Self { side, done: Vec::new(), current: None }
    }

    /// Ends the current phase, if any, and begins `name`, both at `now_us`.
    pub fn enter(&mut self, name: impl Into<String>, now_us: i64) {
        self.leave(now_us);
        self.current = Some((name.into(), now_us));
    }

    /// Ends the current phase, if any, at `now_us`.
    pub fn leave(&mut self, now_us: i64) {
        if let Some((name, start_us)) = self.current.take() {
            self.done.push(Phase { name, side: self.side, start_us, duration_us: now_us - start_us });
        }
    }

    /// The phases that have ended.
    pub fn phases(&self) -> &[Phase] {
        &self.done
    }
}

/// How the destination's clock lies to the source's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockJoin {
    /// What to add to a time of the destination to have it on the source's clock.
    pub to_source_us: i64,
    /// By how much that may be wrong: half of the time that the two messages were under way.
    pub uncertainty_us: i64,
}

impl ClockJoin {
    /// Joins the clocks by one exchange: sent by the source, received by the destination, answered, answer received.
    /// Times of a peer are not trusted: absurd ones give an absurd result, never an overflow.
    pub fn from_exchange(s1: i64, d1: i64, d2: i64, s2: i64) -> Self {
        let half = |a: i64, b: i64| ((i128::from(a) + i128::from(b)) / 2) as i64;
        let under_way = s2.saturating_sub(s1).saturating_sub(d2.saturating_sub(d1));
        Self {
            to_source_us: half(s1.saturating_sub(d1), s2.saturating_sub(d2)),
            uncertainty_us: under_way / 2,
        }
    }

    /// `phases` of the destination on the source's clock.
    pub fn to_source(&self, phases: &[Phase]) -> Vec<Phase> {
        let moved = |p: &Phase| Phase { start_us: p.start_us.saturating_add(self.to_source_us), ..p.clone() };
        phases.iter().map(moved).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_follow_each_other_without_holes() {
        let mut log = PhaseLog::new(Side::Source);
        log.enter("freeze", 10);
        log.enter("capture", 14);
        log.leave(20);
        log.leave(25);
        let spans: Vec<_> = log.phases().iter().map(|p| (p.name.as_str(), p.start_us, p.end_us())).collect();
        assert_eq!(spans, [("freeze", 10, 14), ("capture", 14, 20)]);
    }

    #[test]
    fn clocks_are_joined_in_the_middle_of_the_exchange() {
        // The destination's clock is 1,000,000 behind; messages take 100 each way; its work takes 500.
        let join = ClockJoin::from_exchange(1_002_000, 2_100, 2_600, 1_002_700);
        assert_eq!(join, ClockJoin { to_source_us: 1_000_000, uncertainty_us: 100 });
        let phase = Phase { name: "go".into(), side: Side::Destination, start_us: 2_100, duration_us: 500 };
        assert_eq!(join.to_source(&[phase])[0].start_us, 1_002_100);
    }

    #[test]
    fn absurd_times_do_not_overflow() {
        for times in [[i64::MIN, i64::MAX, i64::MIN, i64::MAX], [i64::MAX, i64::MIN, i64::MAX, i64::MIN]] {
            ClockJoin::from_exchange(times[0], times[1], times[2], times[3]);
        }
    }
}
