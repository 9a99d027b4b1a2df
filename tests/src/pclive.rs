//! The `pclive` program on the lab's hosts, used by its command line as its users do.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use wait_timeout::ChildExt;

use crate::lab::{Host, Lab, run};

/// The port that `pclive serve` listens on.
const PORT: u16 = 7011;
/// How long it may take until it does.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a test's migration may take, whatever happens to it.
const MIGRATE_TIMEOUT: Duration = Duration::from_secs(120);

/// Exit codes of `pclive migrate`.
pub mod exit {
    /// The container runs at the destination.
    pub const MOVED: i32 = 0;
    /// The command line is wrong.
    pub const USAGE: i32 = 2;
    /// Preflight found obstacles; nothing was touched.
    pub const OBSTACLES: i32 = 3;
    /// It failed; the container runs on at the source.
    pub const STAYED: i32 = 4;
    /// Nobody knows which host has the container.
    pub const UNKNOWN: i32 = 5;
}

/// A running `pclive serve`. It is killed when dropped.
#[derive(Debug)]
pub struct Serve {
    child: Child,
    addresses: [Ipv4Addr; 2],
}

impl Serve {
    /// Starts it on `host` and waits until it listens. Its log is `serve`.
    ///
    /// # Errors
    /// When it ends or does not listen in time; the message has its log.
    pub fn start(lab: &Lab, host: &Host) -> Result<Self> {
        let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
        let mut command = host.command(lab.programs().path("pclive")?);
        command.args(["serve", "--insecure", "--listen", &everywhere.to_string(), "--root"]);
        command.arg(host.runtime_root()).arg("--bundles").arg(host.bundles());
        let addresses = [host.address(), host.interlink_address()];
        let mut serve = Self { child: spawn(command, host, "serve")?, addresses };
        let end = Instant::now() + LISTEN_TIMEOUT;
        while !host.log("serve").contains("listening on") {
            if let Some(status) = serve.child.try_wait()? {
                bail!("pclive serve: {status}: {}", host.log("serve"));
            }
            if Instant::now() > end {
                bail!("pclive serve does not listen: {}", host.log("serve"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(serve)
    }

    /// Where the other host reaches it by way of the switch.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((self.addresses[0], PORT))
    }

    /// Where the other host reaches it by the link that joins the hosts.
    pub fn interlink_address(&self) -> SocketAddr {
        SocketAddr::from((self.addresses[1], PORT))
    }

    /// Kills it.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("kill pclive serve")?;
        self.child.wait()?;
        Ok(())
    }

    /// Migrations of `container` to `host` that have begun and not ended, from the log there.
    pub fn unfinished(host: &Host, container: &str) -> Vec<String> {
        let log = host.log("serve");
        let about = |line: &&str| line.strip_prefix(container).is_some_and(|rest| rest.starts_with(": "));
        let (begun, others): (Vec<_>, Vec<_>) =
            log.lines().filter(about).map(str::to_owned).partition(|line| line.ends_with("migration begins"));
        begun.into_iter().skip(others.len()).collect()
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        kill(&mut self.child);
    }
}

/// A running `pclive migrate`. It is killed when dropped.
#[derive(Debug)]
pub struct Migrate {
    child: Child,
    started: Instant,
    report: PathBuf,
    output: PathBuf,
}

/// How a migration ended.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Its report, if it wrote one.
    pub report: Option<MigrationReport>,
    /// What it printed.
    pub output: String,
}

impl Migrate {
    /// Starts the migration of `container` from `host` to `serve` with further `options`. Its log is `migrate`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(
        lab: &Lab,
        host: &Host,
        container: &str,
        serve: SocketAddr,
        options: &[&str],
    ) -> Result<Self> {
        let report = lab.dir().join("report.json");
        // An earlier migration's report must not be taken for this one's.
        let _ = fs::remove_file(&report);
        let mut command = host.command(lab.programs().path("pclive")?);
        command.args(["migrate", container, "--insecure", "--to", &serve.to_string(), "--root"]);
        command.arg(host.runtime_root()).arg("--json").arg(&report).args(options);
        let child = spawn(command, host, "migrate")?;
        Ok(Self { child, started: Instant::now(), report, output: host.logs().join("migrate") })
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        nix::sys::signal::kill(Pid::from_raw(self.child.id() as i32), signal).context("signal pclive migrate")
    }

    /// Whether it catches a signal already, or has ended: what comes earlier ends it before it has done anything, or could
    /// say so.
    pub fn is_prepared_for(&self, signal: Signal) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        caught.is_none_or(|mask| mask & 1 << (signal as u32 - 1) != 0)
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// When it goes on for longer than a migration may take, or the kernel does not tell.
    pub fn has_ended(&mut self) -> Result<bool> {
        let has_ended = self.child.try_wait()?.is_some();
        ensure!(has_ended || self.started.elapsed() < MIGRATE_TIMEOUT, "pclive migrate does not end");
        Ok(has_ended)
    }

