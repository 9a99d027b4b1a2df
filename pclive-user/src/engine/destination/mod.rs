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

mod gate;

pub use gate::PageError;

use super::awake::Awake;
use super::clock::Clock;
use super::usage::{cpu_time, peak_rss_bytes};
use crate::handoff::{self, DestinationAction, DestinationEvent, DestinationState, Reason};
use crate::host;
use crate::restore::Sandbox;
use crate::restore::files::{FileError, OpenedFiles, open_files};
use crate::restore::skeleton::{Skeleton, SkeletonError};
use crate::runtime::{Bundle, BundleError, ContainerId, LinkError, Links, Room, Runtime, RuntimeError};
use crate::transport::{self, Cancellation, DestinationChannel, Hangup, Incoming, PageReceiver};
use gate::Gate;
use nix::fcntl::{OFlag, open};
use nix::sys::resource::UsageWho;
use nix::sys::stat::Mode;
use pclive_wire::Round;
use pclive_wire::control::{
    Accepted, DestinationMessage, Failure, Proposal, RemoteError, RoundApplied, RoundSummary, RunningReport,
    SourceMessage,
};
use pclive_wire::facts::{HostFacts, mismatches};
use pclive_wire::manifest::Manifest;
use pclive_wire::phase::Side;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the source may be silent between two messages: a round over a slow link takes minutes.
const NEXT_MESSAGE: Duration = Duration::from_secs(3600);
/// How long the source may take to open its page streams.
const PAGE_STREAMS: Duration = Duration::from_secs(10);
/// How long the pages of a round may arrive after its end was announced.
const ROUND_END: Duration = Duration::from_secs(60);

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

/// A migration under way. Dropping it ends every process of the skeleton.
struct Building<'a> {
    runtime: &'a dyn Runtime,
    bundle: &'a Bundle,
    clock: Clock,
    skeleton: Option<Skeleton>,
    links: Links,
    gate: Arc<Gate>,
    streams: Vec<Stream>,
    files: Option<OpenedFiles>,
    /// While nobody runs the container.
    awake: Option<Awake>,
}

/// A page stream and the thread that serves it.
struct Stream {
    hangup: Hangup,
    thread: JoinHandle<Duration>,
}

impl<'a> Building<'a> {
    fn start(
        runtime: &'a dyn Runtime,
        bundle: &'a Bundle,
        proposal: &Proposal,
        receivers: Vec<PageReceiver>,
        channel: &mut DestinationChannel,
    ) -> Result<Self, DestinationError> {
        let mut clock = Clock::start(Side::Destination);
        clock.enter("sandbox");
        let sandbox = make_sandbox(runtime, bundle)?;
        let mut links = Links::open(sandbox.netns.as_fd(), None)?;
        links.take_down()?;
        clock.enter("rounds");
        let skeleton = Skeleton::adopt(sandbox)?;
        let failed = Cancellation::new()?;
        channel.cancelled_by(failed.clone());
        let placements = skeleton.placements();
        let gate = Arc::new(Gate::new(proposal.apply, proposal.restore_from, placements, failed));
        let (skeleton, streams) = (Some(skeleton), Vec::new());
        let (files, awake) = (None, None);
        let mut building = Self { runtime, bundle, clock, skeleton, links, gate, streams, files, awake };
        for receiver in receivers {
            building.add_stream(receiver)?;
        }
        Ok(building)
    }

    fn add_stream(&mut self, receiver: PageReceiver) -> Result<(), DestinationError> {
        let hangup = receiver.hangup()?;
        let gate = self.gate.clone();
        let serve = move || {
            gate.run(receiver);
            thread_cpu_time()
        };
        self.streams.push(Stream { hangup, thread: std::thread::spawn(serve) });
        Ok(())
    }

