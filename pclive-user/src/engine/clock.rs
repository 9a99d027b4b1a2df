//! The clock of one side of a migration.

use pclive_wire::phase::{Phase, PhaseLog, Side};
use std::time::Instant;

/// Microseconds since this side's migration began, and the log of its phases.
#[derive(Debug)]
pub struct Clock {
    start: Instant,
    log: PhaseLog,
}

impl Clock {
    /// Starts at 0.
    pub fn start(side: Side) -> Self {
        Self { start: Instant::now(), log: PhaseLog::new(side) }
    }

    /// Now, in microseconds.
    pub fn now_us(&self) -> i64 {
        self.start.elapsed().as_micros() as i64
    }

    /// Ends the current phase and begins `name`.
    pub fn enter(&mut self, name: &str) {
        tracing::debug!(phase = name);
        let now = self.now_us();
        self.log.enter(name, now);
    }

    /// Ends the current phase.
    pub fn leave(&mut self) {
        let now = self.now_us();
        self.log.leave(now);
    }

    /// The phases that have ended.
    pub fn phases(&self) -> &[Phase] {
        self.log.phases()
    }
}
