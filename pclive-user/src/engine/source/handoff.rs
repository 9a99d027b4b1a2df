//! Keeps the handoff's machine informed, and does what it asks for.

use super::{MigrateError, Migration, STEP, SendError};
use crate::handoff::{Outcome, Reason, Remains, SourceAction, SourceEvent, SourceState};
use crate::transport;
use pclive_wire::control::Failure;

impl Migration<'_> {
    /// Tells the handoff what happened. What it asks for waits for [`Migration::act`]; it is an error if the migration
    /// cannot go on.
    pub(super) fn note(&mut self, event: SourceEvent) -> Result<(), MigrateError> {
        self.asked.extend(self.handoff.on(event));
        let (SourceState::Aborting(reason)
        | SourceState::Aborted { reason, .. }
        | SourceState::Unknown(reason)) = self.handoff.state()
        else {
            return Ok(());
        };
        let unknown = matches!(self.handoff.state(), SourceState::Unknown(_));
        Err(match reason.clone() {
            reason if unknown => MigrateError::Unknown(reason),
            Reason::Destination(error) => MigrateError::Remote(error),
            reason => MigrateError::Protocol(reason.to_string()),
        })
    }

    /// Does what the handoff has asked for.
    pub(super) fn act(&mut self) -> Result<(), MigrateError> {
        while !self.asked.is_empty() {
            match self.asked.remove(0) {
                SourceAction::Resume => {
                    if let Err(error) = self.resume() {
                        tracing::error!("the container cannot be let go: {error}");
                    }
                }
                SourceAction::Detach => self.container.detach(),
                SourceAction::Destroy => self.destroy()?,
                SourceAction::Send(message) => {
                    if let Err(error) = self.channel.send(&message) {
                        self.note(SourceEvent::Lost(Failure::from_error(&error)))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Ends a migration that failed with `error`, and hears the destination out. Returns the error to report: a failure of
    /// a page stream is often the destination's, whose reason waits on the control stream.
    pub(super) fn give_up(&mut self, error: MigrateError) -> MigrateError {
        let mut error = error;
        self.channel.shield();
        let given_up =
            matches!(self.handoff.state(), SourceState::Aborting(_)) || self.handoff.outcome().is_some();
        if !given_up && let Err(unknown @ MigrateError::Unknown(_)) = self.note(event_of(&error)) {
            error = unknown;
        }
        // A failed send is noted, and ends the waiting below.
        let _ = self.act();
        while matches!(self.handoff.state(), SourceState::Aborting(_)) {
            let event = match self.channel.recv(STEP) {
                Ok(message) => SourceEvent::from(&message),
                Err(lost) => SourceEvent::Lost(Failure::from_error(&lost)),
            };
            if let (SourceEvent::PeerFailed(remote), false) =
                (&event, matches!(error, MigrateError::Remote(_)))
            {
                error = MigrateError::Remote(remote.clone());
            }
            self.handoff.on(event);
        }
        match self.handoff.outcome() {
            Some(Outcome::Stayed { remains: Remains::Something, .. }) => {
                tracing::error!("the destination could not remove everything that it had made");
            }
            Some(Outcome::Stayed { remains: Remains::Unknown, .. }) => {
                tracing::warn!("the destination has not said that it removed what it had made");
            }
            _ => {}
        }
        error
    }
}

fn event_of(error: &MigrateError) -> SourceEvent {
    match error {
        MigrateError::Transport(transport::Error::Cancelled)
        | MigrateError::Send(SendError::Transport(transport::Error::Cancelled)) => SourceEvent::Cancelled,
        other => SourceEvent::Failed(Failure::from_error(other)),
    }
}
