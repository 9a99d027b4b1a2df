//! How long measurements take, roughly.

use std::time::{Duration, Instant};

use super::matrix::{Mover, Setting, TRACK};

/// What one measurement takes besides filling, reading back, moving and the margins.
const OVERHEAD_S: f64 = 3.0;
/// MiB that are written to or read from the server in a second.
const FILL_MIB_PER_S: f64 = 600.0;
/// MiB in a second on a link that is not shaped.
const UNSHAPED_MIB_PER_S: f64 = 800.0;
/// How long a migration takes, as a multiple of the time in which the link carries the memory once: three for large memory under
/// load, one if it is idle. A control takes as long as what it is compared with.
const LINK_TIMES: f64 = 2.0;

/// How long one measurement takes, with load for `margin` before and after.
pub fn expected(setting: &Setting, mover: &Mover, margin: Duration) -> Duration {
    let mib = setting.data_mib as f64;
    let link = setting.rate_mbit as f64 / 8.0 * 1e6 / f64::from(1 << 20);
    let speed = if link > 0.0 { link.min(UNSHAPED_MIB_PER_S) } else { UNSHAPED_MIB_PER_S };
    let middle = match mover {
        Mover::Track { .. } => TRACK.as_secs_f64(),
        _ => LINK_TIMES * mib / speed,
    };
    Duration::from_secs_f64(OVERHEAD_S + 2.0 * mib / FILL_MIB_PER_S + middle) + 2 * margin
}

/// Tells on the standard error how far it is. What is left is estimated by how the estimates of what is done were wrong.
pub struct Progress {
    begin: Instant,
    done: Vec<Duration>,
    left: Vec<Duration>,
}

impl Progress {
    /// `left` are the measurements to be made, in their order.
    pub fn new(mut left: Vec<Duration>) -> Self {
        left.reverse();
        Self { begin: Instant::now(), done: Vec::new(), left }
    }

    /// The next one begins.
    pub fn next(&mut self, setting: &str, mover: &str, turn: usize) {
        let minutes = (self.left().as_secs_f64() / 60.0).ceil();
        self.done.extend(self.left.pop());
        let (number, all) = (self.done.len(), self.done.len() + self.left.len());
        eprintln!("[{number}/{all}, about {minutes:.0} min left] {setting}: {mover}, turn {turn}");
    }

    fn left(&self) -> Duration {
        let (done, left): (Duration, Duration) = (self.done.iter().sum(), self.left.iter().sum());
        match done.is_zero() {
            true => left,
            false => left.mul_f64(self.begin.elapsed().as_secs_f64() / done.as_secs_f64()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_weighed_by_what_it_is_expected_to_take() {
        let seconds = |all: &[u64]| all.iter().copied().map(Duration::from_secs).collect();
        let mut progress = Progress::new(seconds(&[10, 20, 300]));
        assert_eq!(progress.left(), Duration::from_secs(330));
        progress.next("small", "a", 1);
        progress.next("small", "b", 1);
        // Twice as long as expected.
        progress.begin -= Duration::from_secs(60);
        let left = progress.left().as_secs();
        assert!((600..610).contains(&left), "{left} s");
    }
}
