//! The blackout at the source: stop, last pages, all state, handoff.

use super::container::{LastPages, ToldFlags};
use super::pages::Outgoing;
use super::{Container, ContainerError, MigrateError, Migration, STEP, SendError};
use crate::capture::Obstacles;
use crate::capture::files::{CapturedFiles, Look, capture_files};
use crate::capture::sockets::SocketCapture;
use crate::capture::threads::StoppedProcess;
use crate::capture::tree::unreaped;
use crate::engine::awake::Awake;
use crate::engine::clock::Clock;
use crate::handoff::SourceEvent;
use crate::policy::hot::HotPages;
use crate::runtime::Links;
use pclive_wire::control::{DestinationMessage, RoundSummary, RunningReport};
use pclive_wire::manifest::{Manifest, Process};
use pclive_wire::{NsPid, Round};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How often a freeze is tried again when the container is in a state that cannot be moved but passes.
const ATTEMPTS: u32 = 50;
/// For how long the container runs on between two attempts.
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(5);
/// How long the cgroup's freezer may take: every thread stands still already.
const FREEZER: Duration = Duration::from_secs(2);

/// The container while it does not run.
pub(super) struct Frozen {
    pub(super) stopped: Vec<StoppedProcess>,
    /// Its sockets, once its state has been sent.
    pub(super) sockets: Option<SocketCapture>,
    pub(super) frozen_us: i64,
    pub(super) awake: Option<Awake>,
}

/// The container runs at the destination.
pub(super) struct Handed {
    pub(super) commit_sent_us: i64,
    pub(super) running_received_us: i64,
    pub(super) report: Box<RunningReport>,
}

impl Migration<'_> {
    /// Stops the container and sends everything that is left.
    pub(super) fn freeze(&mut self) -> Result<(), MigrateError> {
        self.progress.freezing();
        let mut transient = Vec::new();
        for _attempt in 0..ATTEMPTS {
            self.cancellation.check()?;
            match self.try_freeze()? {
                Ok(()) => return Ok(()),
                Err(reasons) => transient = reasons,
            }
            // The attempt has touched them itself.
            self.look_at_sockets();
            std::thread::sleep(BETWEEN_ATTEMPTS);
            self.look_at_sockets();
        }
        Err(MigrateError::Transient(transient))
    }

    /// One attempt. The inner error tells of states that pass; the container runs again then.
    fn try_freeze(&mut self) -> Result<Result<(), Vec<String>>, MigrateError> {
        self.note(SourceEvent::Freeze)?;
        let awake = Awake::keep_if(self.is_short_blackout());
        self.clock.enter("stop threads");
        let frozen_us = self.clock.now_us();
        let stopped = self.container.stop()?;
        let sent = self.send_frozen(&stopped);
        let frozen = self.frozen.insert(Frozen { stopped, sockets: None, frozen_us, awake });
        match sent? {
            Ok(sockets) => {
                frozen.sockets = Some(sockets);
                Ok(Ok(()))
            }
            Err(transient) => {
                self.resume()?;
                self.note(SourceEvent::Thawed)?;
                Ok(Err(transient))
            }
        }
    }

    /// Whether the container stands still only for what is left: not for all of its memory, in which processors may sleep.
    fn is_short_blackout(&self) -> bool {
        !self.options.mode.freezes_first()
    }

    /// Lets the container run on here. One thing that fails does not keep the others from being done.
    pub(super) fn resume(&mut self) -> Result<(), MigrateError> {
        self.clock.enter("resume at the source");
        let thawed = self.container.cgroup().thaw(FREEZER).map_err(ContainerError::Cgroup);
        let up = self.links.restore();
        let stopped = self.frozen.take().map(|frozen| frozen.stopped).unwrap_or_default();
        let resume = |process: StoppedProcess| {
            let pid = process.pid;
            process.resume().map_err(|source| ContainerError::Stop { pid, source })
        };
        let resumed: Vec<_> = stopped.into_iter().map(resume).collect();
        self.container.thawed();
        self.clock.leave();
        thawed?;
        up?;
        Ok(resumed.into_iter().collect::<Result<(), _>>()?)
    }

    fn send_frozen(
        &mut self,
        stopped: &[StoppedProcess],
    ) -> Result<Result<SocketCapture, Vec<String>>, MigrateError> {
        let start = Instant::now();
        let transient = self.passing_states(stopped)?;
        if !transient.is_empty() {
            return Ok(Err(transient));
        }
        self.clock.enter("last dirty pages");
        let (layouts, pages): (Vec<Process>, Vec<LastPages>) =
            self.container.last_round(stopped, &self.sent)?.into_iter().unzip();
        let ToldFlags { told, read } = self.container.told_flags();
        (self.report.mappings_told, self.report.mappings_read) = (told, read);
        let dirty_pages = pages.iter().map(|(_, dirty)| dirty.written.pages()).sum();
        self.begin_round(layouts.clone(), 0, self.is_short_blackout())?;
        self.sender.lift_limit();
        let (sender, before, round) = (&mut self.sender, &mut self.sent, self.round);
        let pages: Vec<(NsPid, LastPages)> = layouts.iter().map(|layout| layout.pid).zip(pages).collect();
        let hot = &mut self.hot;
        let (sent, captured) = std::thread::scope(|scope| {
            let sending =
                scope.spawn(move || send_last_pages(Outgoing::new(sender, before, round), pages, hot));
            let captured = capture(layouts, stopped, &mut self.links, &mut self.container, &mut self.clock);
            self.clock.enter("send last pages");
            (sending.join().expect("sending does not panic"), captured)
        });
        let sent = sent?;
        let (processes, files) = captured?;
        self.report.sockets_known = files.sockets.known();
        self.end_round(sent)?;
        self.note_round(sent, dirty_pages, start, Duration::ZERO);
        if !files.transient.is_empty() {
            return Ok(Err(files.transient));
        }
        self.clock.enter("send state");
        self.send_last(processes, files).map(Ok)
    }

    /// States of the process tree that cannot be moved, but pass.
    fn passing_states(&self, stopped: &[StoppedProcess]) -> Result<Vec<String>, MigrateError> {
        let unreaped = unreaped(self.container.processes(), stopped).map_err(ContainerError::from)?;
        let unreaped = unreaped.into_iter().map(|(parent, child)| {
            format!("process {parent} has not yet waited for its child {child}, which ended")
        });
        let sharing = self.container.sharing_memory().into_iter();
        let sharing = sharing.map(|pid| format!("process {pid} runs in the memory of its parent"));
        let by_signal = stopped.iter().filter(|process| process.by_signal);
        let by_signal =
            by_signal.map(|process| format!("process {} has been stopped by a signal", process.pid));
        Ok(unreaped.chain(sharing).chain(by_signal).collect())
    }

    fn send_last(
        &mut self,
        processes: Vec<Process>,
        files: CapturedFiles,
    ) -> Result<SocketCapture, MigrateError> {
        let CapturedFiles { descriptions, tables, sockets, transient: _ } = files;
        let mut manifest =
            Manifest { round: self.round, keep_awake: true, last: true, nice: 0, processes, descriptions };
        for (process, (_, table)) in manifest.processes.iter_mut().zip(tables) {
            if let Some(state) = &mut process.state {
                state.fds = table;
            }
        }
        self.send_manifest(manifest)?;
        self.round = Round(self.round.0 + 1);
        self.clock.enter("wait for ready");
        self.expect(STEP, |message| match message {
            DestinationMessage::Ready => Ok(()),
            other => Err(other),
        })?;
        Ok(sockets)
    }

    /// Hands the container over.
    pub(super) fn hand_off(&mut self) -> Result<Handed, MigrateError> {
        self.clock.enter("commit");
        self.cancellation.check()?;
        // From here on the container stays frozen, and its links down, even if pclive dies. It is asked to freeze already:
        // here it is made sure of.
        self.container.cgroup().freeze(FREEZER).map_err(ContainerError::Cgroup)?;
        self.links.keep_down()?;
        self.channel.shield();
        self.note(SourceEvent::Commit)?;
        let commit_sent_us = self.clock.now_us();
        self.act()?;
        self.clock.enter("wait for running");
        let report = self.expect(STEP, |message| match message {
            DestinationMessage::Running(report) => Ok(report),
            other => Err(other),
        })?;
        Ok(Handed { commit_sent_us, running_received_us: self.clock.now_us(), report })
    }
}

