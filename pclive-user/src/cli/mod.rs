//! The command line: one file for each command.

pub mod check;
mod migrate;
mod progress;
mod serve;
pub mod track;

use crate::track::programs::Watch;
use crate::track::{Tier, Tracker};
use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use pclive_wire::control::Failure;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Exit codes of `pclive migrate`, which scripts depend on.
mod exit {
    /// Preflight found obstacles; nothing was touched.
    pub const OBSTACLES: u8 = 3;
    /// It failed; the container runs on at the source.
    pub const FAILED: u8 = 4;
    /// The outcome is unknown; the source's copy is frozen.
    pub const UNKNOWN: u8 = 5;
}

/// What is logged unless PCLIVE_LOG says otherwise. The netlink crate warns of every attribute that is newer than itself.
const DEFAULT_LOG: &str = "warn,netlink_packet_route=error";

/// Moves running containers between hosts while their clients stay connected.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::ServeArgs),
    Migrate(migrate::MigrateArgs),
    Check(check::CheckArgs),
    Track(track::TrackArgs),
}

/// How to reach the OCI runtime.
#[derive(Debug, clap::Args)]
struct RuntimeArgs {
    /// OCI runtime: a name to be found in PATH, or a path.
    #[arg(long, default_value = "runc", value_name = "PROGRAM")]
    runtime: PathBuf,
    /// The runtime's root directory, if not its own default.
    #[arg(long, value_name = "RUNTIME_ROOT")]
    root: Option<PathBuf>,
}

/// Which tier of the tracker is asked for.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum TrackerArg {
    Auto,
    Fentry,
    Tracepoint,
    Scan,
}

impl TrackerArg {
    /// The tracker; one that is asked for by name must be there.
    fn load(self, watch: Watch) -> Result<Tracker> {
        let tier = match self {
            Self::Auto => return Ok(Tracker::best(watch)),
            Self::Fentry => Tier::Fentry,
            Self::Tracepoint => Tier::Tracepoint,
            Self::Scan => Tier::Scan,
        };
        Tracker::of_tier(tier, watch)
            .with_context(|| format!("tracker {tier} is not available on this host (see `pclive check`)"))
    }
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("PCLIVE_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT_LOG));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let result = match cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Migrate(args) => migrate::run(args),
        Command::Check(args) => check::run(args),
        Command::Track(args) => track::run(args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("pclive: {error:#}");
        ExitCode::from(exit::FAILED)
    })
}

/// An error and its causes on one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    Failure::from_error(error).to_string()
}

/// Until transport security exists, only loopback may be used without saying so.
fn require_insecure(address: SocketAddr, insecure: bool) -> Result<()> {
    anyhow::ensure!(
        insecure || address.ip().is_loopback(),
        "the connection would be neither encrypted nor authenticated: use a loopback address, or --insecure on a \
         network that you trust"
    );
    Ok(())
}

/// Writes a report as JSON to a file, or to standard output if that is called `-`.
fn write_report(path: &Path, report: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(report)? + "\n";
    if path == Path::new("-") {
        print!("{text}");
        return Ok(());
    }
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
