//! Progress of a migration: a bar on a terminal, lines elsewhere.

use crate::engine::report::RoundReport;
use crate::engine::source::Progress;
use indicatif::{ProgressBar, ProgressStyle};
use pclive_wire::{PAGE_SIZE, Round};
use std::io::IsTerminal;
use std::time::Duration;

/// The reporter that suits standard error.
pub fn reporter() -> Box<dyn Progress> {
    match std::io::stderr().is_terminal() {
        true => Box::new(Bar(ProgressBar::no_length().with_style(style()))),
        false => Box::new(Lines { round: 0 }),
    }
}

fn style() -> ProgressStyle {
    let template = "{prefix} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {msg}";
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn describe(report: &RoundReport, predicted: Option<Duration>) -> String {
    let seconds = (report.duration_us as f64 / 1e6).max(1e-6);
    let rate = report.bytes as f64 / 1e6 / seconds;
    let mut text = format!("{} pages, {rate:.0} MB/s, {:.2} s", report.pages, seconds);
    if let Some(predicted) = predicted {
        text += &format!(", predicted blackout {:.1} ms", predicted.as_secs_f64() * 1e3);
    }
    text
}

struct Bar(ProgressBar);

impl Progress for Bar {
    fn round(&mut self, round: Round, dirty_pages: u64) {
        self.0.set_prefix(format!("round {round}"));
        self.0.set_length(dirty_pages * PAGE_SIZE);
        self.0.set_position(0);
    }

    fn sent(&mut self, pages: u64) {
        self.0.inc(pages * PAGE_SIZE);
    }

    fn round_over(&mut self, report: &RoundReport, predicted: Option<Duration>) {
        self.0.set_message(describe(report, predicted));
    }

    fn freezing(&mut self) {
        self.0.finish_and_clear();
    }
}

struct Lines {
    round: u32,
}

impl Progress for Lines {
    fn round(&mut self, round: Round, dirty_pages: u64) {
        self.round = round.0;
        eprintln!("round {round}: {dirty_pages} dirty pages");
    }

    fn sent(&mut self, _pages: u64) {}

    fn round_over(&mut self, report: &RoundReport, predicted: Option<Duration>) {
        eprintln!("round {}: sent {}", self.round, describe(report, predicted));
    }

    fn freezing(&mut self) {
        eprintln!("freezing");
    }
}
