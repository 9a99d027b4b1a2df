//! One migration of a container under load, measured from both sides.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, bail};
use pclive_tests::Programs;
use pclive_tests::load::{Gap, LoadReport, LoadSpec};
use pclive_tests::pclive::{MigrationReport, exit};
use pclive_tests::scene::{MIGRATE, MIGRATED, Network, Scene};
use serde::Serialize;

/// How long the load runs before the migration starts and after it has ended.
const MARGIN: Duration = Duration::from_secs(3);

/// What is moved, and how.
pub struct Experiment {
    /// The server's load.
    pub load: LoadSpec,
    /// The hosts' links.
    pub network: Network,
    /// Options of `pclive migrate`.
    pub options: Vec<String>,
}

/// What was seen.
#[derive(Serialize)]
pub struct Measurement {
    /// By pclive.
    pub migration: MigrationReport,
    /// By the clients.
    pub load: LoadReport,
}

impl Experiment {
    /// Carries it out once.
    ///
    /// # Errors
    /// When the container did not move; the message has what pclive printed.
    pub fn carry_out(&self, programs: &Programs) -> Result<Measurement> {
        let mut scene = Scene::set(programs.clone(), &self.load, self.network)?;
        sleep(MARGIN);
        let options: Vec<_> = self.options.iter().map(String::as_str).collect();
        let outcome = scene.migrate(&options)?;
        let (Some(exit::MOVED), Some(migration)) = (outcome.code, outcome.report) else {
            let serve = scene.lab().destination().log("serve");
            bail!("the container did not move: {:?}\n{}\nserve: {serve}", outcome.code, outcome.output);
        };
        sleep(MARGIN);
        let (load, ..) = scene.stop_load()?;
        Ok(Measurement { migration, load })
    }
}

impl Measurement {
    /// The longest time without an answer from the start of the migration on.
    pub fn gap(&self) -> Gap {
        let start_us = self.load.mark_us(MIGRATE).unwrap_or_default();
        let since = self.load.longest_gaps.iter().find(|gap| gap.start_us + gap.duration_us >= start_us);
        since.copied().unwrap_or_default()
    }

    /// Requests per second before the migration.
    pub fn rate_before(&self) -> f64 {
        self.load.rate_between(0, self.load.mark_us(MIGRATE).unwrap_or_default())
    }

    /// Requests per second from the start of the migration to the blackout.
    pub fn rate_during(&self) -> f64 {
        self.load.rate_between(self.load.mark_us(MIGRATE).unwrap_or_default(), self.gap().start_us)
    }

    /// When the migration started and ended, as the load's report counts time.
    pub fn migration_span_us(&self) -> (u64, u64) {
        let mark = |name| self.load.mark_us(name).unwrap_or_default();
        (mark(MIGRATE), mark(MIGRATED))
    }
}

/// Touches `bytes` of the machine's memory, so that a virtual machine's host has backed it before anything is
/// measured: first touches can be several times slower.
pub fn warm_up_memory(bytes: u64) {
    std::hint::black_box(vec![1_u8; bytes as usize]);
}
