//! What happened over time in a run, in seconds since the start of its migration.

use pclive_tests::load::LoadReport;

use super::results::Run;
use super::usage::{Sample, Use};
use crate::experiment::migration_span_us;

/// Points in time with their values.
pub type Curve = Vec<(f64, f64)>;

/// The width of an interval of the load's report.
const INTERVAL_US: u64 = 10_000;
/// How many intervals make a point: a curve of single ones is mostly noise.
const INTERVALS: usize = 5;
/// Over how many samples CPU use is averaged: CPU time is counted in steps of 10 ms.
const SAMPLES: usize = 5;
const MIB: f64 = (1 << 20) as f64;

/// Answers in thousands per second.
pub fn throughput(run: &Run) -> Vec<Curve> {
    if run.load.reads + run.load.writes == 0 {
        return vec![Vec::new()];
    }
    // The last interval ends before its time: the load ends in it.
    let whole = run.load.throughput_10ms.len().saturating_sub(1);
    let seconds = (INTERVALS as u64 * INTERVAL_US) as f64 / 1e6;
    let points =
        run.load.throughput_10ms[..whole].chunks_exact(INTERVALS).enumerate().map(|(number, answers)| {
            let at_us = (number * INTERVALS + INTERVALS / 2) as u64 * INTERVAL_US;
            (since_start_s(&run.load, at_us), f64::from(answers.iter().sum::<u32>()) / seconds / 1e3)
        });
    vec![points.collect()]
}

/// CPU use in percent of one CPU: mover and container at the source, mover and container at the destination.
pub fn cpu(run: &Run) -> Vec<Curve> {
    uses(run, |samples| {
        let (first, last) = (samples.first()?, samples.last()?);
        let used_us = last.1.cpu_us.saturating_sub(first.1.cpu_us);
        Some(100.0 * used_us as f64 / last.0.saturating_sub(first.0).max(1) as f64)
    })
}

/// Resident memory in MiB, in the same order.
pub fn memory(run: &Run) -> Vec<Curve> {
    uses(run, |samples| samples.get(SAMPLES / 2).map(|(_, used)| used.rss_bytes as f64 / MIB))
}

/// How long the migration took, or tracking without one.
pub fn migration_s(run: &Run) -> f64 {
    let (start_us, end_us) = migration_span_us(&run.load);
    let is_control = run.movement.is_none() && run.tracking.is_none();
    if is_control { 0.0 } else { end_us.saturating_sub(start_us) as f64 / 1e6 }
}

/// When the container ran nowhere, as its mover says.
pub fn blackout_s(run: &Run) -> Option<(f64, f64)> {
    let start_s = since_start_s(&run.load, run.frozen_us()?);
    Some((start_s, start_s + run.movement.as_ref()?.blackout_us as f64 / 1e6))
}

/// A curve for each of the four kinds of processes, with a value made of a few samples each.
fn uses(run: &Run, of: fn(&[(u64, Use)]) -> Option<f64>) -> Vec<Curve> {
    let kinds: [fn(&Sample) -> Use; 4] = [
        |sample| sample.source.mover,
        |sample| sample.source.container,
        |sample| sample.destination.mover,
        |sample| sample.destination.container,
    ];
    let curve = |kind: fn(&Sample) -> Use| {
        let used: Vec<_> = run.usage.iter().map(|sample| (sample.at_us, kind(sample))).collect();
        let points = used.windows(SAMPLES).filter_map(|window| {
            let at_us = window[SAMPLES / 2].0.saturating_sub(run.load.started_us);
            Some((since_start_s(&run.load, at_us), of(window)?))
        });
        points.collect()
    };
    kinds.map(curve).to_vec()
}

/// A time of the load's report.
fn since_start_s(load: &LoadReport, at_us: u64) -> f64 {
    (at_us as f64 - migration_span_us(load).0 as f64) / 1e6
}
