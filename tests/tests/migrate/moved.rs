//! What a move promises, checked.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use pclive_tests::Programs;
use pclive_tests::identity::{differences, identities};
use pclive_tests::lab::{BitRate, Host, Lab, run};
use pclive_tests::load::LoadSpec;
use pclive_tests::patience::wait_until_none;
use pclive_tests::pclive::{MigrationReport, exit};
use pclive_tests::scene::{Network, Scene};

/// 2^20 bytes.
pub const MIB: u64 = 1 << 20;
/// How long the load runs before and after.
const MARGIN: Duration = Duration::from_secs(1);

/// Moves a server under this load with these options of `pclive migrate` and checks everything that is promised of a
/// move: the same processes, the runtime's commands at the destination, nothing left at the source, right answers on
/// every connection.
pub fn move_under_load(load: &LoadSpec, options: &[&str]) -> Result<MigrationReport> {
    let mut scene = Scene::set(Programs::beside_own()?, load, Network::Shared(Some(BitRate::GIGABIT)))?;
    sleep(MARGIN);
    let name = scene.container().name.clone();
    let before = identities(scene.lab().source().container_pid(&name)?)?;
    let outcome = scene.migrate(options)?;
    let logs = format!("{}\nserve: {}", outcome.output, scene.lab().destination().log("serve"));
    assert_eq!(outcome.code, Some(exit::MOVED), "{logs}");
    let report = outcome.report.with_context(|| format!("no report: {logs}"))?;
    let after = identities(scene.lab().destination().container_pid(&name)?)?;
    assert_eq!(differences(&before, &after), [""; 0], "{logs}");
    assert_eq!(scene.lab().traces(scene.lab().source(), &name)?, [""; 0], "{logs}");
    sleep(MARGIN);
    let (load, lab, _serve) = scene.stop_load()?;
    assert_eq!(load.complaint(), None, "{logs}");
    assert_runtime_owns(&lab, lab.destination(), &name)?;
    assert_blackout_is_covered(&report);
    Ok(report)
}

/// The runtime's commands work on the container as on any other; in the end it is gone.
fn assert_runtime_owns(lab: &Lab, host: &Host, name: &str) -> Result<()> {
    let state = host.state(name)?.context("runc list has it")?;
    assert_eq!(state.status, "running");
    let comm = std::fs::read_to_string(format!("/proc/{}/comm", state.pid))?;
    assert_eq!(host.exec(name, &["cat", "/proc/1/comm"])?, comm, "runc exec runs beside it");
    run(&mut host.runc(["kill", name, "TERM"]))?;
    wait_until_none(|| {
        let running = host.state(name)?.filter(|state| state.status != "stopped");
        Ok(running.iter().map(|state| format!("a container that was killed: {state:?}")).collect())
    })?;
    run(&mut host.runc(["delete", name]))?;
    assert_eq!(lab.traces(host, name)?, [""; 0]);
    Ok(())
}

/// The phases leave no hole in the blackout that is longer than 0.5 ms.
fn assert_blackout_is_covered(report: &MigrationReport) {
    const HOLE_US: i64 = 500;
    let (start_us, end_us) = report.blackout_span_us().expect("a container that moved was resumed");
    let mut covered_us = start_us;
    for phase in report.blackout_phases() {
        assert!(phase.start_us <= covered_us + HOLE_US, "a hole before {phase:?}: {:?}", report.phases);
        covered_us = covered_us.max(phase.start_us + phase.duration_us);
    }
    assert!(covered_us + HOLE_US >= end_us, "{report:?}");
}