fn send_last_pages(
    mut outgoing: Outgoing<'_>,
    pages: Vec<(NsPid, LastPages)>,
    hot: &mut HashMap<NsPid, HotPages>,
) -> Result<RoundSummary, SendError> {
    for (pid, (memory, dirty)) in pages {
        let held_back = hot.get_mut(&pid).map(HotPages::take_held_back).unwrap_or_default();
        outgoing.pages(pid, &memory, &dirty.written.union(&held_back))?;
        outgoing.absent(pid, &dirty.absent)?;
    }
    outgoing.end()
}

/// Takes the links down and reads everything but pages.
fn capture(
    layouts: Vec<Process>,
    stopped: &[StoppedProcess],
    links: &mut Links,
    container: &mut Container,
    clock: &mut Clock,
) -> Result<(Vec<Process>, CapturedFiles), MigrateError> {
    clock.enter("capture processes");
    let unbound = container.cpuset().unbound().map_err(ContainerError::Cgroup)?;
    // The links go down as late as possible: while they are up, requests that were under way arrive and wait in the
    // sockets, which are read next; afterwards they are lost, and come again only after the client's timeout of 200 ms.
    let capture = |(layout, stopped)| container.capture(layout, stopped, &unbound);
    let captured = layouts.into_iter().zip(stopped).map(capture).collect::<Result<Vec<_>, _>>()?;
    let (processes, descriptors): (Vec<Process>, Vec<_>) = captured.into_iter().unzip();
    clock.enter("links down");
    links.take_down()?;
    clock.enter("capture files");
    let mut obstacles = Obstacles::default();
    let frozen = Look::Frozen { codicil: Some(links.codicil()?), descriptors };
    let files = capture_files(container.processes(), container.env(), frozen, &mut obstacles)?;
    match obstacles.is_empty() {
        true => Ok((processes, files)),
        false => Err(MigrateError::Obstacles(obstacles.into_sorted())),
    }
}
