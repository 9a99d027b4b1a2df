//! Redis moves while 16 connections read and write at full load, in every mode, and nobody is told anything wrong.

use anyhow::Result;
use pclive_tests::load::{LoadSpec, Service};

use crate::moved::{MIB, move_under_load};

fn redis() -> LoadSpec {
    LoadSpec { read_percent: 50, ..LoadSpec::new(Service::Redis, 64 * MIB) }
}

#[test]
fn by_default() -> Result<()> {
    let report = move_under_load(&redis(), &[])?;
    assert_eq!(report.mode, "pclive-g");
    assert!(report.rounds.len() > 1, "pages flow while it runs: {:?}", report.rounds);
    Ok(())
}

#[test]
fn in_mode_pclive() -> Result<()> {
    let report = move_under_load(&redis(), &["--mode", "pclive"])?;
    assert_eq!(report.mode, "pclive");
    assert!(report.rounds.len() > 1, "pages flow while it runs: {:?}", report.rounds);
    Ok(())
}

#[test]
fn in_mode_one_shot() -> Result<()> {
    let report = move_under_load(&redis(), &["--mode", "one-shot"])?;
    assert_eq!(report.mode, "one-shot");
    Ok(())
}

#[test]
fn with_delayed_restoration() -> Result<()> {
    move_under_load(&redis(), &["--restore-from", "2"]).map(drop)
}

#[test]
fn with_tracker_scan() -> Result<()> {
    let report = move_under_load(&redis(), &["--tracker", "scan"])?;
    assert_eq!(report.tracker, "scan");
    assert_eq!(report.sockets_known, 0, "nobody notices that options are set");
    Ok(())
}

#[test]
fn with_tracker_tracepoint() -> Result<()> {
    let report = move_under_load(&redis(), &["--tracker", "tracepoint"])?;
    assert_eq!(report.tracker, "tracepoint");
    assert!(report.sockets_known >= 16, "{} of 16 connections and a listener", report.sockets_known);
    Ok(())
}

/// More than one descriptor table holds before it has to grow: pclive's at both hosts, and the container's own.
#[test]
fn with_hundreds_of_connections() -> Result<()> {
    move_under_load(&LoadSpec { connections: 400, ..redis() }, &[]).map(drop)
}
