//! Who may run the container: the commit protocol, as two state machines without I/O.
//!
//! The rule is that the container never runs at both hosts, and that at least one copy of it always exists. It follows
//! from four facts, and the tests of this module hold the machines to them in every state and for every event:
//!
//! 1. The destination runs its copy only after it has received *commit*.
//! 2. The source sends *commit* only while its own copy is frozen, and never resumes that copy afterwards.
//! 3. The source destroys its copy only after the destination has said *running*.
//! 4. The destination removes its copy only before it has received *commit*, or when that copy could not be made to run.
//!
//! A lost connection therefore costs nothing before the commit: the source resumes, the destination removes. After it
//! the source cannot know whether the commit arrived. It stays frozen and reports the outcome as unknown; the operator,
//! who can look at the destination, decides.
//!
//! A machine takes an event (a message from the peer, or what the engine did or noticed) and gives back the actions that
//! the engine has to perform, in order. It changes its state *before* the actions, so that an action that fails finds
//! the machine in the state that knows how to undo it. Every pair of state and event has an answer; an event that cannot
//! be is a violation of the protocol, and is treated as a failure in that state.

mod destination;
mod source;

#[cfg(test)]
mod model;

pub use destination::{Destination, DestinationAction, DestinationEvent, DestinationState};
pub use source::{Outcome, Remains, Source, SourceAction, SourceEvent, SourceState};

use pclive_wire::Round;
use pclive_wire::control::{AbortReason, Failure, RemoteError};

/// Why a migration did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The operator stopped it.
    #[error("cancelled")]
    Cancelled,
    /// This side failed.
    #[error("{0}")]
    Local(Failure),
    /// The destination refused or failed.
    #[error("the destination: {0}")]
    Destination(RemoteError),
    /// The source gave up.
    #[error("{0}")]
    Source(AbortReason),
    /// The connection broke, or the peer did not answer in time.
    #[error("connection lost: {0}")]
    Lost(Failure),
    /// The peer did what the protocol does not allow.
    #[error("protocol violation: {event} while {state}")]
    #[allow(missing_docs)]
    Violation { state: &'static str, event: &'static str },
}

/// How far the rounds are. Manifests, ends of rounds, and applications each go through the rounds without gaps, and none
/// overtakes the one before. The last manifest, with the state of the frozen container, has no pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Manifests sent.
    pub manifests: u32,
    /// Rounds whose pages have all been sent.
    pub sent: u32,
    /// Rounds whose pages have been taken care of at the destination.
    pub applied: u32,
    /// The newest manifest is the last.
    pub last: bool,
}

impl Progress {
    /// The last manifest comes when all pages have been sent.
    fn manifest(&mut self, round: Round, last: bool) -> bool {
        let good = !self.last && round.0 == self.manifests && (!last || self.sent == self.manifests);
        if good {
            self.manifests += 1;
            self.last = last;
        }
        good
    }

    fn round_sent(&mut self, round: Round) -> bool {
        step(&mut self.sent, round, self.manifests - u32::from(self.last))
    }

    fn applied(&mut self, round: Round) -> bool {
        step(&mut self.applied, round, self.sent)
    }

    /// Whether the destination has everything.
    pub fn complete(&self) -> bool {
        self.last && self.applied == self.sent
    }
}

/// Counts `round` if it is the next one and less than `limit`.
fn step(count: &mut u32, round: Round, limit: u32) -> bool {
    let good = round.0 == *count && *count < limit;
    if good {
        *count += 1;
    }
    good
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_come_without_gaps_and_nothing_overtakes() {
        let mut p = Progress::default();
        assert!(!p.round_sent(Round(0)) && !p.applied(Round(0)));
        assert!(!p.manifest(Round(1), false) && p.manifest(Round(0), false));
        assert!(!p.manifest(Round(1), true), "the pages of round 0 are missing");
        assert!(!p.applied(Round(0)) && p.round_sent(Round(0)) && !p.round_sent(Round(0)));
        assert!(p.manifest(Round(1), true) && !p.manifest(Round(2), false));
        assert!(!p.round_sent(Round(1)), "the last manifest has no pages");
        assert!(!p.complete() && p.applied(Round(0)) && p.complete());
    }
}
