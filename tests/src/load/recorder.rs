//! Counts answers while the load runs.

use hdrhistogram::Histogram;

use super::report::{BrokenConnection, Gap, Latency, LatencyCount, LoadReport, Mark, Stretch};

/// How many of the longest gaps are kept.
const KEPT_GAPS: usize = 100;
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
    /// Latencies since the last mark, or the start.
    latency: Histogram<u64>,
    /// Those from the start or a mark to the next one.
    earlier: Vec<(String, Histogram<u64>)>,
    /// How late requests were sent.
    lateness: Histogram<u64>,
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
            latency: histogram(),
            earlier: Vec::new(),
            lateness: histogram(),
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

    /// A request was handed to its connection.
    pub(super) fn sent(&mut self, due_us: u64, now_us: u64) {
        self.lateness.saturating_record(now_us.saturating_sub(due_us));
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
        self.end_stretch();
        self.marks.push(Mark { name, at_us: now_us.saturating_sub(self.started_us) });
    }

    /// Latencies count for what comes after the newest mark from now on.
    fn end_stretch(&mut self) {
        let since = self.marks.last().map(|mark| mark.name.clone()).unwrap_or_default();
        self.earlier.push((since, std::mem::replace(&mut self.latency, histogram())));
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
        mut self,
        stopped_us: u64,
        fill_us: u64,
        unanswered: u64,
        verified_keys: u64,
    ) -> LoadReport {
        self.end_stretch();
        let mut all = histogram();
        for (_, stretch) in &self.earlier {
            all.add(stretch).expect("both have the same range");
        }
        let counts = all.iter_recorded();
        LoadReport {
            started_us: self.started_us,
            duration_us: stopped_us - self.started_us,
            fill_us,
            reads: self.reads,
            writes: self.writes,
            worst_connection_gap: self.worst_connection_gap,
            latency: latency(&all),
            latency_counts: counts
                .map(|count| LatencyCount { us: count.value_iterated_to(), answers: count.count_at_value() })
                .collect(),
            stretches: self
                .earlier
                .into_iter()
                .map(|(since, stretch)| Stretch { since, answers: stretch.len(), latency: latency(&stretch) })
                .collect(),
            lateness: latency(&self.lateness),
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

fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(MAX_LATENCY_US, 3).expect("3 digits up to an hour")
}

fn latency(of: &Histogram<u64>) -> Latency {
    let at = |quantile| of.value_at_quantile(quantile);
    Latency { p50_us: at(0.5), p90_us: at(0.9), p99_us: at(0.99), p999_us: at(0.999), max_us: of.max() }
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

    #[test]
    fn latencies_count_from_mark_to_mark_and_in_all() {
        let mut recorder = Recorder::new(1, 0);
        recorder.start(0);
        recorder.answered(0, false, 900, 1_000);
        recorder.mark("moving".into(), 1_500);
        recorder.sent(1_500, 1_530);
        recorder.answered(0, true, 1_500, 2_000);
        recorder.answered(0, true, 1_900, 2_400);
        let report = recorder.report(3_000, 0, 0, 0);
        let stretches: Vec<_> =
            report.stretches.iter().map(|stretch| (stretch.since.as_str(), stretch.answers)).collect();
        assert_eq!(stretches, [("", 1), ("moving", 2)]);
        assert_eq!((report.stretches[0].latency.max_us, report.stretches[1].latency.max_us), (100, 500));
        assert_eq!(report.latency_since("moving").map(|latency| latency.p50_us), Some(500));
        let counts: Vec<_> = report.latency_counts.iter().map(|count| (count.us, count.answers)).collect();
        assert_eq!(counts, [(100, 1), (500, 2)]);
        assert_eq!(report.lateness.max_us, 30);
    }
}
