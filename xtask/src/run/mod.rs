//! `cargo xtask run`: the main job, from an empty machine to a report.

mod plot;
mod timeline;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use pclive_tests::lab::BitRate;
use pclive_tests::load::{Gap, LoadSpec, Service};
use pclive_tests::scene::Network;

use crate::build::release_programs;
use crate::experiment::{
    Experiment, Measurement, blackout_start_us, container_mib, gap, migration_span_us, rate_before,
    rate_during,
};
use crate::interrupt::remove_labs_on_interrupt;
use crate::setup::prepare;

#[derive(Args)]
pub struct Options {
    /// Data set in MiB
    #[arg(long, default_value_t = 1024)]
    size: u64,
    /// The part of the data set in MiB that the load reads and writes [default: all]
    #[arg(long)]
    hot: Option<u64>,
    /// Reads among 100 requests
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u8).range(0..=100))]
    read_percent: u8,
    /// Client connections
    #[arg(long, default_value_t = 16)]
    connections: usize,
    /// Move memcached instead of Redis
    #[arg(long)]
    memcached: bool,
    /// Rate of the hosts' links in Mbit/s, 0 for as fast as the machine can
    #[arg(long, default_value_t = 1000)]
    rate: u64,
    /// Let clients and migration share the hosts' links, instead of giving the migration one of its own
    #[arg(long)]
    shared: bool,
    /// Mean size of values in bytes; they are between 0.4 and 1.6 times as large
    #[arg(long, default_value_t = 2560)]
    value_bytes: usize,
    /// How to migrate: one-shot, pclive or pclive-g
    #[arg(long, default_value = "pclive-g")]
    mode: String,
    /// A directory with the programs `pclive` and `load`, instead of building them
    #[arg(long)]
    programs: Option<PathBuf>,
    /// Further options of `pclive migrate`
    #[arg(last = true)]
    migrate: Vec<String>,
}

/// Moves the container and prints the report.
///
/// # Errors
/// When it did not move, or a client got a wrong answer.
pub fn run(options: &Options) -> Result<()> {
    prepare()?;
    remove_labs_on_interrupt()?;
    let programs = release_programs(options.programs.as_deref())?;
    let experiment = options.experiment();
    println!("moving {} MiB at {} ...", options.size, options.rate_name());
    let measurement = experiment.carry_out(&programs)?;
    print_report(&measurement);
    let complaint = measurement.load.complaint();
    ensure!(complaint.is_none(), "clients were harmed: {}", complaint.unwrap_or_default());
    Ok(())
}

impl Options {
    fn experiment(&self) -> Experiment {
        let service = if self.memcached { Service::Memcached } else { Service::Redis };
        let data_bytes = self.size << 20;
        let load = LoadSpec {
            read_percent: self.read_percent,
            connections: self.connections,
            value_bytes: self.value_bytes * 2 / 5..=self.value_bytes * 8 / 5,
            hot_bytes: self.hot.map_or(data_bytes, |hot| hot << 20),
            ..LoadSpec::new(service, data_bytes)
        };
        let rate = (self.rate > 0).then_some(BitRate(self.rate * 1_000_000));
        let mut options = vec!["--mode".to_owned(), self.mode.clone()];
        options.extend(self.migrate.iter().cloned());
        let network = if self.shared { Network::Shared(rate) } else { Network::Separate(rate) };
        // Every mode but pclive-g has pages wait at the destination, beside the container's own memory.
        let copies = if self.mode == "pclive-g" { 1 } else { 2 };
        Experiment { load, network, options, destination_bytes: copies * (container_mib(self.size) << 20) }
    }

    fn rate_name(&self) -> String {
        if self.rate == 0 { "full speed".into() } else { format!("{} Mbit/s", self.rate) }
    }
}

fn print_report(measurement: &Measurement) {
    let Measurement { migration, load } = measurement;
    let result = migration.result.as_str().map_or_else(|| migration.result.to_string(), str::to_owned);
    println!("\n{} with tracker {}: {result}", migration.mode, migration.tracker);
    println!("\nround     pages       MiB     dirty        ms");
    for (number, round) in migration.rounds.iter().enumerate() {
        let (mib, ms) = (round.bytes as f64 / f64::from(1 << 20), round.duration_us as f64 / 1e3);
        println!("{number:>5} {:>9} {mib:>9.1} {:>9} {ms:>9.1}", round.pages, round.dirty_pages);
    }
    println!("\nblackout {:.1} ms", migration.blackout_us as f64 / 1e3);
    print!("{}", timeline::draw(&migration.blackout_phases()));
    println!("\nanswers per second, each column 0.1 s (^ from start to end of the migration)");
    print!("{}", plot::draw(&load.throughput_10ms, migration_span_us(load)));
    let blackout_us = blackout_start_us(load, migration.frozen_us(), migration.total_us);
    let (before, during) = (rate_before(load), rate_during(load, blackout_us));
    let migrate_us = migration_span_us(load).0;
    let at = |gap: Gap| {
        let since = (gap.start_us as f64 - migrate_us as f64) / 1e6;
        format!("{:.1} ms, {since:.2} s after the start of the migration", gap.duration_us as f64 / 1e3)
    };
    println!();
    for (name, value) in [
        ("longest gap without an answer", at(gap(load))),
        ("longest gap of one connection", at(load.worst_connection_gap)),
        ("restore", format!("{:.1} ms", migration.restore_us as f64 / 1e3)),
        ("whole migration", format!("{:.2} s", migration.total_us as f64 / 1e6)),
        ("sent", format!("{:.1} MiB", migration.bytes_sent as f64 / f64::from(1 << 20))),
        (
            "answers per second before, during",
            format!("{before:.0}, {during:.0} ({:.0} %)", 100.0 * during / before),
        ),
        ("latency 50 %, 99 %, 99.9 %, worst", {
            let latency = load.latency;
            let ms =
                [latency.p50_us, latency.p99_us, latency.p999_us, latency.max_us].map(|us| us as f64 / 1e3);
            format!("{:.2}, {:.2}, {:.2}, {:.2} ms", ms[0], ms[1], ms[2], ms[3])
        }),
        ("pclive's memory at the destination", {
            format!("{:.1} MiB", migration.destination_peak_rss_bytes as f64 / f64::from(1 << 20))
        }),
        ("answers, keys read back", format!("{}, {}", load.reads + load.writes, load.verified_keys)),
        ("wrong answers", load.wrong_answers.to_string()),
        ("broken connections", load.broken_connections.len().to_string()),
    ] {
        println!("{name:<36} {value}");
    }
}
