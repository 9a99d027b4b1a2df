//! What pclive is to reach, and whether it does.

use super::matrix::{Mode, Mover, Setting, Workload};
use super::metrics::{self, Metric};
use super::results::{Cell, Measured};

/// The restore time at 1 GiB as a multiple of that at 128 MiB.
const RESTORE_GROWTH: f64 = 1.5;

/// A limit for a metric.
#[derive(Debug, Clone, Copy)]
pub struct Goal {
    /// Which number.
    pub metric: Metric,
    /// Its limit.
    pub limit: Limit,
}

/// On which side of a number one wants to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// Below it.
    Under(f64),
    /// Not below it.
    AtLeast(f64),
}

impl Limit {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::Under(limit) => value < limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }

    /// The number.
    pub fn value(self) -> f64 {
        let (Self::Under(value) | Self::AtLeast(value)) = self;
        value
    }
}

/// The goals of a cell. They are for the default mode on 1 Gbit/s links, at the sizes and loads that they were set for;
/// that no client is harmed is for every cell.
pub fn goals(setting: &Setting, mover: &Mover) -> Vec<Goal> {
    let under = |metric, limit| Goal { metric, limit: Limit::Under(limit) };
    let mut goals = vec![under(metrics::HARMED, 1.0)];
    if *mover != Mover::mode(Mode::PcliveG) || setting.rate_mbit != 1_000 {
        return goals;
    }
    goals.push(under(metrics::RESTORE, 15.0));
    goals.push(under(metrics::DESTINATION_MEMORY, 64.0));
    if (setting.data_mib, setting.connections, setting.open_loop) != (1024, 16, None) {
        return goals;
    }
    match (setting.workload, setting.hot_mib) {
        (Workload::Redis90, None) => goals.push(under(metrics::GAP, 150.0)),
        (Workload::Redis10, Some(10)) => goals.push(under(metrics::GAP, 400.0)),
        _ => return goals,
    }
    goals.push(Goal { metric: metrics::THROUGHPUT, limit: Limit::AtLeast(85.0) });
    goals
}

/// A line for each goal of a cell that has measurements: how many of them are within it.
pub fn verdicts(setting: &Setting, cell: &Cell) -> Vec<String> {
    let mut verdicts = Vec::new();
    for Goal { metric, limit } in goals(setting, &cell.mover) {
        let values: Vec<f64> = cell.runs.iter().filter_map(metric.of).collect();
        let met = values.iter().filter(|value| limit.is_met(**value)).count();
        let wanted = match limit {
            Limit::Under(limit) => format!("< {limit}"),
            Limit::AtLeast(limit) => format!(">= {limit}"),
        };
        let all_met = met == values.len();
        // That nobody was harmed is worth a line only if somebody was: every cell has this goal.
        let obvious = all_met && metric.key == metrics::HARMED.key;
        if !values.is_empty() && !obvious {
            let verdict = if all_met { "met" } else { "MISSED" };
            let (name, count, what) = (&cell.name, values.len(), metric.title.trim());
            verdicts.push(format!("{name}: {what} {wanted}: {verdict} ({met} of {count} runs)"));
        }
    }
    verdicts
}

/// How restoring grows with the data set: the goal that needs two settings.
pub fn restore_growth(groups: &[Measured]) -> Option<String> {
    let median = |mib| {
        let setting = Setting::new(Workload::Redis90, mib, 1_000);
        let group = groups.iter().find(|group| group.setting == setting)?;
        let cell = group.cells.iter().find(|cell| cell.mover == Mover::mode(Mode::PcliveG))?;
        metrics::RESTORE.summary(cell).map(|summary| summary.median)
    };
    let growth = median(1024)? / median(128)?;
    let verdict = if growth <= RESTORE_GROWTH { "met" } else { "MISSED" };
    Some(format!("restore at 1 GiB <= {RESTORE_GROWTH} times that at 128 MiB: {verdict} ({growth:.2} times)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_belong_to_the_settings_they_were_set_for() {
        let base = Setting::new(Workload::Redis90, 1024, 1_000);
        let limit = |setting: &Setting, mover: &Mover, metric: Metric| {
            goals(setting, mover)
                .into_iter()
                .find(|goal| goal.metric.key == metric.key)
                .map(|goal| goal.limit)
        };
        let default = Mover::mode(Mode::PcliveG);
        assert_eq!(limit(&base, &default, metrics::GAP), Some(Limit::Under(150.0)));
        assert_eq!(limit(&base, &Mover::mode(Mode::OneShot), metrics::GAP), None);
        assert_eq!(limit(&base.clone().hot(10), &default, metrics::GAP), None);
        let write_heavy = Setting::new(Workload::Redis10, 1024, 1_000).hot(10);
        assert_eq!(limit(&write_heavy, &default, metrics::GAP), Some(Limit::Under(400.0)));
        assert_eq!(limit(&write_heavy, &Mover::Control, metrics::HARMED), Some(Limit::Under(1.0)));
    }
}
