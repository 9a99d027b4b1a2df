//! The source of a migration: rounds while the container runs, the freeze, the handoff, and the end of the source's copy.
//!
//! Whatever fails before the commit leaves the container running here, untouched: threads are let go, links come up, the
//! userfaultfds are closed. Behind the commit this side never lets the container run again by itself. Which of the two it
//! is decides the machine of [`crate::handoff`]: it is told everything that happens, and says what has to be done.
//!
//! The same holds if pclive is killed. Before the commit the kernel lets the threads go, ends the write protection and
//! detaches the eBPF programs, and a [`LastWill`](pclive_sys::will) takes a socket that is just being read out of its
//! mode, brings the links back, and only then thaws the container, which is frozen by its cgroup while the links are down.
//! Just before the commit is sent the will is revoked: from then on the container stays as it is, for the operator to
//! decide. A thread that makes calls for pclive just then finds its way back by itself ([`pclive_sys::script`]).

mod container;
mod freeze;
mod handoff;
mod pages;
mod rounds;
mod sent;

use sent::Sent;

pub use container::{Container, ContainerError};
pub use pages::SendError;

use super::clock::Clock;
use super::report::{Report, RoundReport};
use super::usage::cpu_time;
use crate::capture::files::{FileError, Look, capture_files};
use crate::capture::preflight::{PreflightError, survey};
use crate::capture::{Obstacle, Obstacles};
use crate::handoff::{Reason, Source, SourceAction, SourceEvent};
use crate::host::{self, HostError};
use crate::policy::hot::HotPages;
use crate::policy::mode::Mode;
use crate::runtime::{ContainerId, LinkError, Links, Runtime, RuntimeError, Status};
use crate::track::programs::ObserveError;
use crate::track::{Heat, Tracker, WriteObserver};
use crate::transport::{self, Cancellation, Pace, PageSender, SourceChannel, ZeroCopy};
use freeze::{Frozen, Handed};
use nix::sys::resource::UsageWho;
use pclive_wire::control::{AbortReason, DestinationMessage, Failure, Proposal, RemoteError, SourceMessage};
use pclive_wire::facts::mismatches;
use pclive_wire::phase::{ClockJoin, Side};
use pclive_wire::{NsPid, Round};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

/// How long the destination may take for a step that it answers.
const STEP: Duration = Duration::from_secs(120);

/// What `pclive migrate` was asked for.
#[derive(Debug)]
pub struct Options {
    /// The container.
    pub container: ContainerId,
    /// The destination.
    pub to: SocketAddr,
    /// When to freeze, and when the destination applies pages.
    pub mode: Mode,
    /// Rounds before this one wait in the destination's memory.
    pub restore_from: Round,
    /// Rounds before the freeze, at most; 0 freezes at once.
    pub max_rounds: u32,
    /// Predicted blackout at which to freeze.
    pub max_blackout: Duration,
    /// Most bytes per second before the freeze.
    pub max_bandwidth: Option<u64>,
    /// How far the rounds step back behind other work on this host: what is added to pclive's nice value.
    pub nice: u8,
    /// A page written in so many rounds in a row is held back; 0 holds back none.
    pub hot_rounds: usize,
    /// Of a page that was sent before, send only the blocks that have changed.
    pub patch_pages: bool,
    /// Whether pages are sent without a copy.
    pub zero_copy: ZeroCopy,
}

/// What a migration tells while it runs.
pub trait Progress {
    /// Round `round` has begun: so many pages are dirty.
    fn round(&mut self, round: Round, dirty_pages: u64);
    /// So much has been sent in this round.
    fn sent(&mut self, pages: u64);
    /// A round is over.
    fn round_over(&mut self, report: &RoundReport, predicted_blackout: Option<Duration>);
    /// The container is being frozen.
    fn freezing(&mut self);
}

