//! Pre-copy: rounds while the container runs, until it is time to freeze.

use super::pages::Outgoing;
use super::{MigrateError, Migration, STEP};
use crate::capture::files::read_options_ahead;
use crate::engine::background::Background;
use crate::engine::fd_table::make_room;
use crate::engine::report::RoundReport;
use crate::handoff::SourceEvent;
use crate::policy::bandwidth::Bandwidth;
use crate::policy::convergence::{Decision, FreezeReason, Limits, decide, predicted_blackout};
use crate::policy::courtesy::loses_the_race;
use crate::policy::hot::HotPages;
use crate::policy::mode::rounds_held;
use crate::track::attach::Walk;
use pclive_wire::control::{DestinationMessage, RoundSummary, SourceMessage};
use pclive_wire::limits::MAX_BATCH_PAGES;
use pclive_wire::manifest::{Manifest, Process};
use pclive_wire::{NsPid, PAGE_SIZE, PageSet, Round};
use std::time::{Duration, Instant};

/// What a blackout costs beside sending pages, for the prediction: about what `cargo xtask bench` shows.
const FIXED_COST: Duration = Duration::from_millis(8);
/// When rounds take less than this they do not step back any more: others hardly notice them, but the longer they took, the
/// more would be written meanwhile, and the more rounds would follow.
const SHORT: Duration = Duration::from_secs(2);

impl Migration<'_> {
    /// Sends rounds until the policy says to freeze.
    pub(super) fn pre_copy(&mut self) -> Result<(), MigrateError> {
        let limits = Limits {
            max_blackout: self.options.max_blackout,
            max_rounds: self.options.max_rounds,
            held_rounds: rounds_held(self.options.mode.apply_mode(), self.options.restore_from),
            fixed_cost: FIXED_COST,
        };
        let mut bandwidth = Bandwidth::default();
        let (mut left, mut expected) = (Vec::new(), None);
        if self.options.mode.freezes_first() {
            return Ok(());
        }
        let mut nice = self.options.nice;
        self.look_at_sockets();
        loop {
            match decide(&left, &bandwidth, &limits) {
                Decision::Round => {}
                // There may be when nobody comes first.
                Decision::Freeze(FreezeReason::NoProgress) if nice > 0 => nice = 0,
                Decision::Freeze(_) => return Ok(()),
            }
            self.cancellation.check()?;
            let paced = self.sender.paced();
            let report = self.round(expected, nice)?;
            // The blackout will know no rate limit.
            let paced = self.sender.paced() - paced;
            bandwidth.observe(report.bytes, Duration::from_micros(report.duration_us).saturating_sub(paced));
            self.look_at_sockets();
            let pages = self.left_to_send()?;
            let bytes = pages * bytes_per_page(&report);
            expected = Some(pages);
            self.progress.round_over(&report, predicted_blackout(bytes, &bandwidth, &limits));
            left.push(bytes);
            let is_short = bandwidth.time_for(bytes).is_some_and(|time| time < SHORT);
            if is_short || loses_the_race(report.dirty_pages, pages) {
                nice = 0;
            }
        }
    }

    /// Learns of sockets what can be known ahead of the freeze.
    pub(super) fn look_at_sockets(&self) {
        read_options_ahead(self.container.processes(), &self.container.env().sockets);
    }

    /// How many pages would have to be sent if the container were frozen now.
    fn left_to_send(&self) -> Result<u64, MigrateError> {
        let written = self.container.written()?;
        let left = |(pid, written): (&NsPid, &PageSet)| match self.hot.get(pid) {
            Some(hot) => hot.held_back().union(written).pages(),
            None => written.pages(),
        };
        Ok(written.iter().map(left).sum())
    }

    /// One round of pages that were written since they were sent, without the hot ones; about `expected` of them.
    fn round(&mut self, expected: Option<u64>, nice: u8) -> Result<RoundReport, MigrateError> {
        let start = Instant::now();
        let (layouts, walks): (Vec<Process>, Vec<Walk>) = self.container.begin_round()?.into_iter().unzip();
        // Not before: processes stand still while they are attached to.
        let background = Background::enter(nice);
        let pids: Vec<NsPid> = layouts.iter().map(|layout| layout.pid).collect();
        let expected = expected.map_or_else(|| self.left_to_send(), Ok)?;
        self.progress.round(self.round, expected);
        self.begin_round(layouts, nice, false)?;
        self.hot.retain(|pid, _| pids.contains(pid));
        let mut dirty_pages = 0;
        let mut outgoing =
            Outgoing::new(&mut self.sender, &mut self.sent, self.round).in_background(background);
        for (pid, mut walk) in pids.into_iter().zip(walks) {
            let hot = self.hot.entry(pid).or_insert_with(|| HotPages::new(self.options.hot_rounds));
            let Some(memory) = self.container.memory(pid) else { continue };
            let container = &self.container;
            let mut next = || container.next_pages(pid, &mut walk, MAX_BATCH_PAGES as u64);
            while let Some(pages) = outgoing.urgently(&mut next)? {
                self.cancellation.check()?;
                let found = pages.pages();
                outgoing.pages(pid, &memory, &hot.split(pages))?;
                self.progress.sent(found);
                dirty_pages += found;
            }
            outgoing.pages(pid, &memory, &hot.end_round())?;
        }
        let waited = outgoing.waited();
        let sent = outgoing.end()?;
        self.end_round(sent)?;
        self.observe()?;
        Ok(self.note_round(sent, dirty_pages, start, waited))
    }

    /// Takes in what the eBPF programs have seen. What they lost costs nothing but detail: the dirty sets come from scans.
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

    /// Adds a round to the report.
    pub(super) fn note_round(
        &mut self,
        sent: RoundSummary,
        dirty_pages: u64,
        start: Instant,
        waited: Duration,
    ) -> RoundReport {
        let before: u64 = self.report.rounds.iter().map(|round| round.bytes).sum();
        let report = RoundReport {
            pages: sent.pages,
            patched_pages: sent.patched_pages,
            bytes: self.sender.stats().bytes - before,
            dirty_pages,
            duration_us: start.elapsed().as_micros() as u64,
            waited_us: waited.as_micros() as u64,
        };
        self.report.zero_pages += sent.zero_pages;
        self.report.rounds.push(report);
        report
    }

    /// Begins a round at the destination, which makes its skeleton equal to these processes.
    pub(super) fn begin_round(
        &mut self,
        layouts: Vec<Process>,
        nice: u8,
        keep_awake: bool,
    ) -> Result<(), MigrateError> {
        self.sent.reconciled(&layouts);
        make_room(&layouts);
        let round = self.round;
        self.send_manifest(Manifest {
            round,
            keep_awake,
            last: false,
            nice,
            processes: layouts,
            descriptions: Vec::new(),
        })
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

/// What a page cost in a round, patched or whole.
fn bytes_per_page(round: &RoundReport) -> u64 {
    round.bytes.checked_div(round.pages + round.patched_pages).unwrap_or(PAGE_SIZE)
}
