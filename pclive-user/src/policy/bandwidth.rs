//! How fast pages go, and how fast they may go.

use std::time::Duration;

/// Bytes per second over the last few observations, the newest counting most.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bandwidth {
    bytes_per_second: Option<f64>,
}

impl Bandwidth {
    /// How much of the estimate the newest observation of full weight makes up.
    const NEWEST: f64 = 0.5;
    /// Shorter observations measure the socket buffer rather than the network, and count less.
    const FULL_WEIGHT: Duration = Duration::from_millis(50);

    /// Takes in that `bytes` were sent and applied within `time`. An observation of nothing says nothing.
    pub fn observe(&mut self, bytes: u64, time: Duration) {
        if bytes == 0 || time.is_zero() {
            return;
        }
        let rate = bytes as f64 / time.as_secs_f64();
        let weight = Self::NEWEST * (time.as_secs_f64() / Self::FULL_WEIGHT.as_secs_f64()).min(1.0);
        let mix = |old: f64| old + (rate - old) * weight;
        self.bytes_per_second = Some(self.bytes_per_second.map_or(rate, mix));
    }

    /// The estimate, once there was an observation.
    pub fn bytes_per_second(&self) -> Option<f64> {
        self.bytes_per_second
    }

    /// How long `bytes` would take.
    pub fn time_for(&self, bytes: u64) -> Option<Duration> {
        let seconds = bytes as f64 / self.bytes_per_second?;
        Some(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
    }
}

/// A token bucket: how long a sender must wait to keep to a rate.
#[derive(Clone, Copy, Debug)]
pub struct TokenBucket {
    bytes_per_second: f64,
    burst: f64,
    /// Bytes that may go now; negative while the sender waits for what it has sent already.
    tokens: f64,
    refilled: Duration,
}

impl TokenBucket {
    /// A bucket for `bytes_per_second` (at least 1), which lets bursts of `burst` bytes through and is full at the time
    /// `now`, since any fixed moment.
    pub fn new(bytes_per_second: u64, burst: u64, now: Duration) -> Self {
        let burst = burst as f64;
        Self { bytes_per_second: bytes_per_second.max(1) as f64, burst, tokens: burst, refilled: now }
    }

    /// Takes `bytes` at the time `now`; the sender has to wait as long as returned before it sends them. Waits of several
    /// senders add up, so the rate is kept over all of them.
    pub fn take(&mut self, bytes: u64, now: Duration) -> Duration {
        let passed = now.saturating_sub(self.refilled).as_secs_f64();
        self.refilled = self.refilled.max(now);
        self.tokens = (self.tokens + passed * self.bytes_per_second).min(self.burst);
        self.tokens -= bytes as f64;
        let seconds = (-self.tokens).max(0.0) / self.bytes_per_second;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_estimate_follows_the_network() {
        let mut bandwidth = Bandwidth::default();
        assert_eq!(bandwidth.time_for(1), None);
        bandwidth.observe(0, MS);
        bandwidth.observe(1, Duration::ZERO);
        assert_eq!(bandwidth.bytes_per_second(), None);

        bandwidth.observe(1_000_000, 100 * MS);
        assert_eq!(bandwidth.bytes_per_second(), Some(1e7));
        assert_eq!(bandwidth.time_for(100_000), Some(10 * MS));
        // A short burst into the socket buffer hardly counts; a full observation does.
        bandwidth.observe(1_000_000, MS);
        assert!(bandwidth.bytes_per_second().unwrap() < 2.1e7);
        for _ in 0..10 {
            bandwidth.observe(500_000, 100 * MS);
        }
        assert!((bandwidth.bytes_per_second().unwrap() - 5e6).abs() < 1e5);
    }

    #[test]
    fn a_bucket_keeps_the_rate() {
        let mut bucket = TokenBucket::new(1000, 100, Duration::ZERO);
        for (bytes, now_ms, wait_ms) in [
            (100, 0, 0),    // the burst
            (50, 0, 50),    // has to be earned
            (50, 0, 100),   // by two senders at once
            (10, 100, 10),  // just paid off
            (100, 1000, 0), // full again, but no more than the burst
            (1, 1000, 1),
        ] {
            assert_eq!(bucket.take(bytes, now_ms * MS), wait_ms * MS, "{bytes} bytes at {now_ms} ms");
        }
    }
}
