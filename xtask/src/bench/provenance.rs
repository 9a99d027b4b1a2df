//! Where figures come from: without it nobody can repeat them, nor doubt them.

use std::fs;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use nix::sys::utsname::uname;
use serde::{Deserialize, Serialize};

/// How and on what the measurements were made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Provenance {
    /// The command that measures the same again.
    pub command: String,
    /// The revision of pclive's sources, if they are a git repository; `+` after it says that they were changed.
    pub revision: String,
    /// The kernel.
    pub kernel: String,
    /// The processor.
    pub cpu: String,
    /// CPUs that share hosts, client, server and load.
    pub cpus: usize,
    /// The machine's memory.
    pub memory_mib: u64,
    /// Turns of each cell.
    pub repeat: usize,
    /// The most memory touched before a measurement.
    pub warmed_up_mib: u64,
    /// When it began, in seconds since 1970.
    pub began_unix_s: u64,
}

/// How an invocation that was broken off is gone on with.
pub const RESUME: &str = " --resume";
/// The revision where there is no git repository.
const UNKNOWN: &str = "unknown";
/// What stands behind a revision whose files were changed.
const CHANGED: &str = "+";

impl Provenance {
    /// The command, whether it goes on with an earlier one or not.
    pub fn invocation(&self) -> String {
        self.command.replacen(RESUME, "", 1)
    }

    /// Whether the revision says what was measured.
    pub fn is_of_a_revision(&self) -> bool {
        self.revision != UNKNOWN && !self.revision.ends_with(CHANGED)
    }

    /// This machine and this invocation.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn here(repeat: usize, warmed_up_mib: u64) -> Result<Self> {
        let uname = uname().context("uname")?;
        let arguments = std::env::args().skip(1).map(|argument| quoted(&argument));
        Ok(Self {
            command: std::iter::once("cargo xtask".into()).chain(arguments).collect::<Vec<_>>().join(" "),
            revision: revision(),
            kernel: format!("Linux {}", uname.release().to_string_lossy()),
            cpu: cpu(&fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: memory()?.total_mib,
            repeat,
            warmed_up_mib,
            began_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        })
    }
}

/// The machine's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// All of it.
    pub total_mib: u64,
    /// What can be had without swapping.
    pub available_mib: u64,
}

/// Asks the kernel.
///
/// # Errors
/// When it does not tell.
pub fn memory() -> Result<Memory> {
    parse_memory(&fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?)
        .context("/proc/meminfo lacks MemTotal or MemAvailable")
}

fn parse_memory(meminfo: &str) -> Option<Memory> {
    let mib = |name| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? / 1024)
    };
    Some(Memory { total_mib: mib("MemTotal:")?, available_mib: mib("MemAvailable:")? })
}

/// The revision of the sources that this program was built from.
fn revision() -> String {
    let git = |arguments: &[&str]| {
        let output =
            Command::new("git").args(["-C", env!("CARGO_MANIFEST_DIR")]).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(revision) = git(&["rev-parse", "--short=12", "HEAD"]) else { return UNKNOWN.into() };
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_none_or(|files| !files.is_empty());
    if changed { revision + CHANGED } else { revision }
}

fn cpu(cpuinfo: &str) -> String {
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(|| "unknown".into(), |(_, name)| name.trim().to_owned())
}

/// An argument as one types it into a shell.
fn quoted(argument: &str) -> String {
    let plain = |byte: char| byte.is_ascii_alphanumeric() || "-_=,./:+".contains(byte);
    if !argument.is_empty() && argument.chars().all(plain) {
        argument.to_owned()
    } else {
        format!("'{}'", argument.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_understood() {
        let meminfo =
            "MemTotal:       24683520 kB\nMemFree:        19222528 kB\nMemAvailable:   24129536 kB\n";
        assert_eq!(parse_memory(meminfo), Some(Memory { total_mib: 24105, available_mib: 23564 }));
        assert_eq!(parse_memory("MemTotal: 1 kB\n"), None);
        assert_eq!(cpu("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\n"), "A CPU @ 2 GHz");
    }

    #[test]
    fn a_command_can_be_pasted() {
        assert_eq!(quoted("--only=pclive-g"), "--only=pclive-g");
        assert_eq!(quoted("Redis 90:10"), "'Redis 90:10'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
