//! Everything that was measured.

use anyhow::{Result, ensure};
use pclive_tests::load::LoadReport;
use pclive_tests::pclive::TrackReport;
use serde::{Deserialize, Serialize};

use super::ablation::Ablation;
use super::matrix::{Group, Mover, Setting};
use super::movement::Movement;
use super::provenance::Provenance;
use super::usage::Sample;
use crate::experiment::blackout_start_us;

/// One invocation of the benchmark.
#[derive(Debug, Serialize, Deserialize)]
pub struct Results {
    /// Where and how.
    pub provenance: Provenance,
    /// A setting each.
    pub groups: Vec<Measured>,
    /// The questions that they answer.
    #[serde(default)]
    pub ablations: Vec<Ablation>,
}

/// All that was measured in a setting.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measured {
    /// The setting.
    pub setting: Setting,
    /// Its name.
    pub name: String,
    /// One for each mover, and one for the control at the end.
    pub cells: Vec<Cell>,
}

/// A mover in a setting.
#[derive(Debug, Serialize, Deserialize)]
pub struct Cell {
    /// Who moves the container.
    pub mover: Mover,
    /// Its name.
    pub name: String,
    /// Why it is not measured here.
    pub obstacle: Option<String>,
    /// What was measured.
    pub runs: Vec<Run>,
    /// Runs in which the container did not move, with what was said.
    pub failures: Vec<String>,
}

/// One measurement.
#[derive(Debug, Serialize, Deserialize)]
pub struct Run {
    /// The turn it was in, from 1.
    pub turn: usize,
    /// The migration; the control has none.
    pub movement: Option<Movement>,
    /// What was found by tracking only.
    #[serde(default)]
    pub tracking: Option<TrackReport>,
    /// What the clients saw.
    pub load: LoadReport,
    /// CPU time and memory at both ends.
    pub usage: Vec<Sample>,
}

impl Results {
    /// Takes over what an invocation that was broken off has measured of the same.
    ///
    /// # Errors
    /// When it was to measure something else, or measured other sources or on another machine: no picture shows both.
    pub fn go_on_from(&mut self, earlier: Results) -> Result<()> {
        let (now, then) = (&self.provenance, &earlier.provenance);
        ensure!(
            now.invocation() == then.invocation(),
            "the results are of another command: resume {:?} with its own options, or choose another --out",
            then.command
        );
        ensure!(
            now.revision == then.revision && now.is_of_a_revision(),
            "the results are of revision {}, and this is {}: check that one out, without changes, to resume them",
            then.revision,
            now.revision
        );
        ensure!(
            (&now.kernel, &now.cpu, now.cpus) == (&then.kernel, &then.cpu, then.cpus),
            "the results are of another machine or kernel ({}, {} × {})",
            then.kernel,
            then.cpus,
            then.cpu
        );
        for (group, earlier) in self.groups.iter_mut().zip(earlier.groups) {
            for (cell, earlier) in group.cells.iter_mut().zip(earlier.cells) {
                cell.runs = earlier.runs;
            }
        }
        self.provenance = earlier.provenance;
        Ok(())
    }
}

impl Measured {
    /// Nothing measured yet; `obstacle` tells why a mover cannot be.
    pub fn new(group: &Group, obstacle: impl Fn(&Setting, &Mover) -> Option<String>) -> Self {
        let setting = group.setting.clone();
        let movers = group.movers.iter().cloned().chain([Mover::Control]);
        let cells = movers.map(|mover| Cell {
            name: mover.to_string(),
            obstacle: obstacle(&setting, &mover),
            mover,
            runs: Vec::new(),
            failures: Vec::new(),
        });
        let cells = cells.collect();
        Self { name: setting.to_string(), setting, cells }
    }

    /// Whether there is anything but the control to be measured in it.
    pub fn is_feasible(&self) -> bool {
        self.cells.iter().any(|cell| cell.mover != Mover::Control && cell.obstacle.is_none())
    }

    /// The cell of a mover, if it was measured.
    pub fn measured(&self, mover: &Mover) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.mover == *mover && !cell.runs.is_empty())
    }
}

impl Run {
    /// When the blackout began, as the load's report counts time.
    pub fn frozen_us(&self) -> Option<u64> {
        let movement = self.movement.as_ref()?;
        Some(blackout_start_us(&self.load, movement.frozen_us, movement.total_us))
    }

    fn tracker(&self) -> Option<&str> {
        let moved = self.movement.as_ref().map(|movement| movement.tracker.as_str());
        moved.or(self.tracking.as_ref().map(|tracking| tracking.tracker.as_str()))
    }
}

impl Cell {
    /// Whether it is to be measured in this turn: possible, and not done yet.
    pub fn is_due(&self, turn: usize) -> bool {
        self.obstacle.is_none() && self.runs.iter().all(|run| run.turn != turn)
    }

    /// What the mover's tracker was, if it was measured and has one.
    pub fn tracker(&self) -> Option<&str> {
        self.runs.iter().find_map(Run::tracker).filter(|tracker| !tracker.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::super::matrix::{Mode, Workload};
    use super::super::provenance::RESUME;
    use super::*;

    fn results(revision: &str) -> Results {
        let provenance = Provenance { revision: revision.into(), ..Provenance::here(1, 0).unwrap() };
        let setting = Setting::new(Workload::Idle, 128, 0);
        let group = Group { setting, movers: vec![Mover::mode(Mode::PcliveG)] };
        Results { provenance, groups: vec![Measured::new(&group, |_, _| None)], ablations: Vec::new() }
    }

    #[test]
    fn only_the_same_is_resumed() {
        let earlier = || {
            let mut earlier = results("a");
            earlier.provenance.began_unix_s = 7;
            earlier.groups[0].cells[0].failures.push("no luck".into());
            earlier
        };
        let mut resumed = results("a");
        resumed.provenance.command += RESUME;
        resumed.go_on_from(earlier()).unwrap();
        assert_eq!(resumed.provenance.began_unix_s, 7);
        assert!(resumed.groups[0].cells[0].failures.is_empty(), "what failed is tried again");
        let mut with_option = results("a");
        with_option.provenance.command += " --criu criu";
        for mut other in [results("b"), with_option] {
            other.go_on_from(earlier()).unwrap_err();
        }
        results("a+").go_on_from(results("a+")).unwrap_err();
    }
}
