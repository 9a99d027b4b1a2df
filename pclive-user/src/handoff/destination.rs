//! The destination's side.

use super::{Progress, Reason};
use pclive_wire::Round;
use pclive_wire::control::{AbortReason, DestinationMessage, Failure, RemoteError, SourceMessage};

/// The destination's state.
///
/// ```text
///               Prepared              Built            Commit               Running            Destroyed,
///    ┌──────────┐        ┌──────────┐       ┌───────┐         ┌──────────┐          ┌─────────┐ lost  ┌──────┐
///    │ Proposed ├───────▶│ Building ├──────▶│ Ready ├════════▶│ Resuming ├─────────▶│ Running ├──────▶│ Done │
///    └───┬──────┘        └────┬─────┘       └───┬───┘         └────┬─────┘          └─────────┘       └──────┘
///        │                    │ Abort, failed, lost, violation     │ failed
///        │                    ├─────────────────┴──────────────────┘
///        │                    ▼ remove
///        │               ┌──────────┐ Removed, failed ┌─────────┐
///        │               │ Removing ├────────────────▶│ Removed │
///        │               └──────────┘                 └─────────┘
///        │ refused, Abort, lost                            ▲
///        └─────────────────────────────────────────────────┘
/// ```
///
/// The container runs in Running and Done, and may run in Resuming; in every other state it does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationState {
    /// A proposal has come; nothing has been made.
    Proposed,
    /// The skeleton is made, and kept equal to the newest manifest.
    Building(Progress),
    /// Everything is built; the source decides.
    Ready,
    /// The container is this host's, and is being set running.
    Resuming,
    /// The container runs; the source is removing its copy.
    Running,
    /// The container runs, and this migration is over.
    Done,
    /// What was made is being removed.
    Removing(Reason),
    /// Nothing is left, except where cleaning up failed, too.
    Removed {
        /// Why.
        reason: Reason,
        /// Why something is left.
        leftover: Option<Failure>,
    },
}

/// What the destination's machine is told.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // messages, and what the engine does
pub enum DestinationEvent {
    // From the source.
    Manifest {
        round: Round,
        last: bool,
    },
    RoundEnd(Round),
    Commit,
    Abort(AbortReason),
    Destroyed,
    // From the engine.
    /// The proposal can be taken up.
    Prepared,
    /// It cannot; nothing was made.
    Refused(RemoteError),
    /// The pages of this round are taken care of.
    RoundApplied(Round),
    /// Everything but the container's own code has been done.
    Built,
    /// The container runs.
    Running,
    /// What was made is gone.
    Removed,
    /// Something failed here. While removing: something is left.
    Failed(RemoteError),
    /// The connection is lost, or the peer did not send in time, or this server ends.
    Lost(Failure),
}

impl From<&SourceMessage> for DestinationEvent {
    fn from(message: &SourceMessage) -> Self {
        match message {
            SourceMessage::Manifest(manifest) => {
                Self::Manifest { round: manifest.round, last: manifest.last }
            }
            SourceMessage::RoundEnd(summary) => Self::RoundEnd(summary.round),
            SourceMessage::Commit => Self::Commit,
            SourceMessage::Abort(reason) => Self::Abort(reason.clone()),
            SourceMessage::Destroyed => Self::Destroyed,
        }
    }
}

impl DestinationEvent {
    fn name(&self) -> &'static str {
        match self {
            Self::Manifest { .. } => "Manifest",
            Self::RoundEnd(_) => "RoundEnd",
            Self::Commit => "Commit",
            Self::Abort(_) => "Abort",
            Self::Destroyed => "Destroyed",
            Self::Prepared => "Prepared",
            Self::Refused(_) => "Refused",
            Self::RoundApplied(_) => "RoundApplied",
            Self::Built => "Built",
            Self::Running => "Running",
            Self::Removed => "Removed",
            Self::Failed(_) => "Failed",
            Self::Lost(_) => "Lost",
        }
    }
}

/// What the engine has to do at the destination, in the given order. Messages with measurements in them
/// ([`DestinationMessage::Accepted`], `Reconciled`, `RoundApplied`, `Running`) the engine sends itself, after the event of
/// the same name has been taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationAction {
    /// Set the container running. Comes only after the commit.
    Run,
    /// Remove everything that was made: the container with all its processes, pages that were kept, page streams.
    Remove,
    /// Tell the source, which may not be there any more.
    Send(DestinationMessage),
}

/// The destination's machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    state: DestinationState,
}

impl Default for Destination {
    fn default() -> Self {
        Self { state: DestinationState::Proposed }
    }
}

impl Destination {
    /// The state.
    pub fn state(&self) -> &DestinationState {
        &self.state
    }

    /// Whether the migration is over, well or not.
    pub fn is_over(&self) -> bool {
        matches!(self.state, DestinationState::Done | DestinationState::Removed { .. })
    }

    /// Takes an event; returns what has to be done.
    pub fn on(&mut self, event: DestinationEvent) -> Vec<DestinationAction> {
        let state = std::mem::replace(&mut self.state, DestinationState::Proposed);
        let (next, actions) = state.on(event);
        self.state = next;
        actions
    }
}

