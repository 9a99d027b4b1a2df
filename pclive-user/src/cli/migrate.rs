//! `pclive migrate`: moves a container.

use super::progress::reporter;
use super::{RuntimeArgs, TrackerArg, chain, exit, require_insecure, write_report};
use crate::engine::background::Background;
use crate::engine::report::Report;
use crate::engine::source::{MigrateError, Options, migrate};
use crate::policy::mode::Mode;
use crate::runtime::{self, ContainerId};
use crate::track::programs::Watch;
use crate::transport::{Cancellation, ZeroCopy};
use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use pclive_wire::Round;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Move a running container to a host where `pclive serve` listens.
///
/// Exit code 0: it runs at the destination. 3: it cannot be moved, nothing was touched. 4: failed, it runs on here.
/// 5: the outcome is unknown, the copy here is frozen.
#[derive(Debug, clap::Args)]
pub struct MigrateArgs {
    /// The container, as the runtime names it.
    container: String,
    /// Address and port of the destination.
    #[arg(long, value_name = "ADDR:PORT")]
    to: SocketAddr,
    #[command(flatten)]
    runtime: RuntimeArgs,
    /// one-shot: freeze, then move everything; pclive: the destination applies complete rounds; pclive-g: pages as they
    /// arrive.
    #[arg(long, default_value_t = Mode::PcliveG, value_parser = mode_parser())]
    mode: Mode,
    /// Keep the pages of rounds before this one in the destination's memory, and apply them from this round on. The container
    /// is not frozen before that, unless --max-rounds says so.
    #[arg(long, value_name = "N", default_value_t = 0)]
    restore_from: u32,
    /// Freeze after this many rounds at the latest.
    #[arg(long, value_name = "N", default_value_t = 30)]
    max_rounds: u32,
    /// Freeze as soon as the predicted blackout is shorter than this, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 15)]
    max_blackout: u64,
    /// Send at most so many Mbit/s before the freeze. What is sent takes processors and network from the container and its
    /// clients; a slower migration takes less of them at a time.
    #[arg(long, value_name = "MBIT", value_parser = clap::value_parser!(u64).range(1..))]
    max_bandwidth: Option<u64>,
    /// Have the container and its neighbours come first while it still runs: pclive's nice value is so much higher in
    /// rounds that take seconds, at both hosts; with 19 it runs when nobody else wants to (SCHED_IDLE). It comes forward
    /// while it gets less than a sixteenth of a processor. With 0 a migration on busy processors takes less time, and more
    /// of theirs.
    #[arg(long, value_name = "N", default_value_t = 19, value_parser = clap::value_parser!(u8).range(..=19))]
    nice: u8,
    /// Hold back pages that were written in this many rounds in a row; 0 sends every dirty page in every round. Of use
    /// only with --whole-pages.
    #[arg(long, value_name = "N", default_value_t = 0)]
    hot_rounds: usize,
    /// Send every dirty page whole, also where only a part of it has changed.
    #[arg(long)]
    whole_pages: bool,
    /// Whether pages are sent with MSG_ZEROCOPY: auto leaves it when the first sends show that the kernel copies anyway.
    #[arg(long, value_enum, default_value_t)]
    zerocopy: ZeroCopy,
    /// How writes are tracked.
    #[arg(long, value_enum, default_value_t = TrackerArg::Auto)]
    tracker: TrackerArg,
    /// Allow a connection that is neither encrypted nor authenticated to an address that is not loopback.
    #[arg(long)]
    insecure: bool,
    /// Write the report to this file; `-` for standard output.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What the nice value is higher by, at most, while the eBPF programs are loaded.
const LOADING_NICE: u8 = 10;

/// Takes the names of the modes, and shows them in the help.
fn mode_parser() -> impl TypedValueParser<Value = Mode> {
    PossibleValuesParser::new(Mode::ALL.map(Mode::name)).try_map(|name| name.parse::<Mode>())
}

/// Moves the container and reports.
pub fn run(args: MigrateArgs) -> Result<ExitCode> {
    require_insecure(args.to, args.insecure)?;
    let runtime = runtime::open(&args.runtime.runtime, args.runtime.root.as_deref())?;
    let cancellation = Cancellation::new()?;
    cancellation.watch_signals()?;
    let options = options(&args)?;
    let tracker = {
        // It takes a while, and there is no hurry yet. Nobody looks whether it gets to run: so not as far back as others.
        let _background = Background::enter(args.nice.min(LOADING_NICE));
        args.tracker.load(Watch::Writes)?
    };
    let mut report = Report::default();
    let result =
        migrate(&options, tracker, runtime.as_ref(), &cancellation, reporter().as_mut(), &mut report);
    let code = conclude(&result, &mut report);
    if let Some(path) = &args.json {
        write_report(path, &report)?;
    }
    Ok(code)
}

fn options(args: &MigrateArgs) -> Result<Options> {
    Ok(Options {
        container: ContainerId::new(&args.container)?,
        to: args.to,
        mode: args.mode,
        restore_from: Round(args.restore_from),
        max_rounds: args.max_rounds,
        max_blackout: Duration::from_millis(args.max_blackout),
        max_bandwidth: args.max_bandwidth.map(|megabits| megabits.saturating_mul(1_000_000 / 8)),
        nice: args.nice,
        hot_rounds: args.hot_rounds,
        patch_pages: !args.whole_pages,
        zero_copy: args.zerocopy,
    })
}

/// Says how it ended, to the operator and in the report.
fn conclude(result: &Result<(), MigrateError>, report: &mut Report) -> ExitCode {
    let Err(error) = result else {
        let ms = |us: u64| us as f64 / 1000.0;
        println!(
            "{} runs at the destination: blackout {:.1} ms, of which restore {:.1} ms; total {:.2} s",
            report.container,
            ms(report.blackout_us),
            ms(report.restore_us),
            report.total_us as f64 / 1e6
        );
        return ExitCode::SUCCESS;
    };
    let text = chain(error);
    report.error = Some(text.clone());
    let (result, code) = match error {
        MigrateError::Obstacles(_) => ("failed", exit::OBSTACLES),
        MigrateError::Unknown(_) => ("unknown", exit::UNKNOWN),
        MigrateError::Remains(_) => ("running", 0),
        _ => ("failed", exit::FAILED),
    };
    report.result = result.into();
    eprintln!("pclive: {text}");
    if let MigrateError::Obstacles(obstacles) = error {
        for obstacle in obstacles {
            eprintln!(
                "  process {}: {}: {} ({})",
                obstacle.pid, obstacle.object, obstacle.reason, obstacle.remedy
            );
        }
    }
    if code == exit::FAILED {
        eprintln!("pclive: {} runs on here", report.container);
    }
    ExitCode::from(code)
}
