//! The source's side.

use super::{Progress, Reason};
use pclive_wire::Round;
use pclive_wire::control::{AbortReason, DestinationMessage, Failure, RemoteError, SourceMessage};

/// The source's state.
///
/// ```text
///                Accepted              Freeze             PeerReady           Commit
///    ┌──────────┐       ┌────────┐──────────▶┌────────┐         ┌───────┐            ┌───────────┐
///    │ Proposed ├──────▶│ Rounds │  Thawed   │ Frozen ├────────▶│ Ready ├═══════════▶│ Committed │
///    └────┬─────┘       └───┬────┘◀──────────└───┬────┘         └───┬───┘ the point  └─┬───────┬─┘
///         │                 │ cancelled, failed, │ violation        │   of no return   │       │
///         │                 ├────────────────────┴──────────────────┘          Running │       │ anything else
///         │                 ▼ resume, detach, send abort                               ▼       ▼
///         │           ┌──────────┐                                          ┌────────────┐ ┌─────────┐
///         │           │ Aborting │                                          │ Destroying │ │ Unknown │
///         │           └────┬─────┘                                          └──────┬─────┘ └─────────┘
///         │ Rejected,      │ Removed, lost                                         │ Destroyed, failed
///         │ lost           ▼                                                       ▼
///         │           ┌─────────┐                                              ┌──────┐
///         └──────────▶│ Aborted │◀── lost or Failed in any state               │ Done │
///                     └─────────┘    before the commit: resume, detach         └──────┘
/// ```
///
/// The container runs in Proposed, Rounds, Aborting and Aborted; it is frozen from Frozen to Destroying and in Unknown;
/// it is gone in Done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceState {
    /// The proposal is sent.
    Proposed,
    /// Rounds go to the destination while the container runs.
    Rounds(Progress),
    /// The container is frozen, or being frozen; the last manifest and pages go out.
    Frozen(Progress),
    /// The destination is built. Nothing is decided yet.
    Ready,
    /// The commit is on its way.
    Committed,
    /// The destination runs the container; the source's copy is being removed.
    Destroying,
    /// The container has moved.
    Done {
        /// Why the source's copy could not be removed entirely.
        leftover: Option<Failure>,
    },
    /// The container runs on here; the destination is removing its copy.
    Aborting(Reason),
    /// The container runs on here.
    Aborted {
        /// Why.
        reason: Reason,
        /// What is left at the destination.
        remains: Remains,
    },
    /// The commit was sent, and what became of it is not known. The container is frozen here.
    Unknown(Reason),
}

/// What a failed migration left at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Remains {
    /// Nothing: it says so.
    Nothing,
    /// Something: it could not clean up.
    Something,
    /// It was not heard of again. It removes its copy by itself once it notices.
    Unknown,
}

/// What the source's machine is told.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // messages, and what the engine does
pub enum SourceEvent {
    // From the destination.
    Accepted,
    Rejected(RemoteError),
    Reconciled,
    RoundApplied(Round),
    PeerReady,
    Running,
    PeerFailed(RemoteError),
    Removed,
    // From the engine.
    /// A manifest was sent.
    ManifestSent {
        round: Round,
        last: bool,
    },
    /// The pages of a round were sent.
    RoundSent(Round),
    /// The container is about to be frozen.
    Freeze,
    /// The container runs again: it was in a state that cannot be moved but passes.
    Thawed,
    /// Everything is in place at this side, too: hand the container over.
    Commit,
    /// The source's copy has been removed.
    Destroyed,
    /// Something failed here.
    Failed(Failure),
    /// The connection is lost, or the peer did not answer in time.
    Lost(Failure),
    /// The operator wants to stop.
    Cancelled,
}

impl From<&DestinationMessage> for SourceEvent {
    fn from(message: &DestinationMessage) -> Self {
        match message {
            DestinationMessage::Accepted(_) => Self::Accepted,
            DestinationMessage::Rejected(error) => Self::Rejected(error.clone()),
            DestinationMessage::Reconciled { .. } => Self::Reconciled,
            DestinationMessage::RoundApplied(applied) => Self::RoundApplied(applied.round),
            DestinationMessage::Ready => Self::PeerReady,
            DestinationMessage::Running(_) => Self::Running,
            DestinationMessage::Failed(error) => Self::PeerFailed(error.clone()),
            DestinationMessage::Removed => Self::Removed,
        }
    }
}

