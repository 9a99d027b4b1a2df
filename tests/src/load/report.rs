//! What the load program reports.

use serde::{Deserialize, Serialize};

/// Everything a load has seen. Times are microseconds since [`Self::started_us`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoadReport {
    /// When the load started, on the machine's monotonic clock (µs).
    pub started_us: u64,
    /// How long it ran.
    pub duration_us: u64,
    /// How long writing the data set took before.
    pub fill_us: u64,
    /// Reads answered.
    pub reads: u64,
    /// Writes answered.
    pub writes: u64,
    /// The longest times without an answer on any connection, longest first.
    pub longest_gaps: Vec<Gap>,
    /// The longest time that a single connection was without an answer.
    pub worst_connection_gap: Gap,
    /// From when a request was due to its answer. In an open loop that does not omit the requests that could not be
    /// sent while the server was silent ("coordinated omission"); a closed loop sends none then.
    pub latency: Latency,
    /// All latencies: the steps of an HDR histogram that have answers, with three digits.
    pub latency_counts: Vec<LatencyCount>,
    /// The latencies from the start to the first mark, from there to the next, and so on to the end.
    pub stretches: Vec<Stretch>,
    /// How much later than due requests were sent, because this client was late. Always 0 in a closed loop.
    pub lateness: Latency,
    /// Answers in each 10 ms.
    pub throughput_10ms: Vec<u32>,
    /// Answers that were wrong, also while all keys were read back at the end.
    pub wrong_answers: u64,
    /// What was wrong with the first of them.
    pub first_wrong_answers: Vec<String>,
    /// Requests without an answer at the end.
    pub unanswered: u64,
    /// Connections that broke.
    pub broken_connections: Vec<BrokenConnection>,
    /// Keys that were read back at the end.
    pub verified_keys: u64,
    /// Moments that were named while the load ran.
    pub marks: Vec<Mark>,
}

/// A time without an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// When the last answer before it came.
    pub start_us: u64,
    /// How long it was.
    pub duration_us: u64,
}

/// Percentiles of latency in microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Latency {
    /// Half are as fast.
    pub p50_us: u64,
    /// 90 of 100 are as fast.
    pub p90_us: u64,
    /// 99 of 100 are as fast.
    pub p99_us: u64,
    /// 999 of 1000 are as fast.
    pub p999_us: u64,
    /// The slowest.
    pub max_us: u64,
}

/// Answers of about the same latency.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct LatencyCount {
    /// The latency in microseconds.
    pub us: u64,
    /// How many answers had it.
    pub answers: u64,
}

/// The latencies between two marks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Stretch {
    /// The mark that it starts with; empty for the start of the load.
    pub since: String,
    /// Answers in it.
    pub answers: u64,
    /// Their latencies.
    pub latency: Latency,
}

/// A connection that broke.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BrokenConnection {
    /// Its number.
    pub connection: usize,
    /// When.
    pub at_us: u64,
    /// What the socket said.
    pub error: String,
}

/// A moment that was named.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Mark {
    /// Its name.
    pub name: String,
    /// When.
    pub at_us: u64,
}

impl LoadReport {
    /// What is wrong with the answers and connections; `None` if nothing is.
    pub fn complaint(&self) -> Option<String> {
        if self.wrong_answers > 0 {
            return Some(format!(
                "{} wrong answers: {}",
                self.wrong_answers,
                self.first_wrong_answers.join("; ")
            ));
        }
        if let Some(BrokenConnection { connection, at_us, error }) = self.broken_connections.first() {
            let count = self.broken_connections.len();
            return Some(format!("{count} broken connections: {connection} at {at_us} µs: {error}"));
        }
        (self.unanswered > 0).then(|| format!("{} requests were never answered", self.unanswered))
    }

    /// When `name` was marked first.
    pub fn mark_us(&self, name: &str) -> Option<u64> {
        self.marks.iter().find(|mark| mark.name == name).map(|mark| mark.at_us)
    }

    /// The latencies from a mark to the next one.
    pub fn latency_since(&self, mark: &str) -> Option<Latency> {
        self.stretches.iter().find(|stretch| stretch.since == mark).map(|stretch| stretch.latency)
    }

    /// The longest time without an answer.
    pub fn longest_gap(&self) -> Gap {
        self.longest_gaps.first().copied().unwrap_or_default()
    }

    /// Answers per second between two times, counted in whole 10 ms.
    pub fn rate_between(&self, start_us: u64, end_us: u64) -> f64 {
        let bucket = |us: u64| ((us / 10_000) as usize).min(self.throughput_10ms.len());
        let (start, end) = (bucket(start_us), bucket(end_us));
        let answers: u64 =
            self.throughput_10ms[start..end.max(start)].iter().map(|count| u64::from(*count)).sum();
        answers as f64 * 100.0 / (end.saturating_sub(start)).max(1) as f64
    }
}
