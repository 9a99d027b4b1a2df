//! The numbers that are taken from a run.

use super::cost;
use super::results::{Cell, Run};
use super::statistics::Summary;
use crate::experiment::{gap, migration_span_us, rate_before, rate_during};
use pclive_tests::scene::MIGRATE;

/// A number of a run.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// What it is called in files.
    pub key: &'static str,
    /// What it is called for readers, with its unit.
    pub title: &'static str,
    /// How it is had; `None` if such a run has none.
    pub of: fn(&Run) -> Option<f64>,
}

/// A tenth of a second.
const TENTH_US: u64 = 100_000;
const MIB: f64 = (1 << 20) as f64;

/// How much throughput differs from one tenth of a second to the next when nothing is moved: the distance of what nine
/// tenths reach and what one tenth does, compared with the median.
const SPREAD: Metric = Metric {
    key: "spread_percent",
    title: "  of it spread, %",
    of: |run| {
        let until_us = match run.movement {
            Some(_) => migration_span_us(&run.load).0,
            None => run.load.duration_us,
        };
        let tenths = (until_us / TENTH_US) as usize;
        let rates = (0..tenths as u64).map(|at| run.load.rate_between(at * TENTH_US, (at + 1) * TENTH_US));
        let mut rates: Vec<f64> = rates.collect();
        rates.sort_by(f64::total_cmp);
        let at = |part: usize| rates.get(tenths * part / 10).copied();
        asked(run).then_some(100.0 * (at(9)? - at(1)?) / at(5)?)
    },
};

/// The longest time in which clients got no answer.
pub const GAP: Metric = Metric {
    key: "longest_gap_ms",
    title: "longest gap, ms",
    of: |run| asked(run).then(|| gap(&run.load).duration_us as f64 / 1e3),
};
/// The blackout as the mover reports it.
pub const BLACKOUT: Metric = Metric {
    key: "blackout_ms",
    title: "blackout, ms",
    of: |run| run.movement.as_ref().map(|movement| movement.blackout_us as f64 / 1e3),
};
/// The part of it after the last byte.
pub const RESTORE: Metric = Metric {
    key: "restore_ms",
    title: "restore, ms",
    of: |run| run.movement.as_ref().map(|movement| movement.restore_us as f64 / 1e3),
};
/// What clients still get before the blackout, or while the container is only tracked.
pub const THROUGHPUT: Metric = Metric {
    key: "throughput_percent",
    title: "throughput meanwhile, %",
    of: |run| {
        let during = match &run.movement {
            // A single round is the blackout itself.
            Some(movement) if movement.rounds < 2 => return None,
            Some(_) => rate_during(&run.load, run.frozen_us()?),
            None => {
                let (start_us, end_us) = migration_span_us(&run.load);
                run.load.rate_between(start_us, end_us)
            }
        };
        asked(run).then(|| 100.0 * during / rate_before(&run.load))
    },
};
/// CPU time at the source of who moves the container, or tracks it.
pub const SOURCE_CPU: Metric = Metric {
    key: "source_cpu_s",
    title: "CPU at source, s",
    of: |run| {
        let at_work = run.movement.is_some() || run.tracking.is_some();
        let sample = run.usage.last().filter(|_| at_work);
        sample.map(|sample| sample.source.mover.cpu_us as f64 / 1e6)
    },
};
/// CPU time of the mover at the destination.
pub const DESTINATION_CPU: Metric = Metric {
    key: "destination_cpu_s",
    title: "CPU at destination, s",
    of: |run| {
        let sample = run.movement.as_ref().and(run.usage.last());
        sample.map(|sample| sample.destination.mover.cpu_us as f64 / 1e6)
    },
};
/// The mover's peak memory at the destination.
pub const DESTINATION_MEMORY: Metric = Metric {
    key: "destination_mib",
    title: "memory at destination, MiB",
    of: |run| {
        let report = &run.movement.as_ref()?.report;
        let reported = report.get("destination_peak_rss_bytes").and_then(serde_json::Value::as_f64);
        let sampled = run.usage.iter().map(|sample| sample.destination.mover.rss_bytes as f64);
        Some(reported.unwrap_or_else(|| sampled.fold(0.0, f64::max)) / MIB)
    },
};
/// Wrong and missing answers and broken connections.
pub const HARMED: Metric = Metric {
    key: "harmed",
    title: "clients harmed",
    of: |run| {
        let load = &run.load;
        Some((load.wrong_answers + load.unanswered) as f64 + load.broken_connections.len() as f64)
    },
};

