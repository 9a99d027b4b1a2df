//! Counts answers while the load runs.

use hdrhistogram::Histogram;

use super::report::{BrokenConnection, Gap, Latency, LoadReport, Mark};

/// How many of the longest gaps are kept.
const KEPT_GAPS: usize = 5;
/// How many wrong answers are described.
const DESCRIBED_WRONG_ANSWERS: usize = 20;
/// The width of a throughput interval.
const INTERVAL_US: u64 = 10_000;
/// The longest latency that is told apart from longer ones: an hour.
const MAX_LATENCY_US: u64 = 3_600_000_000;

#[derive(Debug)]
pub(super) struct Recorder {
    started_us: u64,
    last_answer_us: u64,
    last_answers_us: Vec<u64>,
    reads: u64,
    writes: u64,
    longest_gaps: Vec<Gap>,
    worst_connection_gap: Gap,
    latency: Histogram<u64>,
    throughput: Vec<u32>,
    wrong_answers: u64,
    first_wrong_answers: Vec<String>,
    broken_connections: Vec<BrokenConnection>,
    marks: Vec<Mark>,
}

impl Recorder {
    pub(super) fn new(connections: usize, now_us: u64) -> Self {
        Self {
            started_us: now_us,
            last_answer_us: now_us,
            last_answers_us: vec![now_us; connections],
            reads: 0,
            writes: 0,
            longest_gaps: Vec::new(),
            worst_connection_gap: Gap::default(),
            latency: Histogram::new_with_max(MAX_LATENCY_US, 3).expect("3 digits up to an hour"),
            throughput: Vec::new(),
            wrong_answers: 0,
            first_wrong_answers: Vec::new(),
            broken_connections: Vec::new(),
            marks: Vec::new(),
        }
    }

    /// The load starts now: what was before it is no gap.
    pub(super) fn start(&mut self, now_us: u64) {
        self.started_us = now_us;
        self.last_answer_us = now_us;
        self.last_answers_us.fill(now_us);
    }

    pub(super) fn last_answer_us(&self) -> u64 {
        self.last_answer_us
    }

    pub(super) fn answered(&mut self, connection: usize, write: bool, due_us: u64, now_us: u64) {
        *if write { &mut self.writes } else { &mut self.reads } += 1;
        self.latency.saturating_record(now_us - due_us);
        let interval = ((now_us - self.started_us) / INTERVAL_US) as usize;
        if interval >= self.throughput.len() {
            self.throughput.resize(interval + 1, 0);
        }
        self.throughput[interval] += 1;
        self.close_gap(now_us);
        self.close_connection_gap(connection, now_us);
    }

    pub(super) fn wrong(&mut self, what: String) {
        self.wrong_answers += 1;
        if self.first_wrong_answers.len() < DESCRIBED_WRONG_ANSWERS {
            self.first_wrong_answers.push(what);
        }
    }

    pub(super) fn broken(&mut self, connection: usize, error: &std::io::Error, now_us: u64) {
        let at_us = now_us - self.started_us;
        self.broken_connections.push(BrokenConnection { connection, at_us, error: error.to_string() });
    }

    pub(super) fn mark(&mut self, name: String, now_us: u64) {
        self.marks.push(Mark { name, at_us: now_us.saturating_sub(self.started_us) });
    }

    /// The load ends: whoever has waited until now has a gap that is at least so long.
    pub(super) fn stop(&mut self, now_us: u64) {
        self.close_gap(now_us);
        (0..self.last_answers_us.len()).for_each(|connection| self.close_connection_gap(connection, now_us));
    }

    fn close_gap(&mut self, now_us: u64) {
        let gap = Gap {
            start_us: self.last_answer_us - self.started_us,
            duration_us: now_us - std::mem::replace(&mut self.last_answer_us, now_us),
        };
        let rank = self.longest_gaps.partition_point(|longer| longer.duration_us >= gap.duration_us);
        if rank < KEPT_GAPS {
            self.longest_gaps.insert(rank, gap);
            self.longest_gaps.truncate(KEPT_GAPS);
        }
    }

    fn close_connection_gap(&mut self, connection: usize, now_us: u64) {
        let last_us = std::mem::replace(&mut self.last_answers_us[connection], now_us);
        if now_us - last_us > self.worst_connection_gap.duration_us {
            self.worst_connection_gap =
                Gap { start_us: last_us - self.started_us, duration_us: now_us - last_us };
        }
    }

    /// The report of a load that was stopped at `stopped_us`.
    pub(super) fn report(
        self,
        stopped_us: u64,
        fill_us: u64,
        unanswered: u64,
        verified_keys: u64,
    ) -> LoadReport {
        let at = |quantile| self.latency.value_at_quantile(quantile);
        LoadReport {
            started_us: self.started_us,
            duration_us: stopped_us - self.started_us,
            fill_us,
            reads: self.reads,
            writes: self.writes,
            worst_connection_gap: self.worst_connection_gap,
            latency: Latency {
                p50_us: at(0.5),
                p90_us: at(0.9),
                p99_us: at(0.99),
                p999_us: at(0.999),
                max_us: self.latency.max(),
            },
            longest_gaps: self.longest_gaps,
            throughput_10ms: self.throughput,
            wrong_answers: self.wrong_answers,
            first_wrong_answers: self.first_wrong_answers,
            unanswered,
            broken_connections: self.broken_connections,
            verified_keys,
            marks: self.marks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_between_answers_and_up_to_the_end() {
        let mut recorder = Recorder::new(2, 0);
        recorder.start(1_000);
        for (connection, at_us) in [(0, 2_000), (1, 2_500), (0, 30_000), (0, 31_000)] {
            recorder.answered(connection, false, at_us - 100, at_us);
        }
        recorder.stop(41_000);
        let report = recorder.report(41_000, 0, 0, 0);
        assert_eq!(report.longest_gap(), Gap { start_us: 1_500, duration_us: 27_500 });
        assert_eq!(report.longest_gaps[1], Gap { start_us: 30_000, duration_us: 10_000 });
        assert_eq!(report.worst_connection_gap, Gap { start_us: 1_500, duration_us: 38_500 });
        assert_eq!(report.throughput_10ms, [2, 0, 1, 1]);
        assert_eq!(report.latency.max_us, 100);
        assert!((report.rate_between(0, 20_000) - 100.0).abs() < f64::EPSILON);
    }
}
