//! Keeping the page streams of a migration to a rate.

use crate::policy::bandwidth::TokenBucket;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A rate limit that several page streams share.
#[derive(Clone, Debug)]
pub struct Pace {
    bucket: Arc<Mutex<TokenBucket>>,
    epoch: Instant,
}

impl Pace {
    /// Limits to `bytes_per_second` over all streams that have a clone of this.
    pub fn new(bytes_per_second: u64) -> Self {
        // Bursts of 20 ms: shorter ones would be at the mercy of the timer, longer ones be felt by the clients.
        let bucket = TokenBucket::new(bytes_per_second, bytes_per_second / 50);
        Self { bucket: Arc::new(Mutex::new(bucket)), epoch: Instant::now() }
    }

    /// Sleeps until `bytes` may be sent; returns for how long.
    pub fn wait(&self, bytes: u64) -> Duration {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = bucket.take(bytes, self.epoch.elapsed());
        drop(bucket);
        if wait > Duration::ZERO {
            std::thread::sleep(wait);
        }
        wait
    }
}
