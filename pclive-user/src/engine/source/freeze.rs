//! The blackout at the source: stop, last pages, all state, handoff.

use super::pages::{ProcessPages, send_round};
use super::{MigrateError, Migration, STEP};
use crate::capture::files::{CapturedFiles, capture_files};
use crate::capture::sockets::SocketCapture;
use crate::capture::threads::StoppedProcess;
use crate::capture::tree::unreaped;
use crate::capture::{Access, Obstacles};
use pclive_wire::Round;
use pclive_wire::control::{DestinationMessage, RunningReport, SourceMessage};
use pclive_wire::manifest::{Manifest, Process};
use std::time::{Duration, Instant};

/// How often a freeze is tried again when the container is in a state that cannot be moved but passes.
const ATTEMPTS: u32 = 50;
/// For how long the container runs on between two attempts.
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(5);
/// How long the cgroup's freezer may take: every thread stands still already.
const FREEZER: Duration = Duration::from_secs(2);

/// The frozen container, whose state has been sent.
pub(super) struct Frozen {
    stopped: Vec<StoppedProcess>,
    sockets: SocketCapture,
    frozen_us: i64,
}

/// The container runs at the destination; this is what is left here.
pub(super) struct Handed {
    pub(super) stopped: Vec<StoppedProcess>,
    pub(super) sockets: SocketCapture,
    pub(super) frozen_us: i64,
    pub(super) commit_sent_us: i64,
    pub(super) running_received_us: i64,
    pub(super) report: Box<RunningReport>,
}

