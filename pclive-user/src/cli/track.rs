//! `pclive track`: follows the dirty set of a running container without moving it.

mod audit;
mod report;
mod session;

use super::{RuntimeArgs, TrackerArg, write_report};
use crate::{
    runtime::{self, ContainerId},
    track::programs::Watch,
    transport::Cancellation,
};
use anyhow::{Context, Result, ensure};
use report::{IntervalReport, TrackReport};
use session::Session;
use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

/// Follow the dirty set of a running container without moving it.
///
/// Every interval: pages and bytes dirtied by each process. At the end: working-set estimate and hottest ranges.
#[derive(Debug, clap::Args)]
pub struct TrackArgs {
    /// The container, as the runtime names it.
    container: String,
    #[command(flatten)]
    runtime: RuntimeArgs,
    /// How long to follow it.
    #[arg(long, value_name = "N", default_value_t = 10)]
    seconds: u64,
    /// Length of an interval in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    interval: u64,
    /// How writes are tracked.
    #[arg(long, value_enum, default_value_t = TrackerArg::Auto)]
    tracker: TrackerArg,
    /// Freeze the container at the end of each interval, and compare what eBPF saw with PAGEMAP_SCAN.
    #[arg(long)]
    audit: bool,
    /// Write the report to this file; `-` for standard output.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Follows the container and reports.
pub fn run(args: TrackArgs) -> Result<ExitCode> {
    let runtime = runtime::open(&args.runtime.runtime, args.runtime.root.as_deref())?;
    let state = runtime.state(&ContainerId::new(&args.container)?)?;
    let init = state.init.with_context(|| format!("container {} is {}", state.id, state.status))?;
    let tracker = args.tracker.load(Watch::Everything)?;
    let tier = tracker.tier();
    ensure!(
        !args.audit || tier.fault_source().is_some(),
        "--audit compares with eBPF, which tier {tier} does not use"
    );

    // Without this, Ctrl-C could leave an audited container frozen.
    let cancellation = Cancellation::new()?;
    cancellation.watch_signals()?;
    let interval = Duration::from_millis(args.interval);
    let mut session = Session::start(init, tracker, args.audit)?;
    let mut report = TrackReport::new(args.container, tier, interval, session.attach_stop());
    // With `--json -` standard output is the report's alone.
    let mut out: Box<dyn Write> = match &args.json {
        Some(path) if path.as_os_str() == "-" => Box::new(io::sink()),
        _ => Box::new(io::stdout()),
    };
    report.print_header(&mut out)?;
    let start = Instant::now();
    let end = start + Duration::from_secs(args.seconds);
    let mut begun = start;
    while begun < end && sleep_until(begun + interval, &cancellation) {
        let finished = session.finish_interval()?;
        let now = Instant::now();
        let interval = IntervalReport::of(&finished, begun - start, now - begun);
        interval.print(&mut out)?;
        report.intervals.push(interval);
        begun = now;
    }
    report.conclude(session.heat());
    report.print_conclusion(&mut out)?;
    if let Some(path) = &args.json {
        write_report(path, &report)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Sleeps in short steps; `false` if it was cancelled.
fn sleep_until(deadline: Instant, cancellation: &Cancellation) -> bool {
    const STEP: Duration = Duration::from_millis(50);
    while !cancellation.is_cancelled() {
        match deadline.checked_duration_since(Instant::now()) {
            None | Some(Duration::ZERO) => return true,
            Some(left) => std::thread::sleep(left.min(STEP)),
        }
    }
    false
}