    /// Follows the source's messages to the end. Returns `restore_us`.
    fn run(mut self, peer: &mut Peer) -> Result<u64, DestinationError> {
        let last = loop {
            match self.recv(peer)? {
                SourceMessage::Manifest(manifest) => {
                    self.keep_awake(manifest.keep_awake);
                    if manifest.last {
                        break manifest;
                    }
                    self.reconcile(&manifest, &mut peer.channel)?;
                }
                SourceMessage::RoundEnd(sent) => self.end_round(sent, peer)?,
                SourceMessage::Commit | SourceMessage::Abort(_) | SourceMessage::Destroyed => {}
            }
        };
        self.clock.enter("restore");
        let received = Instant::now();
        self.build(&last)?;
        peer.note(DestinationEvent::Built)?;
        self.clock.enter("wait for commit");
        while *peer.handoff.state() == DestinationState::Ready {
            self.recv(peer)?;
        }
        self.resume(peer, received)
    }

    /// A freeze that fails ends with the next round.
    fn keep_awake(&mut self, awake: bool) {
        if awake != self.awake.is_some() {
            self.awake = Awake::keep_if(awake);
        }
    }

    /// The source's next message; or why its pages cannot be taken.
    fn recv(&self, peer: &mut Peer) -> Result<SourceMessage, DestinationError> {
        peer.recv().map_err(|error| match error {
            DestinationError::Transport(transport::Error::Cancelled) => {
                self.gate.failure().map_or(error, DestinationError::from)
            }
            other => other,
        })
    }

    fn reconcile(
        &mut self,
        manifest: &Manifest,
        channel: &mut DestinationChannel,
    ) -> Result<(), DestinationError> {
        let start = Instant::now();
        self.skeleton().reconcile(manifest)?;
        self.gate.open(manifest.round, manifest.nice);
        let duration_us = start.elapsed().as_micros() as u64;
        Ok(channel.send(&DestinationMessage::Reconciled { round: manifest.round, duration_us })?)
    }

    fn end_round(&mut self, sent: RoundSummary, peer: &mut Peer) -> Result<(), DestinationError> {
        let arrived = self.gate.wait_for_round(sent.round, self.streams.len(), ROUND_END)?;
        if arrived != sent {
            return Err(DestinationError::Incomplete { sent, arrived });
        }
        self.settle(sent.round, false)?;
        let applied = RoundApplied {
            round: sent.round,
            pages: arrived.pages,
            apply_us: self.gate.take_apply_time().as_micros() as u64,
        };
        peer.note(DestinationEvent::RoundApplied(sent.round))?;
        Ok(peer.channel.send(&DestinationMessage::RoundApplied(applied))?)
    }

    /// Everything up to the point where the container only needs to be let go.
    fn build(&mut self, last: &Manifest) -> Result<(), DestinationError> {
        self.skeleton().reconcile(last)?;
        self.clock.enter("settle pages");
        self.settle(last.round, true)?;
        self.clock.enter("open files");
        let files = open_files(&last.descriptions, self.skeleton().sandbox())?;
        self.clock.enter("finish processes");
        self.skeleton().finish(last, &files)?;
        self.clock.enter("ready");
        self.files = Some(files);
        Ok(())
    }

