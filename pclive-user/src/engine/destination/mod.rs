//! The destination of a migration: makes the sandbox, keeps the skeleton equal to the manifests, and lets it run when the
//! source has committed. Whatever fails before that is undone here completely.
//!
//! # If pclive is killed here
//!
//! Nobody is left to undo anything then. What becomes of the container depends on how far its migration was:
//!
//! ```text
//! sandbox made, marked ──▶ … ──▶ commit received, mark removed ──▶ … ──▶ released ──▶ …
//! │        a leftover            │        dead, but not a leftover       │    alive
//! ```
//!
//! - A skeleton dies with pclive: the kernel kills every process of it (`PTRACE_O_EXITKILL`) and the links return to what
//!   they were. What the runtime made stands: its record of the container, with the mark in it, and the cgroup. The next
//!   pclive finds that when it starts ([`Destination::clear_leftovers`]), or when a container of that name is proposed.
//! - It takes a container for a leftover only if the runtime's record of it bears the mark *and* says that it was made from
//!   the very bundle that this migration has locked. The lock is the kernel's and goes with whoever has it, so then there
//!   is nobody who could finish it: neither in this process nor in another with the same bundles.
//! - The mark goes before anything else is done for a committed container. From then on pclive never removes it by itself,
//!   and refuses its name. Up to the release its processes still die with pclive; the release is one moment for all of
//!   them ([`Skeleton::release`]), after which they live without it. The source hears nothing, keeps its copy frozen and
//!   says that the outcome is unknown: the operator finds here a container that is either stopped or running, and
//!   deletes the copy that is not to go on.
//! - A runtime's command that pclive was waiting for when it was killed goes on alone. If a container of that name is
//!   proposed before it has ended, that one migration may be refused.
//!
//! [`Skeleton::release`]: crate::restore::skeleton::Skeleton::release

mod building;
mod gate;

pub use gate::PageError;

use crate::handoff::{self, DestinationAction, DestinationEvent, DestinationState, Reason};
use crate::host;
use crate::restore::files::FileError;
use crate::restore::skeleton::SkeletonError;
use crate::runtime::{Bundle, BundleError, ContainerId, LinkError, Room, Runtime, RuntimeError};
use crate::transport::{self, DestinationChannel, Incoming};
use building::Building;
use pclive_wire::control::{
    Accepted, DestinationMessage, Failure, Proposal, RemoteError, RoundSummary, SourceMessage,
};
use pclive_wire::facts::{HostFacts, mismatches};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long the source may be silent between two messages: a round over a slow link takes minutes.
const NEXT_MESSAGE: Duration = Duration::from_secs(3600);
/// How long the source may take to open its page streams.
const PAGE_STREAMS: Duration = Duration::from_secs(10);

