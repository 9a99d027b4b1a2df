//! Everything that was measured.

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
    /// What the mover's tracker was, if it was measured and has one.
    pub fn tracker(&self) -> Option<&str> {
        self.runs.iter().find_map(Run::tracker).filter(|tracker| !tracker.is_empty())
    }
}
