//! What parts of pclive are worth: the same migrations with and without one of them.
//!
//! Each ablation is a question with the settings in which it is asked and the pairs of movers that answer it. What is
//! compared is measured in the same turns as everything else; the answer is a table of differences, beside the tables,
//! files and figures that every measurement has.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::matrix::{Group, Mode, Mover, Setting, Tracker, Workload};
use super::metrics::{self, Metric};
use super::results::{Cell, Measured, Results};
use super::statistics::Summary;

/// The data sets in MiB for which tracking is compared; those too large for the machine are listed as such.
const TRACKED_MIB: [u64; 5] = [128, 512, 1024, 2048, 4096];
/// The data set for which migrations are compared.
const MIB: u64 = 1024;
/// The rate of their link.
const MBIT: u64 = 1_000;
/// What the write-heavy load writes to.
const HOT_MIB: u64 = 10;

/// A question that is answered by leaving a part of pclive out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ablation {
    /// eBPF against scans alone: cost for each page written, cost of a round as memory grows, blackout
    Tracking,
    /// MSG_ZEROCOPY against plain sends: processor time, bytes in a send, what the kernel copies all the same
    Zerocopy,
    /// Parts of pages against whole ones
    Patches,
    /// Holding back pages that are written in every round
    HotPages,
}

impl Ablation {
    /// Its name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tracking => "tracking",
            Self::Zerocopy => "zerocopy",
            Self::Patches => "patches",
            Self::HotPages => "hot-pages",
        }
    }

    /// What is asked.
    pub fn question(self) -> &'static str {
        match self {
            Self::Tracking => "What does it cost to see every write by eBPF, compared with scans alone?",
            Self::Zerocopy => "What does it save to send pages without copying them?",
            Self::Patches => "What does it save to send only the parts of a page that have changed?",
            Self::HotPages => "What does it save to hold back pages that are written in every round?",
        }
    }

    /// What is measured for it.
    pub fn groups(self) -> Vec<Group> {
        let base = || Setting::new(Workload::Redis90, MIB, MBIT);
        let settings = match self {
            Self::Tracking => return tracking(),
            // Nobody takes the processors from the migration, and no link holds it up.
            Self::Zerocopy => vec![Setting::new(Workload::Idle, MIB, 0), base()],
            Self::Patches | Self::HotPages => {
                vec![base(), Setting::new(Workload::Redis10, MIB, MBIT).hot(HOT_MIB)]
            }
        };
        let mut movers: Vec<Mover> = Vec::new();
        for mover in self.pairs().into_iter().flat_map(|(without, with)| [without, with]) {
            if !movers.contains(&mover) {
                movers.push(mover);
            }
        }
        settings.into_iter().map(|setting| Group { setting, movers: movers.clone() }).collect()
    }

    /// Movers without and with the part.
    fn pairs(self) -> Vec<(Mover, Mover)> {
        let pair = |without, with| (Mover::with(without), Mover::with(with));
        match self {
            Self::Tracking => {
                let track = |tracker| Mover::Track { tracker };
                let migrate = |tracker| Mover::pclive(Mode::PcliveG, tracker, 0);
                let scans = [Tracker::Scan, Tracker::Tracepoint, Tracker::Fentry];
                let controls = scans.map(|tracker| (Mover::Control, track(tracker)));
                let ebpf = [Tracker::Tracepoint, Tracker::Fentry];
                let tracks = ebpf.map(|tracker| (track(Tracker::Scan), track(tracker)));
                let moves = ebpf.map(|tracker| (migrate(Tracker::Scan), migrate(tracker)));
                controls.into_iter().chain(tracks).chain(moves).collect()
            }
            Self::Zerocopy => {
                vec![pair("--zerocopy never", "--zerocopy always"), pair("--zerocopy never", "")]
            }
            Self::Patches => vec![pair("--whole-pages", "")],
            Self::HotPages => {
                vec![pair("--whole-pages", "--whole-pages --hot-rounds 3"), pair("", "--hot-rounds 3")]
            }
        }
    }

    /// The numbers that may differ.
    fn metrics(self) -> &'static [Metric] {
        use metrics::*;
        match self {
            Self::Tracking => &[SERVER_CPU, PAGE_COST, ROUND, THROUGHPUT, GAP, BLACKOUT, TOTAL, SOURCE_CPU],
            Self::Zerocopy => {
                &[SOURCE_CPU, SOURCE_CPU_PER_GIB, SEND_KIB, COPIED, TOTAL, THROUGHPUT, BLACKOUT]
            }
            Self::Patches | Self::HotPages => {
                &[GAP, BLACKOUT, TOTAL, ROUNDS, SENT, THROUGHPUT, SOURCE_CPU, DESTINATION_CPU]
            }
        }
    }

    /// Every pair that was measured.
    pub fn comparisons(self, results: &Results) -> Vec<Comparison<'_>> {
        let mut comparisons = Vec::new();
        for group in &results.groups {
            for (without, with) in self.pairs() {
                let Some((without, with)) = group.measured(&without).zip(group.measured(&with)) else {
                    continue;
                };
                let differences: Vec<_> = self
                    .metrics()
                    .iter()
                    .filter_map(|metric| Difference::of(*metric, without, with))
                    .collect();
                if !differences.is_empty() {
                    comparisons.push(Comparison { group, without, with, differences });
                }
            }
        }
        comparisons
    }

    /// What has to be known to read the answer right.
    pub fn remarks(self, results: &Results) -> Vec<String> {
        match self {
            Self::Zerocopy => copying_links(results).into_iter().collect(),
            Self::Tracking => vec![
                "Cost for each page written is the processor time that the server took for its answers beyond \
                 what it takes without tracking, divided by the pages found written. A round is one search for \
                 written pages, with protecting them again and taking in what eBPF saw."
                    .to_owned(),
            ],
            Self::Patches | Self::HotPages => Vec::new(),
        }
    }
}