/// What others took of the machine meanwhile.
pub const OTHERS: Metric = Metric {
    key: "others_cpu_percent",
    title: "CPU of others, %",
    of: |run| {
        let (first, last) = (run.usage.first()?, run.usage.last()?);
        let used_us = last.others_cpu_us.saturating_sub(first.others_cpu_us);
        Some(100.0 * used_us as f64 / last.at_us.saturating_sub(first.at_us).max(1) as f64)
    },
};

/// From the command to its end.
pub const TOTAL: Metric = Metric {
    key: "total_s",
    title: "migration, s",
    of: |run| run.movement.as_ref().map(|movement| movement.total_us as f64 / 1e6),
};
/// How often memory was sent.
pub const ROUNDS: Metric = Metric {
    key: "rounds",
    title: "rounds",
    of: |run| run.movement.as_ref().map(|movement| movement.rounds as f64),
};
/// What went over the network.
pub const SENT: Metric = Metric {
    key: "sent_mib",
    title: "sent, MiB",
    of: |run| run.movement.as_ref().map(|movement| movement.bytes_sent as f64 / MIB),
};
/// What one answer of a hundred takes longer than.
pub const LATENCY_99: Metric =
    Metric { key: "p99_ms", title: "latency 99 %, ms", of: |run| latency(run, |of| of.p99_us) };
/// The source's CPU time compared with what it sent.
pub const SOURCE_CPU_PER_GIB: Metric = Metric {
    key: "source_cpu_s_per_gib",
    title: "  of it for each GiB sent",
    of: |run| Some((SOURCE_CPU.of)(run)? / (run.movement.as_ref()?.bytes_sent.max(1) as f64 / MIB / 1024.0)),
};
/// How much the kernel takes at once.
pub const SEND_KIB: Metric = Metric {
    key: "send_kib",
    title: "KiB in each send",
    of: |run| {
        let movement = run.movement.as_ref()?;
        let sends = movement.report.get("sends")?.as_f64()?;
        (sends > 0.0).then(|| movement.bytes_sent as f64 / 1024.0 / sends)
    },
};
/// The sends that the kernel copied although it was asked not to.
pub const COPIED: Metric = Metric {
    key: "zerocopy_copied_percent",
    title: "zero-copy sends copied, %",
    of: |run| {
        zero_copy_sends(run).filter(|(asked, _)| *asked > 0.0).map(|(asked, copied)| 100.0 * copied / asked)
    },
};
/// What the server takes for an answer while its writes are tracked.
pub const SERVER_CPU: Metric = Metric {
    key: "server_us_per_answer",
    title: "server CPU per answer, µs",
    of: |run| cost::meanwhile(run).map(|cost| cost.us_per_answer),
};
/// What it takes more than without tracking.
pub const SERVER_CPU_MORE: Metric = Metric {
    key: "server_more_percent",
    title: "  more than before, %",
    of: |run| {
        let (meanwhile, otherwise) = (cost::meanwhile(run)?, cost::otherwise(run)?);
        Some(100.0 * (meanwhile.us_per_answer / otherwise.us_per_answer - 1.0))
    },
};
/// The same for each page that was found written.
pub const PAGE_COST: Metric = Metric {
    key: "server_us_per_page",
    title: "  more per page written, µs",
    of: |run| {
        let pages = written(run)?;
        let (meanwhile, otherwise) = (cost::meanwhile(run)?, cost::otherwise(run)?);
        let more_us = (meanwhile.us_per_answer - otherwise.us_per_answer) * meanwhile.answers;
        (pages > 0.0).then(|| more_us / pages)
    },
};
/// How long one search for written pages takes.
pub const ROUND: Metric = Metric {
    key: "track_round_ms",
    title: "finding written pages, ms",
    of: |run| {
        let rounds = run.tracking.as_ref()?.intervals.iter().map(|interval| interval.round_us as f64 / 1e3);
        Summary::of(rounds).map(|rounds| rounds.median)
    },
};