impl SourceEvent {
    fn name(&self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::Rejected(_) => "Rejected",
            Self::Reconciled => "Reconciled",
            Self::RoundApplied(_) => "RoundApplied",
            Self::PeerReady => "PeerReady",
            Self::Running => "Running",
            Self::PeerFailed(_) => "PeerFailed",
            Self::Removed => "Removed",
            Self::ManifestSent { .. } => "ManifestSent",
            Self::RoundSent(_) => "RoundSent",
            Self::Freeze => "Freeze",
            Self::Thawed => "Thawed",
            Self::Commit => "Commit",
            Self::Destroyed => "Destroyed",
            Self::Failed(_) => "Failed",
            Self::Lost(_) => "Lost",
            Self::Cancelled => "Cancelled",
        }
    }
}

/// What the engine has to do at the source, in the given order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Let the container run on: links up, thawed. Comes only before the commit.
    Resume,
    /// Stop tracking, close every userfaultfd, leave nothing injected.
    Detach,
    /// Tell the destination.
    Send(SourceMessage),
    /// Remove the container.
    Destroy,
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The container runs at the destination.
    Moved {
        /// Why the source's copy could not be removed entirely.
        leftover: Option<Failure>,
    },
    /// The container runs on at the source.
    Stayed {
        /// Why.
        reason: Reason,
        /// What is left at the destination.
        remains: Remains,
    },
    /// The container is frozen at the source and may run at the destination.
    Unknown(Reason),
}

/// The source's machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    state: SourceState,
}

impl Default for Source {
    fn default() -> Self {
        Self { state: SourceState::Proposed }
    }
}

impl Source {
    /// The state.
    pub fn state(&self) -> &SourceState {
        &self.state
    }

    /// How the migration ended, once it has.
    pub fn outcome(&self) -> Option<Outcome> {
        match &self.state {
            SourceState::Done { leftover } => Some(Outcome::Moved { leftover: leftover.clone() }),
            SourceState::Aborted { reason, remains } => {
                Some(Outcome::Stayed { reason: reason.clone(), remains: *remains })
            }
            SourceState::Unknown(reason) => Some(Outcome::Unknown(reason.clone())),
            _ => None,
        }
    }

    /// Takes an event; returns what has to be done.
    pub fn on(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        let state = std::mem::replace(&mut self.state, SourceState::Proposed);
        let (next, actions) = state.on(event);
        self.state = next;
        actions
    }
}

type Step = (SourceState, Vec<SourceAction>);

impl SourceState {
    fn on(self, event: SourceEvent) -> Step {
        match self {
            Self::Proposed | Self::Rounds(_) | Self::Frozen(_) | Self::Ready => self.before_commit(event),
            Self::Committed => Self::committed(event),
            Self::Destroying => Self::destroying(event),
            Self::Aborting(reason) => Self::aborting(reason, event),
            Self::Done { .. } | Self::Aborted { .. } | Self::Unknown(_) => (self, vec![]),
        }
    }

    /// What may happen before the commit, first as it should, then as it should not.
    fn before_commit(self, event: SourceEvent) -> Step {
        match (self, event) {
            (Self::Proposed, SourceEvent::Accepted) => (Self::Rounds(Progress::default()), vec![]),
            (Self::Proposed, SourceEvent::Rejected(error)) => {
                let (reason, remains) = (Reason::Destination(error), Remains::Nothing);
                (Self::Aborted { reason, remains }, vec![SourceAction::Detach])
            }
            (Self::Rounds(progress), SourceEvent::Freeze) => (Self::Frozen(progress), vec![]),
            (Self::Frozen(progress), SourceEvent::Thawed) if !progress.last => {
                (Self::Rounds(progress), vec![])
            }
            (Self::Frozen(progress), SourceEvent::PeerReady) if progress.complete() => (Self::Ready, vec![]),
            (Self::Ready, SourceEvent::Commit) => {
                (Self::Committed, vec![SourceAction::Send(SourceMessage::Commit)])
            }
            (state, SourceEvent::Cancelled) => state.abort(Reason::Cancelled),
            (state, SourceEvent::Failed(failure)) => state.abort(Reason::Local(failure)),
            (state, SourceEvent::Lost(failure)) => state.end(Reason::Lost(failure), Remains::Unknown),
            (state, SourceEvent::PeerFailed(error)) => {
                let remains = remains_after(&error);
                state.end(Reason::Destination(error), remains)
            }
            (state, event) => state.advance(event),
        }
    }