/// Why a migration failed at the source. The container runs on here unless the variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum MigrateError {
    /// Nothing was touched.
    #[error("{} obstacle(s) to moving the container", .0.len())]
    Obstacles(Vec<Obstacle>),
    #[error("container {0} is {1}, not running")]
    NotRunning(ContainerId, Status),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Transport(#[from] transport::Error),
    #[error(transparent)]
    Container(#[from] ContainerError),
    #[error("cannot read the container's files")]
    Files(#[from] FileError),
    #[error(transparent)]
    Links(#[from] LinkError),
    #[error(transparent)]
    Observe(#[from] ObserveError),
    #[error(transparent)]
    Send(#[from] SendError),
    #[error("getrandom")]
    Random(#[source] getrandom::Error),
    #[error("cannot survey the container")]
    Preflight(#[from] PreflightError),
    /// The destination refused, or failed.
    #[error("the destination failed")]
    Remote(#[source] RemoteError),
    /// The destination said something that the protocol does not allow now.
    #[error("{0}")]
    Protocol(String),
    /// A state that passes did not pass.
    #[error("the container cannot be moved at the moment: {}", .0.join("; "))]
    Transient(Vec<String>),
    /// The commit was sent, and no good news came back. The source's copy is frozen.
    #[error("after the commit the destination may or may not run the container; the copy here is frozen")]
    Unknown(#[source] Reason),
    /// The container runs at the destination, but its remains here could not be removed.
    #[error("the container runs at the destination, but its copy here could not be removed")]
    Remains(#[source] RuntimeError),
}

/// A migration at the source.
struct Migration<'a> {
    options: &'a Options,
    runtime: &'a dyn Runtime,
    cancellation: &'a Cancellation,
    progress: &'a mut dyn Progress,
    clock: Clock,
    container: Container,
    links: Links,
    channel: SourceChannel,
    sender: PageSender,
    /// Sees every write as it happens; none in the tier that only scans.
    observer: Option<WriteObserver>,
    heat: Heat,
    /// What the destination has.
    sent: Sent,
    /// The pages of each process that are held back.
    hot: HashMap<NsPid, HotPages>,
    round: Round,
    report: Report,
    handoff: Source,
    /// What the handoff asked for and has not been done yet.
    asked: Vec<SourceAction>,
    /// The container while it does not run.
    frozen: Option<Frozen>,
}

/// Moves a container, whose writes `tracker` tracks. The report is filled in as far as the migration came.
pub fn migrate(
    options: &Options,
    tracker: Tracker,
    runtime: &dyn Runtime,
    cancellation: &Cancellation,
    progress: &mut dyn Progress,
    report: &mut Report,
) -> Result<(), MigrateError> {
    let mut clock = Clock::start(Side::Source);
    clock.enter("preflight");
    report.container = options.container.to_string();
    report.mode = options.mode.to_string();
    report.tracker = tracker.tier().to_string();
    let mut container = preflight(options, runtime)?;
    clock.enter("connect");
    let facts = host::facts()?;
    let proposal = Proposal {
        container: options.container.to_string(),
        apply: options.mode.apply_mode(),
        restore_from: options.restore_from,
        page_streams: 1,
        facts: facts.clone(),
    };
    let (mut channel, accepted) = SourceChannel::connect(options.to, proposal, cancellation.clone())?;
    let differing = mismatches(&facts, &accepted.facts);
    if !differing.is_empty() {
        channel.send(&SourceMessage::Abort(AbortReason::HostMismatch(differing.clone())))?;
        return Err(MigrateError::Remote(RemoteError::HostMismatch(differing)));
    }
    let pace = Pace::new(options.max_bandwidth);
    let sender = PageSender::connect(options.to, accepted.token, 0, pace)?.with_zero_copy(options.zero_copy);
    let freezer = container.cgroup().freezer().map_err(ContainerError::Cgroup)?;
    let links = Links::open(container.env().netns.as_fd(), Some(freezer))?;
    let observer = observe(tracker, &mut container)?;
    let mut migration = Migration {
        options,
        runtime,
        cancellation,
        progress,
        clock,
        container,
        links,
        channel,
        sender,
        observer,
        heat: Heat::default(),
        sent: Sent::nothing(options.patch_pages && !options.mode.freezes_first())
            .map_err(MigrateError::Random)?,
        hot: HashMap::new(),
        round: Round(0),
        report: std::mem::take(report),
        handoff: Source::default(),
        asked: Vec::new(),
        frozen: None,
    };
    let result = migration.run();
    migration.finish_report();
    *report = migration.report;
    result
}

/// Attaches the tracker's eBPF programs, if it has any.
fn observe(tracker: Tracker, container: &mut Container) -> Result<Option<WriteObserver>, MigrateError> {
    let mut observer = tracker.observe(container.cgroup())?;
    if let Some(watch) = observer.as_mut().and_then(WriteObserver::take_option_watch) {
        container.env().sockets.watch_options(Box::new(watch));
    }
    if let Some(flags) = observer.as_mut().and_then(WriteObserver::take_mapping_flags) {
        container.ask_flags_of(Box::new(flags));
    }
    Ok(observer)
}

/// Finds every obstacle before anything is touched.
fn preflight(options: &Options, runtime: &dyn Runtime) -> Result<Container, MigrateError> {
    let state = runtime.state(&options.container)?;
    let init = match (state.status, state.init) {
        (Status::Running, Some(init)) => init,
        (status, _) => return Err(MigrateError::NotRunning(state.id, status)),
    };
    let mut container = Container::open(init)?;
    let mut lasting: Option<Vec<Obstacle>> = None;
    for surveys_left in (0..SURVEYS).rev() {
        match survey_all(&container) {
            Ok(mut found) => {
                found.retain(|obstacle| lasting.as_ref().is_none_or(|before| before.contains(obstacle)));
                if found.is_empty() {
                    return Ok(container);
                }
                lasting = Some(found);
            }
            Err(error) if surveys_left == 0 => return Err(error),
            Err(_) => {}
        }
        std::thread::sleep(BETWEEN_SURVEYS);
        container.refresh()?;
    }
    Err(MigrateError::Obstacles(lasting.unwrap_or_default()))
}

/// How often a container with obstacles is looked at again, for those that are always there: processes come and go while it
/// is surveyed, one that ends cannot be read, and one that is missing looks like somebody outside to those it shares a pipe
/// or a socket with. What is overlooked here the freeze finds.
const SURVEYS: u32 = 25;
const BETWEEN_SURVEYS: Duration = Duration::from_millis(20);

fn survey_all(container: &Container) -> Result<Vec<Obstacle>, MigrateError> {
    let mut obstacles = Obstacles::default();
    let cgroup = container.cgroup();
    if cgroup.is_frozen().map_err(ContainerError::Cgroup)? {
        let remedy =
            "make sure that no other host runs it; then bring its links up and write 0 to cgroup.freeze";
        let reason = "it is frozen, perhaps since a migration whose outcome was not known";
        obstacles.add(NsPid(1), format!("cgroup {}", cgroup.path().display()), reason, remedy);
    }
    survey(container.processes(), container.env(), &mut obstacles)?;
    capture_files(container.processes(), container.env(), Look::Survey, &mut obstacles)?;
    Ok(obstacles.into_sorted())
}

impl Migration<'_> {
    fn run(&mut self) -> Result<(), MigrateError> {
        self.note(SourceEvent::Accepted)?;
        self.clock.enter("rounds");
        match self.pre_copy().and_then(|()| self.freeze()).and_then(|()| self.hand_off()) {
            Ok(running) => {
                self.take_report(&running);
                self.act()?;
                self.report.result = "running".into();
                Ok(())
            }
            Err(error) => Err(self.give_up(error)),
        }
    }

    /// The destination's next message, which must be one that `wanted` takes.
    fn expect<T>(
        &mut self,
        limit: Duration,
        wanted: impl Fn(DestinationMessage) -> Result<T, DestinationMessage>,
    ) -> Result<T, MigrateError> {
        loop {
            let message = self.channel.recv(limit)?;
            self.note(SourceEvent::from(&message))?;
            match wanted(message) {
                Ok(value) => return Ok(value),
                Err(DestinationMessage::Reconciled { .. }) => {}
                Err(other) => {
                    return Err(MigrateError::Protocol(format!(
                        "the destination answered {other:?} out of turn"
                    )));
                }
            }
        }
    }

    /// The container runs at the destination: removes the copy here.
    fn destroy(&mut self) -> Result<(), MigrateError> {
        self.clock.enter("destroy");
        if let Some(Frozen { stopped, sockets, awake, frozen_us: _ }) = self.frozen.take() {
            drop(awake);
            if let Some(Err(error)) = sockets.map(|sockets| sockets.silence()) {
                tracing::warn!("connections of the source's copy cannot be silenced: {error}");
            }
            crate::capture::threads::kill_all(stopped);
        }
        self.container.detach();
        let removed = self.runtime.delete(&self.options.container);
        self.clock.leave();
        match removed {
            Ok(()) => self.note(SourceEvent::Destroyed),
            Err(error) => {
                self.note(SourceEvent::Failed(Failure::from_error(&error)))?;
                Err(MigrateError::Remains(error))
            }
        }
    }

    fn take_report(&mut self, running: &Handed) {
        let remote = &running.report;
        let join = ClockJoin::from_exchange(
            running.commit_sent_us,
            remote.commit_received_us,
            remote.sent_us,
            running.running_received_us,
        );
        self.report.clock_uncertainty_us = join.uncertainty_us;
        self.report.restore_us = remote.restore_us;
        self.report.destination_cpu_us = remote.cpu_us;
        self.report.destination_peak_rss_bytes = remote.peak_rss_bytes;
        self.report.phases = join.to_source(&remote.phases);
        let resumed =
            self.report.phases.iter().find(|phase| phase.name == "resume").map(|phase| phase.end_us());
        let resumed = resumed.unwrap_or(running.running_received_us);
        let frozen_us = self.frozen.as_ref().map_or(resumed, |frozen| frozen.frozen_us);
        self.report.blackout_us = (resumed - frozen_us).max(0) as u64;
    }

    fn finish_report(&mut self) {
        self.clock.leave();
        let report = &mut self.report;
        report.phases.extend_from_slice(self.clock.phases());
        report.phases.sort_by_key(|phase| phase.start_us);
        let stats = self.sender.stats();
        report.bytes_sent = stats.bytes;
        report.sends = stats.sends;
        report.zerocopy.sends = stats.zerocopy_sends;
        report.zerocopy.copied = stats.zerocopy_copied;
        report.total_us = self.clock.now_us() as u64;
        report.attach_stop_us = self.container.attach_stop().as_micros() as u64;
        report.source_cpu_us = cpu_time(UsageWho::RUSAGE_SELF).as_micros() as u64;
    }
}
