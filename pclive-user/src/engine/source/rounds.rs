//! Pre-copy: rounds while the container runs, until it is time to freeze.

use super::pages::{ProcessPages, send_round};
use super::{MigrateError, Migration, STEP};
use crate::engine::report::RoundReport;
use crate::handoff::SourceEvent;
use crate::policy::bandwidth::Bandwidth;
use crate::policy::convergence::{Decision, Limits, decide, predicted_blackout};
use crate::track::attach::Dirty;
use pclive_wire::control::{DestinationMessage, RoundSummary, SourceMessage};
use pclive_wire::manifest::{Manifest, Process};
use pclive_wire::{PAGE_SIZE, Round};
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
            self.observe()?;
            bandwidth.observe(report.bytes, Duration::from_micros(report.duration_us));
            let pages = self.container.count_written()?;
            self.progress.round_over(&report, predicted_blackout(pages, &bandwidth, &limits));
            left.push(pages);
        }
        Ok(())
    }

    /// Takes in what the eBPF programs have seen since the last round. What they lost costs nothing but detail: the dirty
    /// sets come from scans.
    fn observe(&mut self) -> Result<(), MigrateError> {
        let Some(observer) = &mut self.observer else { return Ok(()) };
        let drained = observer.drain()?;
        self.heat.absorb(&drained);
        self.report.observed.writes += drained.writes.len() as u64;
        self.report.observed.changes += drained.changes.len() as u64;
        self.report.observed.lost += drained.lost.writes + drained.lost.changes;
        self.report.observed.working_set_pages = self.heat.working_set(Duration::ZERO);
        Ok(())
    }

    /// One round of pages that were written since the last one.
    fn round(&mut self) -> Result<RoundReport, MigrateError> {
        let start = Instant::now();
        let processes = self.container.begin_round()?;
        let dirty_pages = processes.iter().map(|(_, written)| written.pages()).sum();
        self.progress.round(self.round, dirty_pages);
        let processes = processes.into_iter().map(|(layout, written)| {
            let dirty = Dirty { written, ..Dirty::default() };
            (layout, dirty)
        });
        let pages = self.send_layouts(processes.collect())?;
        let sent = send_round(&mut self.sender, self.round, &pages, Some(self.cancellation))?;
        self.end_round(sent)?;
        Ok(self.note_round(sent, dirty_pages, start))
    }

    /// Adds a round to the report.
    pub(super) fn note_round(&mut self, sent: RoundSummary, dirty_pages: u64, start: Instant) -> RoundReport {
        let bytes = sent.pages * PAGE_SIZE;
        let duration_us = start.elapsed().as_micros() as u64;
        let report = RoundReport { pages: sent.pages, bytes, dirty_pages, duration_us };
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
