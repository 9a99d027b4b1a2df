//! What this machine cannot measure, and why.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use pclive_tests::Programs;
use serde::Deserialize;

use super::matrix::{Mode, Mover, Setting, Tracker, Workload};
use super::provenance::{Memory, memory};
use crate::experiment::container_mib;

/// What everything else takes, pclive's digests of 1/32 of the container among it.
const OTHERS_MIB: u64 = 1024;

/// What the machine has.
pub struct Machine {
    memory: Memory,
    /// What `pclive check` said.
    features: Vec<Feature>,
    has: fn(&Path) -> bool,
}

/// A line of `pclive check --json`.
#[derive(Debug, Deserialize)]
struct Feature {
    name: String,
    available: bool,
    detail: String,
}

impl Machine {
    /// This one.
    ///
    /// # Errors
    /// When `pclive check` cannot be run or understood, or the kernel does not tell how much memory there is.
    pub fn here(programs: &Programs) -> Result<Self> {
        // Its exit code says whether all is well: what is missing is in what it prints.
        let output = Command::new(programs.path("pclive")?).args(["check", "--json"]).output();
        let output = output.context("start pclive check")?;
        let features = serde_json::from_slice(&output.stdout).with_context(|| {
            format!("what pclive check printed: {}", String::from_utf8_lossy(&output.stderr))
        })?;
        Ok(Self { memory: memory()?, features, has: Path::exists })
    }

    /// Why a mover cannot be measured in a setting; `None` if it can, or if nobody knows before it was tried.
    pub fn obstacle(&self, setting: &Setting, mover: &Mover) -> Option<String> {
        let program = PathBuf::from(setting.workload.program());
        if !(self.has)(&program) {
            return Some(format!("{} is not installed: cargo xtask setup", program.display()));
        }
        let (needed, available) = (memory_mib(setting, mover), self.memory.available_mib);
        if needed > available {
            return Some(format!("needs {needed} MiB of memory for all copies, {available} are available"));
        }
        if setting.open_loop.is_some() && setting.workload == Workload::Idle {
            return Some("nobody asks an idle container anything: there is no open loop".into());
        }
        if let Mover::Pclive { mode: Mode::OneShot, restore_from: 1.., .. } = mover {
            return Some("one-shot has no earlier rounds to keep".into());
        }
        mover.tracker().and_then(|tracker| self.tracker(tracker))
    }

    fn tracker(&self, tracker: Tracker) -> Option<String> {
        let name = format!("tracker {}", tracker.name());
        let feature = self.features.iter().find(|feature| feature.name == name)?;
        (!feature.available).then(|| format!("{name}: {}", feature.detail))
    }
}

/// What a measurement takes of the machine's memory while all copies exist: both hosts are on it.
fn memory_mib(setting: &Setting, mover: &Mover) -> u64 {
    container_mib(setting.data_mib) + destination_mib(setting, mover) + OTHERS_MIB
}

/// What of it is taken only when the container is moved.
pub fn destination_mib(setting: &Setting, mover: &Mover) -> u64 {
    let copies = match mover {
        Mover::Track { .. } | Mover::Control => 0,
        Mover::Pclive { mode: Mode::PcliveG, restore_from: 0, .. } => 1,
        // Between those of the two containers there is a third one: pages that wait to be applied, or CRIU's images.
        Mover::Pclive { .. } | Mover::Criu => 2,
    };
    copies * container_mib(setting.data_mib)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_named() {
        let fentry = Feature { name: "tracker fentry".into(), available: false, detail: "lockdown".into() };
        let memory = Memory { total_mib: 8000, available_mib: 6000 };
        let machine = Machine { memory, features: vec![fentry], has: |path| !path.ends_with("memcached") };
        let setting = |workload, mib| Setting::new(workload, mib, 1_000);
        let why = |setting, mover: &Mover| machine.obstacle(&setting, mover).unwrap_or_default();
        let default = &Mover::mode(Mode::PcliveG);
        assert_eq!(why(setting(Workload::Redis90, 1024), default), "");
        assert!(why(setting(Workload::Redis90, 2048), default).contains("needs 6144 MiB"));
        assert!(why(setting(Workload::Memcached, 128), default).contains("not installed"));
        let third_copy = &Mover::mode(Mode::Pclive);
        assert!(why(setting(Workload::Redis90, 1536), default).is_empty());
        assert!(why(setting(Workload::Redis90, 1536), third_copy).contains("needs 6784 MiB"));
        let fentry = &Mover::pclive(Mode::PcliveG, Tracker::Fentry, 0);
        assert_eq!(why(setting(Workload::Redis90, 128), fentry), "tracker fentry: lockdown");
        let delayed = &Mover::pclive(Mode::OneShot, Tracker::Scan, 2);
        assert!(why(setting(Workload::Redis90, 128), delayed).contains("no earlier rounds"));
    }
}
