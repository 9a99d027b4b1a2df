//! The ways of finding out which pages were written.

use super::WriteObserver;
use super::programs::{FaultSource, ObserveError, ProgramLoader, Programs, RingSizes, Watch};
use crate::runtime::Cgroup;
use pclive_wire::PAGE_SIZE;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A way of tracking, best first. Every report names the one in use.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// eBPF on entry of `handle_mm_fault`: also sees writes that the kernel makes for others.
    Fentry,
    /// eBPF on the page-fault tracepoints: faults of the CPU; a scan at freeze completes them.
    Tracepoint,
    /// `PAGEMAP_SCAN` each round, no eBPF.
    Scan,
}

impl Tier {
    /// All tiers, best first.
    pub const ALL: [Tier; 3] = [Tier::Fentry, Tier::Tracepoint, Tier::Scan];

    /// Where its events come from, if it has any.
    pub fn fault_source(self) -> Option<FaultSource> {
        match self {
            Self::Fentry => Some(FaultSource::Fentry),
            Self::Tracepoint => Some(FaultSource::Tracepoint),
            Self::Scan => None,
        }
    }

    /// Tries whether this kernel lets pclive use the tier's eBPF programs: loads them and throws them away. What every
    /// tier needs besides (userfaultfd, `PAGEMAP_SCAN`) is not looked at.
    pub fn probe(self) -> Result<(), ObserveError> {
        let Some(source) = self.fault_source() else { return Ok(()) };
        let sizes = RingSizes { writes: PAGE_SIZE as u32, changes: PAGE_SIZE as u32 };
        ProgramLoader::new()?.load(source, Watch::Everything, sizes).map(drop)
    }
}

/// A tier that this host offers, ready to be used: its eBPF programs are loaded.
pub struct Tracker {
    tier: Tier,
    programs: Option<Programs>,
}

impl Tracker {
    /// A tracker of this tier.
    pub fn of_tier(tier: Tier, watch: Watch) -> Result<Self, ObserveError> {
        let load = |source| ProgramLoader::new()?.load(source, watch, RingSizes::default());
        Ok(Self { tier, programs: tier.fault_source().map(load).transpose()? })
    }

    /// A tracker of the best tier that can be had.
    pub fn best(watch: Watch) -> Self {
        let mut loader = ProgramLoader::new().inspect_err(|error| tracing::debug!(%error, "no eBPF")).ok();
        let load = |tier: Tier| {
            let programs = loader.as_mut()?.load(tier.fault_source()?, watch, RingSizes::default());
            let programs = programs.inspect_err(|error| tracing::debug!(%tier, %error)).ok()?;
            Some(Self { tier, programs: Some(programs) })
        };
        Tier::ALL.into_iter().find_map(load).unwrap_or(Self { tier: Tier::Scan, programs: None })
    }

    /// Its tier.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// Watches a container, if the tier does more than scan.
    pub fn observe(self, container: &Cgroup) -> Result<Option<WriteObserver>, ObserveError> {
        self.programs.map(|programs| WriteObserver::attach(programs, container)).transpose()
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fentry => "fentry",
            Self::Tracepoint => "tracepoint",
            Self::Scan => "scan",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_tier_is_the_first_that_probes_well() {
        let best = Tracker::best(Watch::Writes).tier();
        assert!(best.probe().is_ok());
        assert!(Tier::ALL.iter().filter(|tier| **tier < best).all(|tier| tier.probe().is_err()));
    }
}
