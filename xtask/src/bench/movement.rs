//! What a migration cost, in the same terms whoever carried it out.

use pclive_tests::pclive::{MigrationReport, Phase};
use serde::{Deserialize, Serialize};

/// A part of a time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// What was done in it.
    pub name: String,
    /// How long it took.
    pub us: u64,
}

/// One migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Movement {
    /// Which tracker it used.
    pub tracker: String,
    /// From the first stopped thread at the source to the container running at the destination.
    pub blackout_us: u64,
    /// From the last byte of state at the destination to the container running there.
    pub restore_us: u64,
    /// From the command to its end.
    pub total_us: u64,
    /// How often memory was sent.
    pub rounds: u64,
    /// Bytes on the wire.
    pub bytes_sent: u64,
    /// The blackout in `dump`, `transfer` and `restore`.
    pub blackout: Vec<Part>,
    /// The time of restoring in steps.
    pub restore: Vec<Part>,
    /// When the blackout began, as far into the migration.
    pub frozen_us: u64,
    /// Everything that the mover reported.
    pub report: serde_json::Value,
}

impl Movement {
    /// By pclive.
    pub fn of(report: &MigrationReport) -> Self {
        let (start_us, end_us) = report.blackout_span_us().unwrap_or_default();
        let restore_start_us = (end_us - report.restore_us as i64).max(start_us);
        Self {
            tracker: report.tracker.clone(),
            blackout_us: report.blackout_us,
            restore_us: report.restore_us,
            total_us: report.total_us,
            rounds: report.rounds.len() as u64,
            bytes_sent: report.bytes_sent,
            blackout: split(report, start_us, restore_start_us, end_us),
            restore: steps(&report.blackout_phases(), restore_start_us),
            frozen_us: report.frozen_us(),
            report: serde_json::to_value(report).unwrap_or_default(),
        }
    }
}

/// Dump, transfer, restore. They overlap in pclive: state is captured while pages are sent. Here transfer begins with
/// the first byte that is sent in the blackout, and restore with the last one that arrives.
fn split(report: &MigrationReport, start_us: i64, restore_start_us: i64, end_us: i64) -> Vec<Part> {
    let phases = report.blackout_phases();
    let sends = phases.iter().filter(|phase| phase.side == "source" && phase.name.starts_with("send"));
    let send_us = sends.map(|phase| phase.start_us).min().unwrap_or(restore_start_us).min(restore_start_us);
    [
        ("dump", start_us, send_us),
        ("transfer", send_us, restore_start_us),
        ("restore", restore_start_us, end_us),
    ]
    .map(|(name, from_us, to_us)| Part { name: name.into(), us: (to_us - from_us).max(0) as u64 })
    .to_vec()
}

/// What the destination did from then on. Its phases do not overlap each other.
fn steps(phases: &[Phase], from_us: i64) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for phase in phases.iter().filter(|phase| phase.side == "destination") {
        let us = (phase.start_us + phase.duration_us - phase.start_us.max(from_us)).max(0) as u64;
        match parts.iter_mut().find(|part| part.name == phase.name) {
            Some(part) => part.us += us,
            None if us > 0 => parts.push(Part { name: phase.name.clone(), us }),
            None => {}
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(side: &str, name: &str, start_us: i64, duration_us: i64) -> Phase {
        Phase { name: name.into(), side: side.into(), start_us, duration_us }
    }

    #[test]
    fn a_blackout_is_split_without_a_rest() {
        let report = serde_json::json!({
            "mode": "pclive-g", "tracker": "scan", "container": "c", "rounds": [], "sockets_known": 0,
            "mappings_told": 0, "mappings_read": 0, "zero_pages": 0,
            "bytes_sent": 7, "zerocopy": {"sends": 0, "copied": 0}, "blackout_us": 1000, "restore_us": 200,
            "total_us": 6000, "source_cpu_us": 1, "destination_cpu_us": 1, "destination_peak_rss_bytes": 1,
            "result": "running", "attach_stop_us": 3,
            "phases": [
                phase("source", "rounds", 0, 5000), phase("destination", "rounds", 0, 5800),
                phase("source", "stop threads", 5000, 100), phase("source", "send last pages", 5100, 650),
                phase("source", "wait", 5750, 250), phase("destination", "restore", 5800, 150),
                phase("destination", "resume", 5950, 50),
            ],
        });
        let report: MigrationReport = serde_json::from_value(report).expect("a report");
        let movement = Movement::of(&report);
        let parts =
            |parts: &[Part]| parts.iter().map(|part| (part.name.clone(), part.us)).collect::<Vec<_>>();
        let expected = [("dump", 100), ("transfer", 700), ("restore", 200)];
        assert_eq!(parts(&movement.blackout), expected.map(|(name, us)| (name.to_owned(), us)));
        let expected = [("restore", 150), ("resume", 50)];
        assert_eq!(parts(&movement.restore), expected.map(|(name, us)| (name.to_owned(), us)));
        assert_eq!(movement.frozen_us, 5000);
        assert_eq!(movement.report["attach_stop_us"], 3, "nothing of the report is lost");
    }
}