impl fmt::Display for Ablation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Tracking alone for each size, under a load that writes to as many pages as it can, and migrations.
fn tracking() -> Vec<Group> {
    let tracks = TRACKED_MIB.map(|mib| Group {
        setting: Setting::new(Workload::Redis10, mib, MBIT),
        movers: Tracker::TIERS.map(|tracker| Mover::Track { tracker }).to_vec(),
    });
    let migrations = Group {
        setting: Setting::new(Workload::Redis90, MIB, MBIT),
        movers: Tracker::TIERS.map(|tracker| Mover::pclive(Mode::PcliveG, tracker, 0)).to_vec(),
    };
    tracks.into_iter().chain([migrations]).collect()
}

/// Whether the kernel copies what it was asked not to.
fn copying_links(results: &Results) -> Option<String> {
    let cells = results.groups.iter().flat_map(|group| &group.cells);
    let sends = cells.flat_map(|cell| &cell.runs).filter_map(metrics::zero_copy_sends);
    let (asked, copied) = sends.fold((0.0, 0.0), |sum, sends| (sum.0 + sends.0, sum.1 + sends.1));
    (asked > 0.0).then(|| {
        let percent = 100.0 * copied / asked;
        let meaning = if percent > 50.0 {
            "links between network namespaces hand data to a receiver on the same machine, so the kernel has to copy \
             it. This shows what it costs to ask in vain, not what zero copy is worth on a network card"
        } else {
            "the network does without a copy"
        };
        format!("This host's links: of {asked:.0} sends that asked for none, the kernel copied {percent:.0} %: {meaning}.")
    })
}

/// Two movers in the same setting.
pub struct Comparison<'a> {
    /// The setting.
    pub group: &'a Measured,
    /// The mover without the part.
    pub without: &'a Cell,
    /// That with it.
    pub with: &'a Cell,
    /// What they differ in.
    pub differences: Vec<Difference>,
}

impl fmt::Display for Comparison<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} against {}", self.group.name, self.with.name, self.without.name)
    }
}

/// A number of both.
pub struct Difference {
    /// Which.
    pub metric: Metric,
    /// Without the part.
    pub without: Summary,
    /// With it.
    pub with: Summary,
}

impl Difference {
    fn of(metric: Metric, without: &Cell, with: &Cell) -> Option<Self> {
        let (without, with) = metric.summary(without).zip(metric.summary(with))?;
        Some(Self { metric, without, with })
    }

    /// The median with the part, in percent of that without it.
    pub fn percent(&self) -> Option<f64> {
        (self.without.median > 0.0).then(|| 100.0 * self.with.median / self.without.median)
    }

    /// Why it may be chance; `None` if no run of one is within the range of the other's.
    pub fn doubt(&self) -> Option<&'static str> {
        const ENOUGH: usize = 2;
        let (one, other) = (self.without, self.with);
        if one.count.min(other.count) < ENOUGH {
            return Some("one run");
        }
        let apart = one.highest < other.lowest || other.highest < one.lowest;
        (!apart).then_some("within the spread")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_compared_is_measured() {
        for ablation in Ablation::value_variants() {
            let groups = ablation.groups();
            for (without, with) in ablation.pairs() {
                let both = |group: &Group| {
                    let has = |mover: &Mover| *mover == Mover::Control || group.movers.contains(mover);
                    has(&without) && has(&with)
                };
                assert!(groups.iter().any(both), "{ablation}: {with} against {without}");
            }
            for (number, group) in groups.iter().enumerate() {
                assert!(groups[..number].iter().all(|other| other.setting != group.setting), "{group:?}");
            }
        }
    }

    #[test]
    fn a_difference_is_clear_if_the_ranges_are_apart() {
        let summary = |lowest, highest, count| Summary { median: lowest, lowest, highest, count };
        let doubt = |without, with| Difference { metric: metrics::GAP, without, with }.doubt();
        assert_eq!(doubt(summary(10.0, 12.0, 3), summary(2.0, 9.0, 3)), None);
        assert_eq!(doubt(summary(10.0, 12.0, 3), summary(2.0, 10.0, 3)), Some("within the spread"));
        assert_eq!(doubt(summary(10.0, 12.0, 3), summary(2.0, 2.0, 1)), Some("one run"));
    }
}
