//! `pclive serve`: takes migrations.

use super::{RuntimeArgs, chain, require_insecure};
use crate::engine::destination::{Destination, Ended};
use crate::runtime;
use crate::transport::{Incoming, Listener};
use anyhow::{Context, Result};
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

/// Take migrations: containers named N are made from the OCI bundle BUNDLES/N.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// Address and port to listen at; port 0 takes a free one.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: SocketAddr,
    #[command(flatten)]
    runtime: RuntimeArgs,
    /// Directory of bundles (config.json and rootfs, prepared for this host).
    #[arg(long, value_name = "DIR")]
    bundles: PathBuf,
    /// Allow connections that are neither encrypted nor authenticated on an address that is not loopback.
    #[arg(long)]
    insecure: bool,
    /// Print one JSON object for each event.
    #[arg(long)]
    json: bool,
}

/// Listens until SIGINT or SIGTERM.
pub fn run(args: ServeArgs) -> Result<ExitCode> {
    require_insecure(args.listen, args.insecure)?;
    anyhow::ensure!(args.bundles.is_dir(), "{} is not a directory", args.bundles.display());
    let runtime = runtime::open(&args.runtime.runtime, args.runtime.root.as_deref())?;
    let destination = Destination::new(runtime, &args.bundles);
    destination.clear_leftovers();
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start tokio")?;
    tokio.block_on(async {
        let listener = Listener::bind(args.listen).await?;
        let events = Events { json: args.json };
        events.listening(listener.address());
        let migrate = move |incoming: Incoming| {
            let container = incoming.proposal.container.clone();
            events.begin(&container);
            events.end(&container, &destination.migrate(incoming));
        };
        listener.serve(migrate, stop_signal()?).await?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Completes on SIGINT or SIGTERM.
fn stop_signal() -> Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

/// Tells the operator what happens, a line each.
#[derive(Clone, Copy)]
struct Events {
    json: bool,
}

impl Events {
    fn listening(self, address: SocketAddr) {
        match self.json {
            true => print(&serde_json::json!({ "event": "listening", "address": address }).to_string()),
            false => print(&format!("listening on {address}")),
        }
    }

    fn begin(self, container: &str) {
        match self.json {
            true => print(&serde_json::json!({ "event": "begin", "container": container }).to_string()),
            false => print(&format!("{container}: migration begins")),
        }
    }

    fn end(self, container: &str, ended: &Result<Ended, impl std::error::Error + Send + Sync + 'static>) {
        let (result, text) = match ended {
            Ok(Ended::Running { restore_us }) => {
                ("running", format!("runs here, restored in {restore_us} µs"))
            }
            Ok(Ended::Rejected(refusal)) => ("rejected", format!("rejected: {}", chain(refusal))),
            Ok(Ended::Failed(error, None)) => {
                ("failed", format!("failed, everything removed: {}", chain(error)))
            }
            Ok(Ended::Failed(error, Some(cleanup))) => {
                ("failed", format!("failed: {}; and cleaning up failed: {}", chain(error), chain(cleanup)))
            }
            Err(error) => ("failed", format!("failed before anything was made: {}", chain(error))),
        };
        match self.json {
            true => {
                let event = serde_json::json!({ "event": "end", "container": container, "result": result, "text": text });
                print(&event.to_string());
            }
            false => print(&format!("{container}: {text}")),
        }
    }
}

/// Prints a line at once; nobody reading it is no reason to stop.
fn print(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