/// Why a migration failed at the destination.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum DestinationError {
    #[error(transparent)]
    Transport(#[from] transport::Error),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Links(#[from] LinkError),
    #[error("cannot build the container")]
    Skeleton(#[from] SkeletonError),
    #[error("cannot open the container's files")]
    Files(#[from] FileError),
    #[error(transparent)]
    Pages(#[from] PageError),
    /// A call of this process failed.
    #[error("{call}")]
    Call { call: &'static str, source: nix::Error },
    /// The init of the sandbox could not be made.
    #[error("cannot open {path}")]
    Open { path: PathBuf, source: nix::Error },
    /// The source says that it sent other pages than arrived.
    #[error("pages are missing: sent {sent:?}, arrived {arrived:?}")]
    Incomplete { sent: RoundSummary, arrived: RoundSummary },
    /// The source gave up, or did what the protocol does not allow.
    #[error("the handoff ended")]
    Handoff(#[source] Reason),
}

impl DestinationError {
    /// The error as the source will see it.
    fn to_remote(&self) -> RemoteError {
        match self {
            Self::Incomplete { sent, arrived } => {
                RemoteError::RoundIncomplete { sent: *sent, arrived: *arrived }
            }
            other => RemoteError::Failed(Failure::from_error(other)),
        }
    }
}

fn call(call: &'static str) -> impl FnOnce(nix::Error) -> DestinationError {
    move |source| DestinationError::Call { call, source }
}

/// How a migration ended.
#[derive(Debug)]
pub enum Ended {
    /// The container runs here.
    Running {
        /// From the last byte of the final state to the container running, in microseconds.
        restore_us: u64,
    },
    /// The proposal was not taken up; nothing was made.
    Rejected(RemoteError),
    /// It failed; nothing is left of it, unless the second error says otherwise.
    Failed(DestinationError, Option<RuntimeError>),
}

/// Takes containers.
#[derive(Debug)]
pub struct Destination {
    runtime: Box<dyn Runtime>,
    bundles: PathBuf,
}

impl Destination {
    /// Takes containers whose bundles are below `bundles`.
    pub fn new(runtime: Box<dyn Runtime>, bundles: &Path) -> Self {
        Self { runtime, bundles: bundles.to_owned() }
    }

    /// Carries out one migration, to its end.
    pub fn migrate(&self, incoming: Incoming) -> Result<Ended, DestinationError> {
        let Incoming { proposal, channel, session, cancellation: _ } = incoming;
        let mut peer = Peer { channel, handoff: handoff::Destination::default() };
        let (bundle, facts) = match self.consider(&proposal) {
            Ok(considered) => considered,
            Err(refusal) => {
                peer.tell(DestinationEvent::Refused(refusal.clone()));
                return Ok(Ended::Rejected(refusal));
            }
        };
        peer.note(DestinationEvent::Prepared)?;
        peer.channel.send(&DestinationMessage::Accepted(Accepted { token: session.token(), facts }))?;
        let built = session
            .streams(PAGE_STREAMS, &mut peer.channel)
            .map_err(DestinationError::from)
            .and_then(|receivers| {
                Building::start(self.runtime.as_ref(), &bundle, &proposal, receivers, &mut peer.channel)
            })
            .and_then(|building| building.run(&mut peer));
        match built {
            Ok(restore_us) => Ok(Ended::Running { restore_us }),
            Err(error) => Ok(self.undo(&bundle, &mut peer, error)),
        }
    }

    /// Whether the proposal can be taken up at all: with what bundle, on what host.
    fn consider(&self, proposal: &Proposal) -> Result<(Bundle, HostFacts), RemoteError> {
        let failed =
            |error: &(dyn std::error::Error + 'static)| RemoteError::Failed(Failure::from_error(error));
        let facts = host::facts().map_err(|e| failed(&e))?;
        let differing = mismatches(&proposal.facts, &facts);
        if !differing.is_empty() {
            return Err(RemoteError::HostMismatch(differing));
        }
        let id = ContainerId::new(&proposal.container).map_err(|e| failed(&e))?;
        let bundle = Bundle::open(&self.bundles, &id).map_err(|e| failed(&e))?;
        match self.clear_leftover(&bundle) {
            Ok(Room::Free | Room::Cleared) => Ok((bundle, facts)),
            Ok(Room::Taken) => Err(RemoteError::NameTaken { container: proposal.container.clone() }),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Removes what a killed pclive has left of migrations into the bundles here. A bundle that is in use or cannot be used
    /// now is passed over.
    pub fn clear_leftovers(&self) {
        let entries = std::fs::read_dir(&self.bundles).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| ContainerId::new(entry.file_name().to_str()?).ok());
        for bundle in names.filter_map(|id| Bundle::open(&self.bundles, &id).ok()) {
            if let Err(error) = self.clear_leftover(&bundle) {
                let id = bundle.id();
                tracing::error!("what a killed pclive may have left of container {id}: {error}");
            }
        }
    }

    /// Removes the bundle's container if it is a leftover.
    fn clear_leftover(&self, bundle: &Bundle) -> Result<Room, RuntimeError> {
        self.runtime.make_room(bundle).inspect(|room| {
            if *room == Room::Cleared {
                tracing::warn!(
                    "removed container {}, which a killed pclive had left unfinished",
                    bundle.id()
                );
            }
        })
    }

    /// Removes what was made, and tells the source.
    fn undo(&self, bundle: &Bundle, peer: &mut Peer, error: DestinationError) -> Ended {
        let finished = *peer.handoff.state() == DestinationState::Resuming;
        if !matches!(peer.handoff.state(), DestinationState::Removing(_)) {
            peer.tell(DestinationEvent::Failed(error.to_remote()));
        }
        let cleanup = match finished {
            true => self.runtime.delete(bundle.id()).err(),
            false => self.runtime.make_room(bundle).err(),
        };
        peer.tell(match &cleanup {
            None => DestinationEvent::Removed,
            Some(cleanup) => DestinationEvent::Failed(RemoteError::Failed(Failure::from_error(cleanup))),
        });
        Ended::Failed(error, cleanup)
    }
}

/// The source, and what it may still do.
struct Peer {
    channel: DestinationChannel,
    handoff: handoff::Destination,
}

impl Peer {
    /// The source's next message, if it may come now.
    fn recv(&mut self) -> Result<SourceMessage, DestinationError> {
        let message = self.channel.recv(NEXT_MESSAGE)?;
        self.note(DestinationEvent::from(&message))?;
        Ok(message)
    }

    /// Tells the handoff what happened; it is an error if the migration cannot go on. To run or to remove the container,
    /// which the handoff may ask for, is what the caller goes on with.
    fn note(&mut self, event: DestinationEvent) -> Result<(), DestinationError> {
        self.tell(event);
        match self.handoff.state() {
            DestinationState::Removing(reason) => Err(DestinationError::Handoff(reason.clone())),
            _ => Ok(()),
        }
    }

    /// The same, with the migration ending anyway.
    fn tell(&mut self, event: DestinationEvent) {
        for action in self.handoff.on(event) {
            if let DestinationAction::Send(message) = action
                && let Err(lost) = self.channel.send(&message)
            {
                tracing::warn!("the source cannot be told: {lost}");
            }
        }
    }
}
