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
        // Bursts of 20 ms: shorter ones would be at the mercy of the timer, longer ones be felt by the clients.
        let bucket = bytes_per_second.map(|rate| TokenBucket::new(rate, rate / 50, Duration::ZERO));
        Self { bucket: Arc::new(Mutex::new(bucket)), epoch: Instant::now() }
    }

    /// No limit from now on.
    pub fn lift(&self) {
        *self.lock() = None;
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
