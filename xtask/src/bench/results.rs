//! Everything that was measured.

use pclive_tests::load::LoadReport;
use serde::{Deserialize, Serialize};

use super::matrix::{Group, Mover, Setting};
use super::movement::Movement;
use super::provenance::Provenance;
use super::usage::Sample;

/// One invocation of the benchmark.
#[derive(Debug, Serialize, Deserialize)]
pub struct Results {
    /// Where and how.
    pub provenance: Provenance,
    /// A setting each.
    pub groups: Vec<Measured>,
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

    /// Whether anything is moved in it.
    pub fn is_feasible(&self) -> bool {
        self.cells.iter().any(|cell| cell.mover != Mover::Control && cell.obstacle.is_none())
    }
}

impl Cell {
    /// What the mover's tracker was, if it was measured and has one.
    pub fn tracker(&self) -> Option<&str> {
        let mut movements = self.runs.iter().filter_map(|run| run.movement.as_ref());
        movements.next().map(|movement| movement.tracker.as_str()).filter(|tracker| !tracker.is_empty())
    }
}