    /// Rounds going forward; whatever else is left is a violation.
    fn advance(mut self, event: SourceEvent) -> Step {
        let frozen = self.is_frozen();
        let good = match (&mut self, &event) {
            (Self::Rounds(p) | Self::Frozen(p), SourceEvent::ManifestSent { round, last }) => {
                // A running container has no last manifest.
                (frozen || !last) && p.manifest(*round, *last)
            }
            (Self::Rounds(p) | Self::Frozen(p), SourceEvent::RoundSent(round)) => p.round_sent(*round),
            // A measurement: what counts is that the round is applied.
            (Self::Rounds(_) | Self::Frozen(_) | Self::Ready, SourceEvent::Reconciled) => true,
            (Self::Rounds(p) | Self::Frozen(p), SourceEvent::RoundApplied(round)) => p.applied(*round),
            _ => false,
        };
        if good {
            (self, vec![])
        } else {
            let reason = Reason::Violation { state: self.name(), event: event.name() };
            self.abort(reason)
        }
    }

    fn committed(event: SourceEvent) -> Step {
        let reason = match event {
            SourceEvent::Running => return (Self::Destroying, vec![SourceAction::Destroy]),
            // Too late: the container is no longer the source's.
            SourceEvent::Cancelled => return (Self::Committed, vec![]),
            SourceEvent::Failed(failure) => Reason::Local(failure),
            SourceEvent::Lost(failure) => Reason::Lost(failure),
            SourceEvent::PeerFailed(error) => Reason::Destination(error),
            event => Reason::Violation { state: "Committed", event: event.name() },
        };
        (Self::Unknown(reason), vec![])
    }

    /// The container runs at the destination: nothing that happens changes this.
    fn destroying(event: SourceEvent) -> Step {
        match event {
            SourceEvent::Destroyed => {
                (Self::Done { leftover: None }, vec![SourceAction::Send(SourceMessage::Destroyed)])
            }
            SourceEvent::Failed(failure) => (Self::Done { leftover: Some(failure) }, vec![]),
            _ => (Self::Destroying, vec![]),
        }
    }

    /// The abort is sent: what the destination said before it heard of it does not count.
    fn aborting(reason: Reason, event: SourceEvent) -> Step {
        let remains = match event {
            SourceEvent::Removed | SourceEvent::Rejected(_) => Remains::Nothing,
            SourceEvent::PeerFailed(error) => remains_after(&error),
            SourceEvent::Lost(_) | SourceEvent::Failed(_) => Remains::Unknown,
            _ => return (Self::Aborting(reason), vec![]),
        };
        (Self::Aborted { reason, remains }, vec![])
    }

    /// Gives up, and tells the destination, which is still there.
    fn abort(self, reason: Reason) -> Step {
        let told = match &reason {
            Reason::Cancelled => AbortReason::Cancelled,
            Reason::Local(failure) => AbortReason::Failed(failure.clone()),
            other => AbortReason::Failed(Failure { chain: vec![other.to_string()], errno: None }),
        };
        let mut actions = self.release();
        actions.push(SourceAction::Send(SourceMessage::Abort(told)));
        (Self::Aborting(reason), actions)
    }

    /// Gives up without anybody to tell.
    fn end(self, reason: Reason, remains: Remains) -> Step {
        let actions = self.release();
        (Self::Aborted { reason, remains }, actions)
    }

    /// What gives the container back to its users; first of all it runs again.
    fn release(&self) -> Vec<SourceAction> {
        let resume = self.is_frozen().then_some(SourceAction::Resume);
        resume.into_iter().chain([SourceAction::Detach]).collect()
    }

