//! Keeping the page streams of a migration to a rate.

use crate::policy::bandwidth::TokenBucket;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The rate limit, if there is one, that several page streams share.
#[derive(Clone, Debug)]
pub struct Pace {
    bucket: Arc<Mutex<Option<TokenBucket>>>,
    epoch: Instant,
}

impl Pace {
    /// At most `bytes_per_second` over all streams that have a clone of this; `None` is as fast as the network can.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        let pace = Self { bucket: Arc::default(), epoch: Instant::now() };
        pace.limit(bytes_per_second);
        pace
    }

    /// Another limit from now on.
    pub fn limit(&self, bytes_per_second: Option<u64>) {
        let now = self.epoch.elapsed();
        // Bursts of 20 ms: shorter ones would be at the mercy of the timer, longer ones be felt by the clients.
        let burst = |rate: u64| rate / 50;
        let mut bucket = self.lock();
        match (&mut *bucket, bytes_per_second) {
            (Some(bucket), Some(rate)) => bucket.change(rate, burst(rate), now),
            (_, rate) => *bucket = rate.map(|rate| TokenBucket::new(rate, burst(rate), now)),
        }
    }

    /// Sleeps until `bytes` may be sent; returns for how long.
    pub fn wait(&self, bytes: u64) -> Duration {
        let now = self.epoch.elapsed();
        let wait = self.lock().as_mut().map_or(Duration::ZERO, |bucket| bucket.take(bytes, now));
        if wait > Duration::ZERO {
            std::thread::sleep(wait);
        }
        wait
    }

    fn lock(&self) -> MutexGuard<'_, Option<TokenBucket>> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
