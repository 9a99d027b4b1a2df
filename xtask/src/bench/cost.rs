//! What the server pays for its answers.
//!
//! Tracking a container costs it a fault for each page that it writes. Throughput does not tell how much that is: clients
//! and tracker compete with the server for the processors. The server's own processor time for each answer does.

use super::results::Run;
use super::usage::Sample;
use crate::experiment::migration_span_us;

/// A stretch of the load.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Answers in it.
    pub answers: f64,
    /// The server's processor time for each of them.
    pub us_per_answer: f64,
}

/// While the container was tracked: up to the blackout, if it was moved.
pub fn meanwhile(run: &Run) -> Option<Cost> {
    let (start_us, end_us) = migration_span_us(&run.load);
    let end_us = match &run.movement {
        // A single round is the blackout itself.
        Some(movement) if movement.rounds < 2 => return None,
        Some(_) => run.frozen_us()?,
        None => end_us,
    };
    cost(&[stretch(run, (start_us, end_us))?])
}

/// Before, and after if it stayed where it was.
pub fn otherwise(run: &Run) -> Option<Cost> {
    let (start_us, end_us) = migration_span_us(&run.load);
    let before = stretch(run, (0, start_us))?;
    match run.movement {
        Some(_) => cost(&[before]),
        None => cost(&[before, stretch(run, (end_us, run.load.duration_us))?]),
    }
}

/// The server's processor time in µs and its answers, from the first sample in a span of the load to the last one.
fn stretch(run: &Run, (from_us, to_us): (u64, u64)) -> Option<(f64, f64)> {
    let at = |sample: &Sample| sample.at_us.checked_sub(run.load.started_us);
    let inside = |sample: &&Sample| at(sample).is_some_and(|at_us| (from_us..=to_us).contains(&at_us));
    let mut samples = run.usage.iter().filter(inside);
    let (first, last) = (samples.next()?, samples.next_back()?);
    let (first_us, last_us) = (at(first)?, at(last)?);
    let seconds = (last_us - first_us) as f64 / 1e6;
    let cpu_us = last.source.container.cpu_us.saturating_sub(first.source.container.cpu_us);
    Some((cpu_us as f64, run.load.rate_between(first_us, last_us) * seconds))
}

fn cost(stretches: &[(f64, f64)]) -> Option<Cost> {
    let cpu_us: f64 = stretches.iter().map(|stretch| stretch.0).sum();
    let answers: f64 = stretches.iter().map(|stretch| stretch.1).sum();
    (answers > 0.0).then(|| Cost { answers, us_per_answer: cpu_us / answers })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_are_summed_up_before_they_are_divided() {
        let expected = Cost { answers: 400.0, us_per_answer: 7.5 };
        assert_eq!(cost(&[(1_000.0, 100.0), (2_000.0, 300.0)]), Some(expected));
        assert_eq!(cost(&[(10.0, 0.0)]), None, "an idle server has no cost of an answer");
    }
}
