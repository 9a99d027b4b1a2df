//! Pre-copy: rounds while the container runs, until it is time to freeze.

use super::pages::{ProcessPages, send_round};
use super::{MigrateError, Migration, STEP};
use crate::engine::report::RoundReport;
use crate::track::pageset::PageSet;
use pclive_wire::control::{DestinationMessage, RoundSummary, SourceMessage};
use pclive_wire::manifest::{Manifest, Process};
use pclive_wire::{PAGE_SIZE, Round};
use std::time::{Duration, Instant};

impl Migration<'_> {
    /// Sends rounds until the policy says to freeze.
    pub(super) fn pre_copy(&mut self) -> Result<(), MigrateError> {
        let mut before: Option<u64> = None;
        while self.round.0 < self.options.max_rounds {
            self.cancellation.check()?;
            let start = Instant::now();
            let round = self.round;
            let processes = self.container.begin_round()?;
            let dirty: u64 = processes.iter().map(|(_, written)| written.pages()).sum();
            self.progress.round(round, dirty);
            let (layouts, written): (Vec<Process>, Vec<PageSet>) = processes.into_iter().unzip();
            let sent = self.send_round(layouts, written)?;
            let applied = self.end_round(sent)?;
            let report = RoundReport {
                pages: sent.pages,
                bytes: sent.pages * PAGE_SIZE,
                dirty_pages: dirty,
                duration_us: start.elapsed().as_micros() as u64,
            };
            let _ = applied;
            self.report.rounds.push(report);
            self.report.zero_pages += sent.zero_pages;
            let predicted = self.predict(&report);
            self.progress.round_over(&report, predicted);
            if predicted.is_some_and(|predicted| predicted <= self.options.max_blackout)
                || before.is_some_and(|before| dirty * 10 >= before * 9)
            {
                break;
            }
            before = Some(dirty);
        }
        Ok(())
    }

    fn predict(&self, last: &RoundReport) -> Option<Duration> {
        let time = Duration::from_micros(last.duration_us);
        (self.round.0 > 1).then_some(time)
    }

    fn send_round(
        &mut self,
        layouts: Vec<Process>,
        written: Vec<PageSet>,
    ) -> Result<RoundSummary, MigrateError> {
        let pids: Vec<_> = layouts.iter().map(|process| process.pid).collect();
        let manifest =
            Manifest { round: self.round, last: false, processes: layouts, descriptions: Vec::new() };
        self.channel.send(&SourceMessage::Manifest(Box::new(manifest)))?;
        let pages: Vec<ProcessPages<'_>> = pids
            .into_iter()
            .zip(written)
            .filter_map(|(pid, written)| {
                let memory = self.container.tracked(pid)?.memory();
                Some(ProcessPages { pid, memory, written, absent: PageSet::new() })
            })
            .collect();
        Ok(send_round(&mut self.sender, self.round, &pages, Some(self.cancellation))?)
    }

    /// Ends the round, and waits until the destination has applied it.
    pub(super) fn end_round(&mut self, sent: RoundSummary) -> Result<(), MigrateError> {
        self.channel.send(&SourceMessage::RoundEnd(sent))?;
        self.expect(STEP, |message| match message {
            DestinationMessage::RoundApplied(applied) if applied.round == sent.round => Ok(()),
            other => Err(other),
        })?;
        self.round = Round(self.round.0 + 1);
        Ok(())
    }
}