    fn is_frozen(&self) -> bool {
        matches!(self, Self::Frozen(_) | Self::Ready)
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Proposed => "Proposed",
            Self::Rounds(_) => "Rounds",
            Self::Frozen(_) => "Frozen",
            Self::Ready => "Ready",
            Self::Committed => "Committed",
            Self::Destroying => "Destroying",
            Self::Done { .. } => "Done",
            Self::Aborting(_) => "Aborting",
            Self::Aborted { .. } => "Aborted",
            Self::Unknown(_) => "Unknown",
        }
    }
}

fn remains_after(error: &RemoteError) -> Remains {
    if matches!(error, RemoteError::NotCleanedUp { .. }) { Remains::Something } else { Remains::Nothing }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure() -> Failure {
        Failure { chain: vec!["failure".into()], errno: None }
    }

    fn remote() -> RemoteError {
        RemoteError::Failed(failure())
    }

    /// Every state, with the next expected round being 1 where there are rounds.
    fn states() -> Vec<SourceState> {
        let rounds = Progress { manifests: 2, sent: 1, applied: 0, last: false };
        let last = Progress { manifests: 3, sent: 2, applied: 2, last: true };
        vec![
            SourceState::Proposed,
            SourceState::Rounds(rounds),
            SourceState::Frozen(rounds),
            SourceState::Frozen(last),
            SourceState::Ready,
            SourceState::Committed,
            SourceState::Destroying,
            SourceState::Aborting(Reason::Cancelled),
            SourceState::Done { leftover: None },
            SourceState::Aborted { reason: Reason::Cancelled, remains: Remains::Nothing },
            SourceState::Unknown(Reason::Cancelled),
        ]
    }

    fn events() -> Vec<SourceEvent> {
        vec![
            SourceEvent::Accepted,
            SourceEvent::Rejected(remote()),
            SourceEvent::Reconciled,
            SourceEvent::RoundApplied(Round(0)),
            SourceEvent::RoundApplied(Round(1)),
            SourceEvent::PeerReady,
            SourceEvent::Running,
            SourceEvent::PeerFailed(remote()),
            SourceEvent::Removed,
            SourceEvent::ManifestSent { round: Round(2), last: false },
            SourceEvent::ManifestSent { round: Round(2), last: true },
            SourceEvent::RoundSent(Round(1)),
            SourceEvent::Freeze,
            SourceEvent::Thawed,
            SourceEvent::Commit,
            SourceEvent::Destroyed,
            SourceEvent::Failed(failure()),
            SourceEvent::Lost(failure()),
            SourceEvent::Cancelled,
        ]
    }

    /// One cell: the actions' initials, then the next state; `=` for the same state, `·` where its data changed, `!` in
    /// front of a violation.
    fn cell(state: &SourceState, event: &SourceEvent) -> String {
        let (next, actions) = state.clone().on(event.clone());
        let violated = matches!(
            &next,
            SourceState::Aborting(Reason::Violation { .. }) | SourceState::Unknown(Reason::Violation { .. })
        );
        let initials: String = actions
            .iter()
            .map(|action| match action {
                SourceAction::Resume => 'R',
                SourceAction::Detach => 'D',
                SourceAction::Send(SourceMessage::Commit) => 'C',
                SourceAction::Send(SourceMessage::Abort(_)) => 'A',
                SourceAction::Send(SourceMessage::Destroyed) => 'G',
                SourceAction::Send(other) => panic!("{other:?} is not the machine's to send"),
                SourceAction::Destroy => 'X',
            })
            .collect();
        let name = match next.name() {
            _ if next == *state => "=",
            same if same == state.name() => "·",
            other => other,
        };
        format!(
            "{}{initials}{}{name}",
            if violated { "!" } else { "" },
            if initials.is_empty() { "" } else { " " }
        )
    }

    #[test]
    fn every_state_answers_every_event_as_drawn() {
        // Columns: Proposed | Rounds | Frozen | Frozen, complete | Ready | Committed | Destroying | Aborting.
        let table = [
            "Accepted     |Rounds       |!DA Aborting |!RDA Aborting|!RDA Aborting|!RDA Aborting|!Unknown|=      |=",
            "Rejected     |D Aborted    |!DA Aborting |!RDA Aborting|!RDA Aborting|!RDA Aborting|!Unknown|=      |Aborted",
            "Reconciled   |!DA Aborting |=            |=            |=            |=            |!Unknown|=      |=",
            "RoundApplied |!DA Aborting |·            |·            |!RDA Aborting|!RDA Aborting|!Unknown|=      |=",
            "RoundApplied |!DA Aborting |!DA Aborting |!RDA Aborting|!RDA Aborting|!RDA Aborting|!Unknown|=      |=",
            "PeerReady    |!DA Aborting |!DA Aborting |!RDA Aborting|Ready        |!RDA Aborting|!Unknown|=      |=",
            "Running      |!DA Aborting |!DA Aborting |!RDA Aborting|!RDA Aborting|!RDA Aborting|X Destroying|=  |=",
            "PeerFailed   |D Aborted    |D Aborted    |RD Aborted   |RD Aborted   |RD Aborted   |Unknown |=      |Aborted",
            "Removed      |!DA Aborting |!DA Aborting |!RDA Aborting|!RDA Aborting|!RDA Aborting|!Unknown|=      |Aborted",
            "ManifestSent |!DA Aborting |·            |·            |!RDA Aborting|!RDA Aborting|!Unknown|=      |=",
            "ManifestSent |!DA Aborting |!DA Aborting |!RDA Aborting|!RDA Aborting|!RDA Aborting|!Unknown|=      |=",
            "RoundSent    |!DA Aborting |·            |·            |!RDA Aborting|!RDA Aborting|!Unknown|=      |=",
            "Freeze       |!DA Aborting |Frozen       |!RDA Aborting|!RDA Aborting|!RDA Aborting|!Unknown|=      |=",
            "Thawed       |!DA Aborting |!DA Aborting |Rounds       |!RDA Aborting|!RDA Aborting|!Unknown|=      |=",
            "Commit       |!DA Aborting |!DA Aborting |!RDA Aborting|!RDA Aborting|C Committed  |!Unknown|=      |=",
            "Destroyed    |!DA Aborting |!DA Aborting |!RDA Aborting|!RDA Aborting|!RDA Aborting|!Unknown|G Done |=",
            "Failed       |DA Aborting  |DA Aborting  |RDA Aborting |RDA Aborting |RDA Aborting |Unknown |Done   |Aborted",
            "Lost         |D Aborted    |D Aborted    |RD Aborted   |RD Aborted   |RD Aborted   |Unknown |=      |Aborted",
            "Cancelled    |DA Aborting  |DA Aborting  |RDA Aborting |RDA Aborting |RDA Aborting |=       |=      |=",
        ];
        assert_eq!(table.len(), events().len());
        for (row, event) in table.iter().zip(events()) {
            let mut cells = row.split('|').map(str::trim);
            assert_eq!(cells.next(), Some(event.name()));
            // The three ends, behind the table's columns, never change.
            for (state, expected) in states().iter().zip(cells.chain(["=", "=", "="])) {
                assert_eq!(cell(state, &event), expected, "{event:?} in {state:?}");
            }
        }
    }

    #[test]
    fn a_migration_that_goes_well() {
        let mut source = Source::default();
        let mut actions = Vec::new();
        for event in [
            SourceEvent::Accepted,
            SourceEvent::ManifestSent { round: Round(0), last: false },
            SourceEvent::Reconciled,
            SourceEvent::RoundSent(Round(0)),
            SourceEvent::RoundApplied(Round(0)),
            SourceEvent::Freeze,
            SourceEvent::Thawed,
            SourceEvent::Freeze,
            SourceEvent::ManifestSent { round: Round(1), last: false },
            SourceEvent::RoundSent(Round(1)),
            SourceEvent::RoundApplied(Round(1)),
            SourceEvent::ManifestSent { round: Round(2), last: true },
            SourceEvent::Reconciled,
            SourceEvent::PeerReady,
            SourceEvent::Commit,
            SourceEvent::Running,
            SourceEvent::Destroyed,
        ] {
            assert_eq!(source.outcome(), None);
            actions.extend(source.on(event));
        }
        assert_eq!(source.outcome(), Some(Outcome::Moved { leftover: None }));
        let commit = SourceAction::Send(SourceMessage::Commit);
        let destroyed = SourceAction::Send(SourceMessage::Destroyed);
        assert_eq!(actions, [commit, SourceAction::Destroy, destroyed]);
    }
}
