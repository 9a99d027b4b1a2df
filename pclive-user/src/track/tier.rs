//! The ways of finding out which pages were written.

use super::observer::{FaultSource, ObserveError, WriteObserver};
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
        self.fault_source().map_or(Ok(()), WriteObserver::probe)
    }

    /// The best tier that [`Tier::probe`] finds.
    pub fn best() -> Tier {
        let usable = |tier: &Tier| tier.probe().inspect_err(|error| tracing::debug!(%tier, %error)).is_ok();
        Self::ALL.into_iter().find(usable).unwrap_or(Tier::Scan)
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
        let best = Tier::best();
        assert!(best.probe().is_ok());
        assert!(Tier::ALL.iter().filter(|tier| **tier < best).all(|tier| tier.probe().is_err()));
    }
}
