//! A migration under way at the destination: from the sandbox to the running container.

use super::gate::Gate;
use super::{DestinationError, Peer, call};
use crate::engine::awake::Awake;
use crate::engine::clock::Clock;
use crate::engine::fd_table::make_room;
use crate::engine::usage::{cpu_time, peak_rss_bytes};
use crate::handoff::{DestinationEvent, DestinationState};
use crate::restore::Sandbox;
use crate::restore::files::{OpenedFiles, open_files};
use crate::restore::skeleton::Skeleton;
use crate::runtime::{Bundle, Links, Runtime};
use crate::transport::{self, Cancellation, DestinationChannel, Hangup, PageReceiver};
use nix::fcntl::{OFlag, open};
use nix::sys::resource::UsageWho;
use nix::sys::stat::Mode;
use pclive_wire::Round;
use pclive_wire::control::{
    DestinationMessage, Proposal, RoundApplied, RoundSummary, RunningReport, SourceMessage,
};
use pclive_wire::manifest::Manifest;
use pclive_wire::phase::Side;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the pages of a round may arrive after its end was announced.
const ROUND_END: Duration = Duration::from_secs(60);

/// A migration under way. Dropping it ends every process of the skeleton.
pub(super) struct Building<'a> {
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
    /// Makes the sandbox, and takes pages from then on.
    pub(super) fn start(
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
    pub(super) fn run(mut self, peer: &mut Peer) -> Result<u64, DestinationError> {
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
        make_room(&manifest.processes);
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
        if let Err(error) = self.links.keep_up() {
            tracing::error!("the links of the container may go down when pclive ends: {error}");
        }
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