/// Every metric, in the order of tables.
pub const ALL: [Metric; 28] = [
    GAP,
    BLACKOUT,
    Metric { key: "dump_ms", title: "  of it dump, ms", of: |run| part(run, "dump") },
    Metric { key: "transfer_ms", title: "  of it transfer, ms", of: |run| part(run, "transfer") },
    RESTORE,
    TOTAL,
    ROUNDS,
    SENT,
    SEND_KIB,
    COPIED,
    Metric {
        key: "answers_per_s",
        title: "answers/s before",
        of: |run| asked(run).then(|| rate_before(&run.load)),
    },
    SPREAD,
    THROUGHPUT,
    Metric { key: "p50_ms", title: "latency 50 %, ms", of: |run| latency(run, |of| of.p50_us) },
    LATENCY_99,
    Metric { key: "p999_ms", title: "latency 99.9 %, ms", of: |run| latency(run, |of| of.p999_us) },
    Metric {
        key: "lateness_p99_ms",
        title: "client late by 99 %, ms",
        of: |run| (run.load.lateness.max_us > 0).then(|| run.load.lateness.p99_us as f64 / 1e3),
    },
    ROUND,
    Metric {
        key: "written_pages_per_s",
        title: "pages written per s",
        of: |run| {
            let us: u64 = run.tracking.as_ref()?.intervals.iter().map(|interval| interval.duration_us).sum();
            Some(written(run)? * 1e6 / us.max(1) as f64)
        },
    },
    SERVER_CPU,
    SERVER_CPU_MORE,
    PAGE_COST,
    SOURCE_CPU,
    SOURCE_CPU_PER_GIB,
    DESTINATION_CPU,
    DESTINATION_MEMORY,
    HARMED,
    OTHERS,
];

impl Metric {
    /// Over all runs of a cell; `None` if none has it.
    pub fn summary(&self, cell: &Cell) -> Option<Summary> {
        Summary::of(cell.runs.iter().filter_map(self.of))
    }
}

/// Whether clients asked anything.
fn asked(run: &Run) -> bool {
    run.load.reads + run.load.writes > 0
}

/// Sends that asked for no copy, and those that the kernel copied.
pub fn zero_copy_sends(run: &Run) -> Option<(f64, f64)> {
    let zero_copy = run.movement.as_ref()?.report.get("zerocopy")?;
    zero_copy.get("sends")?.as_f64().zip(zero_copy.get("copied")?.as_f64())
}

/// Pages that were found written by tracking only; a page counts once for each interval that it was written in.
fn written(run: &Run) -> Option<f64> {
    let intervals = &run.tracking.as_ref()?.intervals;
    Some(intervals.iter().map(|interval| interval.dirty_pages as f64).sum())
}

fn part(run: &Run, name: &str) -> Option<f64> {
    let parts = &run.movement.as_ref()?.blackout;
    parts.iter().find(|part| part.name == name).map(|part| part.us as f64 / 1e3)
}

/// A percentile from the start of the migration to its end.
fn latency(run: &Run, of: fn(&pclive_tests::load::Latency) -> u64) -> Option<f64> {
    asked(run).then(|| run.load.latency_since(MIGRATE).map(|latency| of(&latency) as f64 / 1e3)).flatten()
}
