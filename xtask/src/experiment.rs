//! One migration of a container under load, measured from both sides.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, bail};
use pclive_tests::Programs;
use pclive_tests::load::{Gap, LoadReport, LoadSpec};
use pclive_tests::pclive::{MigrationReport, exit};
use pclive_tests::scene::{MIGRATE, MIGRATED, Network, Scene};

use crate::warm::WarmMemory;

/// How long the load runs before the migration starts and after it has ended.
const MARGIN: Duration = Duration::from_secs(3);

/// How long after a migration a time without an answer still counts as its doing.
const AFTERWARDS: Duration = Duration::from_secs(1);

/// How long a migration may take: gigabytes over a slow link take minutes.
const PATIENCE: Duration = Duration::from_secs(900);

/// What a container with so many MiB of data takes at a host: 1.24 times as many at 128 MiB, fewer with more data.
pub fn container_mib(data_mib: u64) -> u64 {
    data_mib * 5 / 4
}

/// What is moved, and how.
pub struct Experiment {
    /// The server's load.
    pub load: LoadSpec,
    /// The hosts' links.
    pub network: Network,
    /// Options of `pclive migrate`.
    pub options: Vec<String>,
    /// The memory that the destination will take.
    pub destination_bytes: u64,
}

/// What was seen.
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
        let warm = WarmMemory::touch(self.destination_bytes)?;
        let mut scene = Scene::set(programs.clone(), &self.load, self.network)?;
        sleep(MARGIN);
        let _offer = warm.offer()?;
        let migration = migrate(&mut scene, &self.options)?;
        sleep(MARGIN);
        let (load, ..) = scene.stop_load()?;
        Ok(Measurement { migration, load })
    }
}

/// Moves the container by pclive.
///
/// # Errors
/// When it did not move; the message has what pclive printed.
pub fn migrate(scene: &mut Scene, options: &[String]) -> Result<MigrationReport> {
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    scene.load().mark(MIGRATE)?;
    let outcome = scene.start_migration(&options)?.wait_for(PATIENCE)?;
    scene.load().mark(MIGRATED)?;
    let (Some(exit::MOVED), Some(migration)) = (outcome.code, outcome.report) else {
        let serve = scene.lab().destination().log("serve");
        bail!("the container did not move: {:?}\n{}\nserve: {serve}", outcome.code, outcome.output);
    };
    Ok(migration)
}

/// The longest time without an answer from the start of the migration to a second after its end.
///
/// Not later: two seconds after gigabytes were freed, as the source's copy is, a virtual machine gives them back to its host,
/// which stops its processors for tens of milliseconds again and again (`PAGE_REPORTING_DELAY` in mm/page_reporting.c).
/// That is no more the migration's doing than the end of any other large program.
pub fn gap(load: &LoadReport) -> Gap {
    let (start_us, end_us) = migration_span_us(load);
    let counts = |gap: &&Gap| {
        gap.start_us + gap.duration_us >= start_us && gap.start_us <= end_us + AFTERWARDS.as_micros() as u64
    };
    load.longest_gaps.iter().find(counts).copied().unwrap_or_default()
}

/// Requests per second before the migration.
pub fn rate_before(load: &LoadReport) -> f64 {
    load.rate_between(0, migration_span_us(load).0)
}

/// Requests per second from the start of the migration to the blackout, which began at `frozen_us`.
pub fn rate_during(load: &LoadReport, frozen_us: u64) -> f64 {
    load.rate_between(migration_span_us(load).0, frozen_us)
}

/// When a blackout began, as the load's report counts time, of which the mover says that it was `frozen_us` after the
/// mover's start. The mover's clock is laid at the end of the migration, which took it `total_us`: before its begin a
/// program has to be started and to look at what the kernel offers.
pub fn blackout_start_us(load: &LoadReport, frozen_us: u64, total_us: u64) -> u64 {
    (migration_span_us(load).1 + frozen_us).saturating_sub(total_us)
}

/// When the migration started and ended, as the load's report counts time.
pub fn migration_span_us(load: &LoadReport) -> (u64, u64) {
    let mark = |name| load.mark_us(name).unwrap_or_default();
    (mark(MIGRATE), mark(MIGRATED))
}
