//! `cargo xtask bench`: the figures that pclive is judged by, each measured several times.

mod statistics;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use pclive_tests::Programs;
use pclive_tests::lab::BitRate;
use pclive_tests::load::{LoadSpec, Service};
use pclive_tests::scene::Network;
use serde::Serialize;
use statistics::Summary;

use crate::build::{need_root, release_programs};
use crate::experiment::{Experiment, Measurement, warm_up_memory};
use crate::interrupt::remove_labs_on_interrupt;

const MIB: u64 = 1 << 20;

#[derive(Args)]
pub struct Options {
    /// How often each case is measured
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Only the cases whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// A directory with the programs `pclive` and `load`, instead of building them
    #[arg(long)]
    programs: Option<PathBuf>,
    /// Where the figures and all measurements go as JSON
    #[arg(long, default_value = "target/bench.json")]
    json: PathBuf,
}

/// What is migrated under which load.
struct Case {
    name: &'static str,
    mode: &'static str,
    data_bytes: u64,
    hot_bytes: u64,
    read_percent: u8,
}

const CASES: [Case; 6] = [
    Case::new("90 % reads", "pclive-g", 1024, 1024, 90),
    Case::new("10 % reads, 10 MB hot", "pclive-g", 1024, 10, 10),
    Case::new("128 MiB, 90 % reads", "pclive-g", 128, 128, 90),
    Case::new("90 % reads, pclive", "pclive", 1024, 1024, 90),
    Case::new("10 % reads, 10 MB hot, pclive", "pclive", 1024, 10, 10),
    Case::new("90 % reads, one-shot", "one-shot", 1024, 1024, 90),
];

impl Case {
    const fn new(
        name: &'static str,
        mode: &'static str,
        data_mib: u64,
        hot_mib: u64,
        read_percent: u8,
    ) -> Self {
        Self { name, mode, data_bytes: data_mib * MIB, hot_bytes: hot_mib * MIB, read_percent }
    }

    fn experiment(&self) -> Experiment {
        let load = LoadSpec {
            hot_bytes: self.hot_bytes,
            read_percent: self.read_percent,
            ..LoadSpec::new(Service::Redis, self.data_bytes)
        };
        let options = vec!["--mode".into(), self.mode.into()];
        Experiment { load, network: Network::Shared(Some(BitRate::GIGABIT)), options }
    }
}

/// A figure of one measurement.
struct Figure {
    name: &'static str,
    of: fn(&Measurement) -> f64,
}

const FIGURES: [Figure; 9] = [
    Figure { name: "longest gap ms", of: |seen| seen.gap().duration_us as f64 / 1e3 },
    Figure { name: "blackout ms", of: |seen| seen.migration.blackout_us as f64 / 1e3 },
    Figure { name: "restore ms", of: |seen| seen.migration.restore_us as f64 / 1e3 },
    Figure { name: "total s", of: |seen| seen.migration.total_us as f64 / 1e6 },
    Figure { name: "rounds", of: |seen| seen.migration.rounds.len() as f64 },
    Figure { name: "sent MiB", of: |seen| seen.migration.bytes_sent as f64 / MIB as f64 },
    Figure { name: "throughput %", of: |seen| 100.0 * seen.rate_during() / seen.rate_before() },
    Figure {
        name: "destination MiB",
        of: |seen| seen.migration.destination_peak_rss_bytes as f64 / MIB as f64,
    },
    Figure {
        name: "harmed",
        of: |seen| {
            (seen.load.wrong_answers + seen.load.unanswered) as f64
                + seen.load.broken_connections.len() as f64
        },
    },
];

#[derive(Serialize)]
struct CaseReport {
    case: &'static str,
    mode: &'static str,
    figures: Vec<Summary>,
    measurements: Vec<Measurement>,
    /// Migrations that did not move the container, with what was said.
    failures: Vec<String>,
}

/// Measures, prints the table and writes the JSON.
///
/// # Errors
/// When nothing can be measured at all. A migration that fails is part of the report.
pub fn bench(options: &Options) -> Result<()> {
    need_root()?;
    remove_labs_on_interrupt()?;
    let programs = release_programs(options.programs.as_deref())?;
    println!("touching memory first: what a virtual machine has never used is slow at its first use");
    warm_up_memory(5 << 30);
    if let Some(dir) = options.json.parent() {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let wanted = |case: &&Case| options.only.as_ref().is_none_or(|part| case.name.contains(part.as_str()));
    let mut reports = Vec::new();
    for case in CASES.iter().filter(wanted) {
        let report = measure(case, options.repeat, &programs);
        print_case(&report);
        reports.push(report);
        // Written after each case: an interrupted benchmark keeps what it has.
        let json = serde_json::to_vec_pretty(&reports)?;
        fs::write(&options.json, json).with_context(|| format!("write {}", options.json.display()))?;
    }
    println!("\nall measurements: {}", options.json.display());
    Ok(())
}

fn measure(case: &Case, repeat: usize, programs: &Programs) -> CaseReport {
    let (mut measurements, mut failures) = (Vec::new(), Vec::new());
    for number in 1..=repeat {
        eprintln!("{}: {number} of {repeat}", case.name);
        match case.experiment().carry_out(programs) {
            Ok(measurement) => measurements.push(measurement),
            Err(error) => failures.push(format!("{error:#}")),
        }
    }
    let figures = FIGURES.iter().map(|figure| Summary::of(figure.name, measurements.iter().map(figure.of)));
    CaseReport { case: case.name, mode: case.mode, figures: figures.collect(), measurements, failures }
}

fn print_case(report: &CaseReport) {
    println!(
        "\n{} ({}), {} measurements: median (range)",
        report.case,
        report.mode,
        report.measurements.len()
    );
    for Summary { name, median, lowest, highest } in &report.figures {
        println!("  {name:<18} {median:>10.1}  ({lowest:.1} to {highest:.1})");
    }
    for failure in &report.failures {
        println!("  FAILED: {failure}");
    }
}