    /// Behind the point of no return: the container is this host's, whatever happens to the connection.
    fn resume(mut self, peer: &mut Peer, received: Instant) -> Result<u64, DestinationError> {
        peer.channel.shield();
        let commit_received_us = self.clock.now_us();
        self.clock.enter("finish sandbox");
        self.runtime.finish_sandbox(self.bundle.id())?;
        self.clock.enter("links up");
        // Nothing of the network may end the migration now: this is the only copy that may run.
        if let Err(error) = self.links.bring_up() {
            tracing::error!("the container runs without its links, bring them up by hand: {error}");
        }
        self.clock.enter("announce");
        if let Err(error) = self.links.announce() {
            tracing::warn!("neighbours learn of the container only from its own traffic: {error}");
        }
        self.clock.enter("sockets live");
        if let Some(files) = self.files.take() {
            for failed in files.go_live() {
                tracing::error!("a connection is lost: {failed}");
            }
        }
        self.clock.enter("resume");
        if let Some(skeleton) = self.skeleton.take() {
            skeleton.release()?;
        }
        let restore_us = received.elapsed().as_micros() as u64;
        peer.note(DestinationEvent::Running)?;
        self.clock.leave();
        self.awake = None;
        // Before the report is dated: the clocks are joined by the time at which it was sent.
        let cpu = self.close_streams() + thread_cpu_time();
        let report = RunningReport {
            restore_us,
            phases: self.clock.phases().to_vec(),
            commit_received_us,
            sent_us: self.clock.now_us(),
            cpu_us: cpu.as_micros() as u64,
            peak_rss_bytes: peak_rss_bytes(),
        };
        if let Err(lost) = peer.channel.send(&DestinationMessage::Running(Box::new(report))) {
            tracing::warn!("the container runs here, but the source cannot be told: {lost}");
        }
        Ok(restore_us)
    }

    /// Ends the page streams; returns the processor time that they took.
    fn close_streams(&mut self) -> Duration {
        self.gate.close();
        let ended = self.streams.drain(..).map(|stream| {
            stream.hangup.hang_up();
            stream.thread.join().unwrap_or_else(|_| {
                tracing::error!("the thread of a page stream panicked");
                Duration::ZERO
            })
        });
        ended.sum()
    }

    /// Places and drops the pages whose time has come with the end of `round`.
    fn settle(&mut self, round: Round, last: bool) -> Result<(), DestinationError> {
        let gate = self.gate.clone();
        let skeleton = self.skeleton();
        gate.settle(round, last, |pid, ranges| Ok(skeleton.drop_pages(pid, ranges)?))
    }

    fn skeleton(&mut self) -> &mut Skeleton {
        self.skeleton.as_mut().expect("taken only at resume")
    }
}

impl Drop for Building<'_> {
    fn drop(&mut self) {
        self.close_streams();
        if let Some(skeleton) = self.skeleton.take() {
            skeleton.destroy();
            if let Err(error) = self.links.restore() {
                tracing::error!("the links of the container that did not come: {error}");
            }
        }
    }
}

/// Has the runtime make the container with pclive's init in it.
fn make_sandbox(runtime: &dyn Runtime, bundle: &Bundle) -> Result<Sandbox, DestinationError> {
    let init = pclive_sys::init::executable().map_err(call("memfd_create"))?;
    let stdio = open_stdio(bundle)?;
    let process =
        runtime.create_sandbox(bundle, init.as_fd(), [&stdio[0], &stdio[1], &stdio[2]].map(AsFd::as_fd))?;
    let open_proc = |file: &str, flags: OFlag| {
        let path = PathBuf::from(format!("/proc/{}/{file}", process.init));
        open(&path, flags | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|source| DestinationError::Open { path, source })
    };
    Ok(Sandbox {
        init: process.init,
        root: open_proc("root", OFlag::O_PATH | OFlag::O_DIRECTORY)?,
        netns: open_proc("ns/net", OFlag::O_RDONLY)?,
        stdio,
    })
}

/// What the container gets as its standard streams: nothing to read, and a log beside its configuration.
fn open_stdio(bundle: &Bundle) -> Result<[OwnedFd; 3], DestinationError> {
    let open_path = |path: PathBuf, flags: OFlag| {
        open(&path, flags | OFlag::O_CLOEXEC, Mode::from_bits_truncate(0o640))
            .map_err(|source| DestinationError::Open { path, source })
    };
    let log =
        || open_path(bundle.path().join("stdio.log"), OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND);
    Ok([open_path("/dev/null".into(), OFlag::O_RDONLY)?, log()?, log()?])
}

/// Processor time of this thread so far.
fn thread_cpu_time() -> Duration {
    cpu_time(UsageWho::RUSAGE_THREAD)
}
