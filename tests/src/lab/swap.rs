//! A swap area of the lab's own, for memory that is swapped out when it is moved.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::unistd::Pid;
use procfs::process::Process;

use super::{Host, Lab, run};
use crate::identity::processes;

impl Lab {
    /// Gives the machine a swap area of so many MiB as long as the lab exists.
    ///
    /// # Errors
    /// When it cannot be made or used, as on a file system that cannot have one.
    pub fn add_swap(&self, mib: usize) -> Result<()> {
        let file = file(&self.dir);
        // Without holes: see swapon(8).
        let mut area = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file)?;
        (0..mib).try_for_each(|_| area.write_all(&[0; 1 << 20])).context("write the swap area")?;
        area.sync_all()?;
        run(Command::new("mkswap").arg(&file))?;
        run(Command::new("swapon").arg(&file)).map(drop)
    }

    /// How many bytes of a container's memory are swapped out at `host`.
    ///
    /// # Errors
    /// When it is not there.
    pub fn swapped_bytes(&self, host: &Host, container: &str) -> Result<u64> {
        // Whatever ends while we look has nothing swapped out any more.
        let of = |pid: Pid| Process::new(pid.as_raw()).and_then(|process| process.status()).ok()?.vmswap;
        let kib: u64 = processes(host.container_pid(container)?)?.into_iter().filter_map(of).sum();
        Ok(kib << 10)
    }
}

/// Ends the use of the swap area of the lab in `dir`, if it has one.
pub(super) fn remove(dir: &Path) -> Result<()> {
    let file = file(dir);
    let in_use = fs::read_to_string("/proc/swaps")?
        .lines()
        .any(|line| line.split_whitespace().next().is_some_and(|name| Path::new(name) == file));
    if in_use { run(Command::new("swapoff").arg(&file)).map(drop) } else { Ok(()) }
}

fn file(dir: &Path) -> PathBuf {
    dir.join("swap")
}