type Step = (DestinationState, Vec<DestinationAction>);

impl DestinationState {
    fn on(self, event: DestinationEvent) -> Step {
        match self {
            Self::Proposed => Self::proposed(event),
            Self::Building(_) | Self::Ready => self.before_commit(event),
            Self::Resuming => Self::resuming(event),
            // The container runs here whatever happens; only the end of the conversation is awaited.
            Self::Running => match event {
                DestinationEvent::Destroyed | DestinationEvent::Lost(_) => (Self::Done, vec![]),
                _ => (Self::Running, vec![]),
            },
            Self::Removing(reason) => Self::removing(reason, event),
            Self::Done | Self::Removed { .. } => (self, vec![]),
        }
    }

    /// Nothing has been made, so nothing has to be removed.
    fn proposed(event: DestinationEvent) -> Step {
        let rejection = |error| vec![DestinationAction::Send(DestinationMessage::Rejected(error))];
        let (reason, actions) = match event {
            DestinationEvent::Prepared => return (Self::Building(Progress::default()), vec![]),
            DestinationEvent::Refused(error) | DestinationEvent::Failed(error) => {
                (Reason::Destination(error.clone()), rejection(error))
            }
            DestinationEvent::Abort(reason) => (Reason::Source(reason), removed()),
            DestinationEvent::Lost(failure) => (Reason::Lost(failure), vec![]),
            event => {
                let (state, event) = ("Proposed", event.name());
                (Reason::Violation { state, event }, rejection(violation(state, event)))
            }
        };
        (Self::Removed { reason, leftover: None }, actions)
    }

    fn before_commit(mut self, event: DestinationEvent) -> Step {
        let good = match (&mut self, &event) {
            (Self::Building(p), DestinationEvent::Manifest { round, last }) => p.manifest(*round, *last),
            (Self::Building(p), DestinationEvent::RoundEnd(round)) => p.round_sent(*round),
            (Self::Building(p), DestinationEvent::RoundApplied(round)) => p.applied(*round),
            _ => false,
        };
        if good {
            return (self, vec![]);
        }
        let reason = match (&self, event) {
            (Self::Building(p), DestinationEvent::Built) if p.complete() => {
                return (Self::Ready, vec![DestinationAction::Send(DestinationMessage::Ready)]);
            }
            (Self::Ready, DestinationEvent::Commit) => return (Self::Resuming, vec![DestinationAction::Run]),
            (_, DestinationEvent::Abort(reason)) => Reason::Source(reason),
            (_, DestinationEvent::Lost(failure)) => Reason::Lost(failure),
            (_, DestinationEvent::Failed(error)) => Reason::Destination(error),
            (state, event) => Reason::Violation { state: state.name(), event: event.name() },
        };
        (Self::Removing(reason), vec![DestinationAction::Remove])
    }

    /// Committed: the source will not run the container again by itself, so this side goes on whatever it hears.
    fn resuming(event: DestinationEvent) -> Step {
        match event {
            DestinationEvent::Running => (Self::Running, vec![]),
            DestinationEvent::Failed(error) => {
                (Self::Removing(Reason::Destination(error)), vec![DestinationAction::Remove])
            }
            _ => (Self::Resuming, vec![]),
        }
    }

    fn removing(reason: Reason, event: DestinationEvent) -> Step {
        let leftover = match event {
            DestinationEvent::Removed => None,
            DestinationEvent::Failed(error) => Some(Failure::from_error(&error)),
            _ => return (Self::Removing(reason), vec![]),
        };
        let actions = match (&reason, &leftover) {
            (Reason::Lost(_), _) => vec![],
            (Reason::Source(_), None) => removed(),
            (_, None) => vec![DestinationAction::Send(DestinationMessage::Failed(remote_error(&reason)))],
            (_, Some(cleanup)) => {
                let error = Failure::from_error(&remote_error(&reason));
                let error = RemoteError::NotCleanedUp { error, cleanup: cleanup.clone() };
                vec![DestinationAction::Send(DestinationMessage::Failed(error))]
            }
        };
        (Self::Removed { reason, leftover }, actions)
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Proposed => "Proposed",
            Self::Building(_) => "Building",
            Self::Ready => "Ready",
            Self::Resuming => "Resuming",
            Self::Running => "Running",
            Self::Done => "Done",
            Self::Removing(_) => "Removing",
            Self::Removed { .. } => "Removed",
        }
    }
}

fn removed() -> Vec<DestinationAction> {
    vec![DestinationAction::Send(DestinationMessage::Removed)]
}

fn violation(state: &str, event: &str) -> RemoteError {
    RemoteError::Protocol { state: state.into(), message: event.into() }
}