    /// What it has printed so far.
    pub fn output(&self) -> String {
        fs::read(&self.output).map(|output| String::from_utf8_lossy(&output).into_owned()).unwrap_or_default()
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// When it does not, or its report cannot be understood.
    pub fn wait(self) -> Result<Outcome> {
        self.wait_for(MIGRATE_TIMEOUT)
    }

    /// As [`Self::wait`], for that long.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_for(mut self, timeout: Duration) -> Result<Outcome> {
        // Without looking again and again: what is measured may share a processor with the caller.
        let Some(status) = self.child.wait_timeout(timeout)? else {
            bail!("pclive migrate does not end: {}", self.output());
        };
        let report = match fs::read(&self.report) {
            Ok(json) => Some(serde_json::from_slice(&json).context("the report of pclive migrate")?),
            Err(_) => None,
        };
        Ok(Outcome { code: status.code(), report, output: self.output() })
    }
}

impl Drop for Migrate {
    fn drop(&mut self) {
        kill(&mut self.child);
    }
}

fn spawn(mut command: std::process::Command, host: &Host, log: &str) -> Result<Child> {
    let log = File::create(host.logs().join(log))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().with_context(|| format!("start {command:?}"))
}

fn kill(child: &mut Child) {
    // It may have ended by itself.
    let _ = child.kill();
    let _ = child.wait();
}

/// Follows a container on `host` by `pclive track` with further `options` until it ends by itself.
///
/// # Errors
/// When it fails, or its report cannot be understood.
pub fn track(lab: &Lab, host: &Host, container: &str, options: &[&str]) -> Result<TrackReport> {
    let mut command = host.command(lab.programs().path("pclive")?);
    command.args(["track", container, "--json", "-", "--root"]).arg(host.runtime_root()).args(options);
    serde_json::from_str(&run(&mut command)?).context("the report of pclive track")
}

/// What `pclive track --json` writes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrackReport {
    /// The tracker tier it used.
    pub tracker: String,
    /// One after the other.
    pub intervals: Vec<TrackInterval>,
    /// What else it has that is not promised.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

/// The time between two looks at what was written.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrackInterval {
    /// How long it was.
    pub duration_us: u64,
    /// Pages written in it.
    pub dirty_pages: u64,
    /// How long finding them and protecting them again took.
    pub round_us: u64,
    /// What else it has that is not promised.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

/// What `pclive migrate --json` writes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigrationReport {
    /// The mode it ran in.
    pub mode: String,
    /// The tracker tier it used.
    pub tracker: String,
    /// The container.
    pub container: String,
    /// The rounds before and at the freeze.
    pub rounds: Vec<Round>,
    /// Sockets whose options were known before the freeze.
    pub sockets_known: u64,
    /// Mappings whose flags eBPF told.
    pub mappings_told: u64,
    /// Mappings for which `smaps` was read in the blackout although eBPF was asked.
    pub mappings_read: u64,
    /// Pages that were zero and not sent.
    pub zero_pages: u64,
    /// Bytes on the wire.
    pub bytes_sent: u64,
    /// Sends without a copy.
    pub zerocopy: Zerocopy,
    /// From the freeze to the container running at the destination.
    pub blackout_us: u64,
    /// From the last byte received to the container running.
    pub restore_us: u64,
    /// The whole migration.
    pub total_us: u64,
    /// What the migration was spent with, on both sides.
    pub phases: Vec<Phase>,
    /// CPU time of pclive at the source.
    pub source_cpu_us: u64,
    /// CPU time of pclive at the destination.
    pub destination_cpu_us: u64,
    /// Peak memory of pclive's own processes at the destination.
    pub destination_peak_rss_bytes: u64,
    /// How it ended.
    pub result: serde_json::Value,
    /// What else it has that is not promised.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

/// One pass over a dirty set.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Round {
    /// Pages sent.
    pub pages: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Pages found dirty.
    pub dirty_pages: u64,
    /// How long it took.
    pub duration_us: u64,
    /// What else it has that is not promised.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

/// What `MSG_ZEROCOPY` did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Zerocopy {
    /// Sends that asked for it.
    pub sends: u64,
    /// Those that the kernel copied all the same.
    pub copied: u64,
}

/// A part of the blackout.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// Where.
    pub side: String,
    /// When it started, by the source's clock.
    pub start_us: i64,
    /// How long it took.
    pub duration_us: i64,
}

impl MigrationReport {
    /// When the blackout began and ended, on the clock of the phases: it ends with the phase `resume`.
    pub fn blackout_span_us(&self) -> Option<(i64, i64)> {
        let resume = self.phases.iter().find(|phase| phase.name == "resume")?;
        let end_us = resume.start_us + resume.duration_us;
        Some((end_us - self.blackout_us as i64, end_us))
    }

    /// When the container was frozen, on the clock of the phases; 0 if it was not.
    pub fn frozen_us(&self) -> u64 {
        self.blackout_span_us().map_or(0, |(start_us, _)| start_us.max(0) as u64)
    }

    /// What the blackout was spent with: the phases in it, cut to it, in the order of their begin.
    pub fn blackout_phases(&self) -> Vec<Phase> {
        let Some((start_us, end_us)) = self.blackout_span_us() else { return Vec::new() };
        let inside = self.phases.iter().filter_map(|phase| {
            let (first, last) = (phase.start_us, phase.start_us + phase.duration_us);
            // A phase of no length at the border belongs to it as well.
            if last < start_us || first > end_us || (last == start_us && first < start_us) {
                return None;
            }
            let (first, last) = (first.max(start_us), last.min(end_us));
            Some(Phase { start_us: first, duration_us: last - first, ..phase.clone() })
        });
        let mut phases: Vec<_> = inside.collect();
        phases.sort_by_key(|phase| (phase.start_us, phase.duration_us));
        phases
    }
}
