//! Pre-copy: rounds while the container runs, until it is time to freeze.

use super::pages::{ProcessPages, send_round};
use super::{MigrateError, Migration, STEP};
use crate::engine::report::RoundReport;
use crate::handoff::SourceEvent;
use crate::policy::bandwidth::Bandwidth;
use crate::policy::convergence::{Decision, Limits, decide, predicted_blackout};
use crate::policy::hot::{self, HotPages};
use crate::track::attach::Dirty;
use crate::track::observer;
use pclive_wire::control::{DestinationMessage, RoundSummary, SourceMessage};
use pclive_wire::manifest::{Manifest, Process};
use pclive_wire::{NsPid, PAGE_SIZE, PageRange, PageSet, Round};
use std::time::{Duration, Instant};

/// What a blackout costs beside sending pages, for the prediction: about what `cargo xtask bench` shows.
const FIXED_COST: Duration = Duration::from_millis(15);

impl Migration<'_> {
    /// Sends rounds until the policy says to freeze.
    pub(super) fn pre_copy(&mut self) -> Result<(), MigrateError> {
        let limits = Limits {
            max_blackout: self.options.max_blackout,
            max_rounds: self.options.max_rounds,
            fixed_cost: FIXED_COST,
        };
        let mut bandwidth = Bandwidth::default();
        let mut left = Vec::new();
        if self.options.mode.freezes_first() {
            return Ok(());
        }
        while decide(&left, &bandwidth, &limits) == Decision::Round {
            self.cancellation.check()?;
            let report = self.round()?;
            bandwidth.observe(report.bytes, Duration::from_micros(report.duration_us));
            let bytes = self.left_to_send(&report)?;
            self.progress.round_over(&report, predicted_blackout(bytes, &bandwidth, &limits));
            left.push(bytes);
        }
        Ok(())
    }

    /// About how many bytes would have to be sent if the container were frozen now: a page costs what one cost in the
    /// round before.
    fn left_to_send(&self, before: &RoundReport) -> Result<u64, MigrateError> {
        let written = self.container.written()?;
        let left = |(pid, written): (&NsPid, &PageSet)| match self.hot.get(pid) {
            Some(hot) => hot.held_back().union(written).pages(),
            None => written.pages(),
        };
        let pages: u64 = written.iter().map(left).sum();
        let pages_before = before.pages + before.patched_pages;
        Ok(if pages_before == 0 { pages * PAGE_SIZE } else { pages * before.bytes / pages_before })
    }

    /// One round of pages that were written since the last one, without the hot ones.
    fn round(&mut self) -> Result<RoundReport, MigrateError> {
        let start = Instant::now();
        let begun = observer::now()?;
        let processes = self.container.begin_round()?;
        let dirty_pages = processes.iter().map(|(_, written)| written.pages()).sum();
        self.progress.round(self.round, dirty_pages);
        let processes = self.hold_back_hot(processes);
        let pages = self.send_layouts(processes)?;
        let Self { sender, progress, cancellation, round, sent, .. } = self;
        let sent = send_round(sender, *round, &pages, sent, |sent| {
            progress.sent(sent);
            Ok(cancellation.check()?)
        })?;
        self.end_round(sent)?;
        self.observe(begun, start.elapsed())?;
        Ok(self.note_round(sent, dirty_pages, start))
    }

    /// Leaves out the hot pages of a round.
    fn hold_back_hot(&mut self, processes: Vec<(Process, PageSet)>) -> Vec<(Process, Dirty)> {
        let mut soon = std::mem::take(&mut self.written_soon);
        let mut before = std::mem::take(&mut self.hot);
        let mut split = |(layout, written): (Process, PageSet)| {
            let pid = layout.pid;
            let mut hot = before.remove(&pid).unwrap_or_else(|| HotPages::new(self.options.hot_rounds));
            let written = hot.next_round(written, &soon.remove(&pid).unwrap_or_default());
            self.hot.insert(pid, hot);
            (layout, Dirty { written, ..Dirty::default() })
        };
        processes.into_iter().map(&mut split).collect()
    }

    /// Takes in what the eBPF programs have seen in the round that began at `begun` and took `duration`. What they lost
    /// costs nothing but detail: the dirty sets come from scans.
    fn observe(&mut self, begun: Duration, duration: Duration) -> Result<(), MigrateError> {
        let Some(observer) = &mut self.observer else { return Ok(()) };
        let drained = observer.drain()?;
        self.heat.absorb(&drained);
        let soon = begun..begun + hot::soon(duration);
        for process in self.container.processes() {
            let writes = drained.writes.iter().filter(|write| write.pid == process.pid);
            let pages =
                writes.filter(|write| soon.contains(&write.time)).map(|write| PageRange::new(write.page, 1));
            self.written_soon.insert(process.ns_pid, pages.collect());
        }
        self.report.observed.writes += drained.writes.len() as u64;
        self.report.observed.changes += drained.changes.len() as u64;
        self.report.observed.lost += drained.lost.writes + drained.lost.changes;
        self.report.observed.working_set_pages = self.heat.working_set(Duration::ZERO);
        Ok(())
    }

    /// Adds a round to the report.
    pub(super) fn note_round(&mut self, sent: RoundSummary, dirty_pages: u64, start: Instant) -> RoundReport {
        let before: u64 = self.report.rounds.iter().map(|round| round.bytes).sum();
        let report = RoundReport {
            pages: sent.pages,
            patched_pages: sent.patched_pages,
            bytes: self.sender.stats().bytes - before,
            dirty_pages,
            duration_us: start.elapsed().as_micros() as u64,
        };
        self.report.zero_pages += sent.zero_pages;
        self.report.rounds.push(report);
        report
    }

    /// Begins a round at the destination; returns its pages.
    pub(super) fn send_layouts(
        &mut self,
        processes: Vec<(Process, Dirty)>,
    ) -> Result<Vec<ProcessPages>, MigrateError> {
        let (layouts, dirty): (Vec<Process>, Vec<Dirty>) = processes.into_iter().unzip();
        let pids = layouts.iter().map(|layout| layout.pid);
        let pages = self.container.pages(pids.zip(dirty));
        if let Some(sent) = &mut self.sent {
            sent.reconciled(&layouts);
        }
        let manifest =
            Manifest { round: self.round, last: false, processes: layouts, descriptions: Vec::new() };
        self.send_manifest(manifest)?;
        Ok(pages)
    }

    /// Sends what the container looks like now.
    pub(super) fn send_manifest(&mut self, manifest: Manifest) -> Result<(), MigrateError> {
        let event = SourceEvent::ManifestSent { round: manifest.round, last: manifest.last };
        self.channel.send(&SourceMessage::Manifest(Box::new(manifest)))?;
        self.note(event)
    }

    /// Ends the round, and waits until the destination has applied it.
    pub(super) fn end_round(&mut self, sent: RoundSummary) -> Result<(), MigrateError> {
        self.channel.send(&SourceMessage::RoundEnd(sent))?;
        self.note(SourceEvent::RoundSent(sent.round))?;
        self.expect(STEP, |message| match message {
            DestinationMessage::RoundApplied(applied) if applied.round == sent.round => Ok(()),
            other => Err(other),
        })?;
        self.round = Round(self.round.0 + 1);
        Ok(())
    }
}