impl Migration<'_> {
    /// Stops the container and sends everything that is left. On failure it runs again.
    pub(super) fn freeze(&mut self) -> Result<Frozen, MigrateError> {
        self.progress.freezing();
        let mut transient = Vec::new();
        for _attempt in 0..ATTEMPTS {
            self.cancellation.check()?;
            match self.try_freeze()? {
                Ok(frozen) => return Ok(frozen),
                Err(reasons) => transient = reasons,
            }
            std::thread::sleep(BETWEEN_ATTEMPTS);
        }
        Err(MigrateError::Transient(transient))
    }

    /// One attempt. The inner error tells of states that pass.
    fn try_freeze(&mut self) -> Result<Result<Frozen, Vec<String>>, MigrateError> {
        self.clock.enter("stop threads");
        let frozen_us = self.clock.now_us();
        let stopped = self.container.stop()?;
        match self.send_frozen(&stopped) {
            Ok(Ok(sockets)) => Ok(Ok(Frozen { stopped, sockets, frozen_us })),
            Ok(Err(transient)) => {
                self.resume(stopped)?;
                Ok(Err(transient))
            }
            Err(error) => {
                if let Err(also) = self.resume(stopped) {
                    tracing::error!("the container cannot be let go: {also}");
                }
                Err(error)
            }
        }
    }

    /// Lets the container run on here.
    fn resume(&mut self, stopped: Vec<StoppedProcess>) -> Result<(), MigrateError> {
        self.clock.enter("resume at the source");
        self.links.restore()?;
        for process in stopped {
            let pid = process.pid;
            process.resume().map_err(|source| super::ContainerError::Stop { pid, source })?;
        }
        self.clock.leave();
        Ok(())
    }

    fn send_frozen(
        &mut self,
        stopped: &[StoppedProcess],
    ) -> Result<Result<SocketCapture, Vec<String>>, MigrateError> {
        let start = Instant::now();
        let unreaped = unreaped(self.container.processes()).map_err(super::ContainerError::from)?;
        if !unreaped.is_empty() {
            let reason = |(parent, child)| {
                format!("process {parent} has not yet waited for its child {child}, which ended")
            };
            return Ok(Err(unreaped.into_iter().map(reason).collect()));
        }
        self.clock.enter("last dirty pages");
        let dirty = self.container.last_round(stopped)?;
        let (layouts, dirty): (Vec<Process>, Vec<_>) = dirty.into_iter().unzip();
        let pids: Vec<_> = layouts.iter().map(|process| process.pid).collect();
        let dirty_pages = dirty.iter().map(|dirty| dirty.written.pages()).sum();
        let manifest =
            Manifest { round: self.round, last: false, processes: layouts, descriptions: Vec::new() };
        self.channel.send(&SourceMessage::Manifest(Box::new(manifest)))?;
        let memories: Vec<_> = pids
            .iter()
            .map(|&pid| pclive_sys::mem::ProcessMemory::open(self.host_pid(pid)))
            .collect::<Result<_, _>>()
            .map_err(|source| super::SendError::Read { pid: pids[0], source })?;
        let pages: Vec<ProcessPages<'_>> = pids
            .iter()
            .zip(dirty)
            .zip(&memories)
            .map(|((&pid, dirty), memory)| ProcessPages {
                pid,
                memory,
                written: dirty.written,
                absent: dirty.absent,
            })
            .collect();
        let round = self.round;
        let (sent, captured) = std::thread::scope(|scope| {
            let sender = &mut self.sender;
            let sending = scope.spawn(move || send_round(sender, round, &pages, None));
            self.clock.enter("capture state");
            let captured = capture(&mut self.links, &mut self.container, stopped);
            self.clock.enter("send last pages");
            (sending.join().expect("sending does not panic"), captured)
        });
        let sent = sent?;
        let (processes, files) = captured?;
        self.end_round(sent)?;
        self.note_round(sent, dirty_pages, start);
        if !files.transient.is_empty() {
            return Ok(Err(files.transient));
        }
        self.clock.enter("send state");
        self.send_last(processes, files).map(Ok)
    }

    fn host_pid(&self, pid: pclive_wire::NsPid) -> pclive_wire::HostPid {
        let process = self.container.processes().iter().find(|process| process.ns_pid == pid);
        process.expect("a layout of each process").pid
    }

    fn send_last(
        &mut self,
        processes: Vec<Process>,
        files: CapturedFiles,
    ) -> Result<SocketCapture, MigrateError> {
        let CapturedFiles { descriptions, tables, sockets, transient: _ } = files;
        let mut manifest = Manifest { round: self.round, last: true, processes, descriptions };
        for (process, (_, table)) in manifest.processes.iter_mut().zip(tables) {
            if let Some(state) = &mut process.state {
                state.fds = table;
            }
        }
        self.channel.send(&SourceMessage::Manifest(Box::new(manifest)))?;
        self.round = Round(self.round.0 + 1);
        self.clock.enter("wait for ready");
        self.expect(STEP, |message| match message {
            DestinationMessage::Ready => Ok(()),
            other => Err(other),
        })?;
        Ok(sockets)
    }

    /// Hands the container over. Before the commit a failure lets it run here; behind it, never.
    pub(super) fn hand_off(&mut self, frozen: Frozen) -> Result<Box<Handed>, MigrateError> {
        let Frozen { stopped, sockets, frozen_us } = frozen;
        self.clock.enter("commit");
        // From here on the container stays frozen even if pclive dies.
        let commit = self.cancellation.check().map_err(MigrateError::from).and_then(|()| {
            self.container.cgroup().freeze(FREEZER).map_err(|e| super::ContainerError::Cgroup(e).into())
        });
        if let Err(error) = commit {
            if let Err(also) = self.container.cgroup().thaw(FREEZER) {
                tracing::error!("the container cannot be thawed: {also}");
            }
            if let Err(also) = self.resume(stopped) {
                tracing::error!("the container cannot be let go: {also}");
            }
            return Err(self.abort(error));
        }
        self.channel.shield();
        let commit_sent_us = self.clock.now_us();
        self.channel.send(&SourceMessage::Commit).map_err(MigrateError::Unknown)?;
        self.clock.enter("wait for running");
        loop {
            match self.channel.recv(STEP).map_err(MigrateError::Unknown)? {
                DestinationMessage::Running(report) => {
                    let running_received_us = self.clock.now_us();
                    return Ok(Box::new(Handed {
                        stopped,
                        sockets,
                        frozen_us,
                        commit_sent_us,
                        running_received_us,
                        report,
                    }));
                }
                DestinationMessage::Failed(error) => return Err(MigrateError::FailedAfterCommit(error)),
                _ => {}
            }
        }
    }
}

/// Takes the links down and reads everything but pages.
fn capture(
    links: &mut crate::runtime::Links,
    container: &mut super::Container,
    stopped: &[StoppedProcess],
) -> Result<(Vec<Process>, CapturedFiles), MigrateError> {
    // The links go down as late as possible: while they are up, requests that were under way arrive and wait in the
    // sockets, which are read next; afterwards they are lost, and come again only after the client's timeout of 200 ms.
    let processes = container.capture(stopped)?;
    links.take_down()?;
    let mut obstacles = Obstacles::default();
    let files = capture_files(container.processes(), container.env(), Access::Frozen, &mut obstacles)?;
    match obstacles.is_empty() {
        true => Ok((processes, files)),
        false => Err(MigrateError::Obstacles(obstacles.into_sorted())),
    }
}