/// A reason as the source is told it.
fn remote_error(reason: &Reason) -> RemoteError {
    match reason {
        Reason::Destination(error) => error.clone(),
        Reason::Violation { state, event } => violation(state, event),
        other => RemoteError::Failed(Failure { chain: vec![other.to_string()], errno: None }),
    }
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

    fn states() -> Vec<DestinationState> {
        let rounds = Progress { manifests: 2, sent: 2, applied: 1, last: false };
        let last = Progress { manifests: 3, sent: 2, applied: 2, last: true };
        vec![
            DestinationState::Proposed,
            DestinationState::Building(rounds),
            DestinationState::Building(last),
            DestinationState::Ready,
            DestinationState::Resuming,
            DestinationState::Running,
            DestinationState::Removing(Reason::Source(AbortReason::Cancelled)),
            DestinationState::Removing(Reason::Destination(remote())),
            DestinationState::Removing(Reason::Lost(failure())),
            DestinationState::Done,
            DestinationState::Removed { reason: Reason::Cancelled, leftover: None },
        ]
    }

    fn events() -> Vec<DestinationEvent> {
        vec![
            DestinationEvent::Manifest { round: Round(2), last: true },
            DestinationEvent::Manifest { round: Round(1), last: false },
            DestinationEvent::RoundEnd(Round(2)),
            DestinationEvent::Commit,
            DestinationEvent::Abort(AbortReason::Cancelled),
            DestinationEvent::Destroyed,
            DestinationEvent::Prepared,
            DestinationEvent::Refused(remote()),
            DestinationEvent::RoundApplied(Round(1)),
            DestinationEvent::Built,
            DestinationEvent::Running,
            DestinationEvent::Removed,
            DestinationEvent::Failed(remote()),
            DestinationEvent::Lost(failure()),
        ]
    }

    /// One cell: the actions' initials, then the next state; `=` for the same state, `·` where its data changed, `!` in
    /// front of a violation.
    fn cell(state: &DestinationState, event: &DestinationEvent) -> String {
        let (next, actions) = state.clone().on(event.clone());
        let violated = match &next {
            _ if next == *state => false,
            DestinationState::Removing(reason) | DestinationState::Removed { reason, .. } => {
                matches!(reason, Reason::Violation { .. })
            }
            _ => false,
        };
        let initials: String = actions
            .iter()
            .map(|action| match action {
                DestinationAction::Run => 'X',
                DestinationAction::Remove => 'R',
                DestinationAction::Send(DestinationMessage::Ready) => 'Y',
                DestinationAction::Send(DestinationMessage::Removed) => 'D',
                DestinationAction::Send(DestinationMessage::Rejected(_)) => 'J',
                DestinationAction::Send(DestinationMessage::Failed(RemoteError::NotCleanedUp { .. })) => 'N',
                DestinationAction::Send(DestinationMessage::Failed(_)) => 'F',
                DestinationAction::Send(other) => panic!("{other:?} is not the machine's to send"),
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
        // Columns: Proposed | Building | Building, complete | Ready | Resuming | Running | Removing because of the
        // source | because of this side | because the connection is lost.
        let table = [
            "Manifest     |!J Removed |·           |!R Removing |!R Removing |=          |=    |=         |=         |=",
            "Manifest     |!J Removed |!R Removing |!R Removing |!R Removing |=          |=    |=         |=         |=",
            "RoundEnd     |!J Removed |!R Removing |!R Removing |!R Removing |=          |=    |=         |=         |=",
            "Commit       |!J Removed |!R Removing |!R Removing |X Resuming  |=          |=    |=         |=         |=",
            "Abort        |D Removed  |R Removing  |R Removing  |R Removing  |=          |=    |=         |=         |=",
            "Destroyed    |!J Removed |!R Removing |!R Removing |!R Removing |=          |Done |=         |=         |=",
            "Prepared     |Building   |!R Removing |!R Removing |!R Removing |=          |=    |=         |=         |=",
            "Refused      |J Removed  |!R Removing |!R Removing |!R Removing |=          |=    |=         |=         |=",
            "RoundApplied |!J Removed |·           |!R Removing |!R Removing |=          |=    |=         |=         |=",
            "Built        |!J Removed |!R Removing |Y Ready     |!R Removing |=          |=    |=         |=         |=",
            "Running      |!J Removed |!R Removing |!R Removing |!R Removing |Running    |=    |=         |=         |=",
            "Removed      |!J Removed |!R Removing |!R Removing |!R Removing |=          |=    |D Removed |F Removed |Removed",
            "Failed       |J Removed  |R Removing  |R Removing  |R Removing  |R Removing |=    |N Removed |N Removed |Removed",
            "Lost         |Removed    |R Removing  |R Removing  |R Removing  |=          |Done |=         |=         |=",
        ];
        assert_eq!(table.len(), events().len());
        for (row, event) in table.iter().zip(events()) {
            let mut cells = row.split('|').map(str::trim);
            assert_eq!(cells.next(), Some(event.name()));
            // The two ends, behind the table's columns, never change.
            for (state, expected) in states().iter().zip(cells.chain(["=", "="])) {
                assert_eq!(cell(state, &event), expected, "{event:?} in {state:?}");
            }
        }
    }
}
