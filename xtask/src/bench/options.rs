//! The command line, and the selection of the matrix that it makes.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::ablation::Ablation;
use super::estimate::expected;
use super::matrix::{Axes, Group, Mode, Mover, Tracker, Workload};
use super::presets;

/// Measure migrations: modes, trackers and loads beside each other, as tables, CSV, JSON and pictures
///
/// Without a selection it measures the figures of the README, with their goals. A setting's movers take turns, and in
/// each turn a control without migration tells how noisy the machine is. What cannot be measured here is listed with the
/// reason.
#[derive(Args, Default)]
pub struct Options {
    /// A look at everything in less than five minutes
    #[arg(long, conflicts_with_all = ["full", "axes"])]
    quick: bool,
    /// Every mode and tracker with every workload at 1 GiB and 1 Gbit/s, and every mode with other sizes and links; takes about
    /// an hour each turn
    #[arg(long, conflicts_with = "axes")]
    full: bool,
    /// What parts of pclive are worth: the same migrations with and without them, and the differences
    #[arg(long, value_enum, value_delimiter = ',', conflicts_with_all = ["quick", "full", "axes"])]
    ablation: Vec<Ablation>,
    #[command(flatten)]
    axes: Selection,
    #[command(flatten)]
    changes: Changes,
    /// How often each cell is measured [default: 5, with --quick 2]
    #[arg(long)]
    repeat: Option<usize>,
    /// Only cells whose name contains this (--list shows the names)
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// List what would be measured and how long it takes, and measure nothing
    #[arg(long)]
    pub list: bool,
    /// Go on with the results in --out, where this same command was broken off; what failed there is tried again
    #[arg(long, conflicts_with_all = ["list", "redraw"])]
    pub resume: bool,
    /// Draw the tables and pictures of the results in --out again, and measure nothing
    #[arg(long)]
    pub redraw: bool,
    /// Move the container by this CRIU too, in the same turns; it must be of the kernel's time (4.2 for Linux 6.16)
    #[arg(long, value_name = "PATH")]
    pub criu: Option<PathBuf>,
    /// A directory with the programs `pclive` and `load`, instead of building them
    #[arg(long, value_name = "DIR")]
    pub programs: Option<PathBuf>,
    /// Where results go
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    pub out: PathBuf,
}

/// Cells chosen by hand: each of the values of each option with each of the others. Several values are separated by
/// commas; what is not given has its default.
#[derive(Args, Default)]
#[group(id = "axes", multiple = true)]
struct Selection {
    /// How to migrate [default: pclive-g]
    #[arg(long, value_enum, value_delimiter = ',')]
    mode: Vec<Mode>,
    /// How writes are tracked [default: auto]
    #[arg(long, value_enum, value_delimiter = ',')]
    tracker: Vec<Tracker>,
    /// Keep rounds before this one in memory and apply them from then on; 0 is every round at once [default: 0]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    restore_from: Vec<u32>,
    /// Further options of `pclive migrate`, as one argument; given several times, these are compared ('' is none)
    #[arg(long, value_name = "OPTIONS", allow_hyphen_values = true)]
    with: Vec<String>,
    /// What runs in the container and what its clients do [default: redis-90]
    #[arg(long, value_enum, value_delimiter = ',')]
    workload: Vec<Workload>,
    /// Data set in MiB [default: 1024]
    #[arg(long, value_name = "MIB", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    size: Vec<u64>,
    /// Rate of the link that pages take in Mbit/s, 0 for as fast as the machine can [default: 1000]
    #[arg(long, value_name = "MBIT", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(0..=1_000_000))]
    rate: Vec<u64>,
}

/// What differs in every cell from what is usual.
#[derive(Args, Default)]
struct Changes {
    /// The part of the data set in MiB that clients read and write
    #[arg(long, value_name = "MIB")]
    hot: Option<u64>,
    /// Let clients and migration share the hosts' links, instead of giving the migration one of its own
    #[arg(long)]
    shared: bool,
    /// Client connections [default: 16]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    connections: Option<u16>,
    /// Send that many requests per second whether or not earlier ones are answered, and count latency from when each
    /// was due; without it each connection sends its next request when the last one is answered
    #[arg(long, value_name = "PER_SECOND", value_parser = positive)]
    open_loop: Option<f64>,
}

fn positive(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if rate.is_finite() && rate > 0.0 { Ok(rate) } else { Err("not a positive number".into()) }
}

impl Options {
    /// What to measure.
    pub fn groups(&self) -> Vec<Group> {
        let mut groups = if self.quick {
            presets::quick()
        } else if self.full {
            presets::full()
        } else if !self.ablation.is_empty() {
            merged(self.ablation.iter().flat_map(|ablation| ablation.groups()))
        } else if self.axes.is_empty() {
            presets::goals()
        } else {
            self.axes.axes().product()
        };
        for group in &mut groups {
            self.changes.apply(group);
            if self.criu.is_some() {
                group.movers.push(Mover::Criu);
            }
        }
        if let Some(part) = &self.only {
            for group in &mut groups {
                let names: Vec<_> = group.movers.iter().map(|mover| group.cell_name(mover)).collect();
                let mut names = names.iter();
                group.movers.retain(|_| names.next().is_some_and(|name| name.contains(part.as_str())));
            }
        }
        groups.retain(|group| !group.movers.is_empty());
        groups
    }

    /// The questions to answer.
    pub fn ablations(&self) -> &[Ablation] {
        &self.ablation
    }

    /// Turns of each cell.
    pub fn repeat(&self) -> usize {
        self.repeat.unwrap_or(if self.quick { 2 } else { 5 })
    }

    /// How long the load runs before and after each migration.
    pub fn margin(&self) -> Duration {
        Duration::from_secs(if self.quick { 2 } else { 3 })
    }

    /// How long measuring `groups` takes, roughly. The control of each group is counted.
    pub fn estimate(&self, groups: &[Group]) -> Duration {
        let of_group = |group: &Group| {
            let movers = group.movers.iter().chain([&Mover::Control]);
            movers.map(|mover| expected(&group.setting, mover, self.margin())).sum::<Duration>()
        };
        groups.iter().map(of_group).sum::<Duration>() * self.repeat() as u32
    }
}

impl Selection {
    fn is_empty(&self) -> bool {
        self.mode.is_empty()
            && self.tracker.is_empty()
            && self.restore_from.is_empty()
            && self.with.is_empty()
            && self.workload.is_empty()
            && self.size.is_empty()
            && self.rate.is_empty()
    }

    fn axes(&self) -> Axes {
        fn or<T: Clone>(given: &[T], default: T) -> Vec<T> {
            if given.is_empty() { vec![default] } else { given.to_vec() }
        }
        Axes {
            workloads: or(&self.workload, Workload::Redis90),
            sizes_mib: or(&self.size, 1024),
            rates_mbit: or(&self.rate, 1000),
            modes: or(&self.mode, Mode::PcliveG),
            trackers: or(&self.tracker, Tracker::Auto),
            restore_from: or(&self.restore_from, 0),
            further: or(&self.with, String::new()),
        }
    }
}

impl Changes {
    fn apply(&self, group: &mut Group) {
        let setting = &mut group.setting;
        setting.hot_mib = self.hot.or(setting.hot_mib);
        setting.shared = self.shared;
        setting.connections = self.connections.map_or(setting.connections, usize::from);
        setting.open_loop = self.open_loop;
    }
}

/// The same with each setting once, and each mover once in it.
fn merged(groups: impl Iterator<Item = Group>) -> Vec<Group> {
    let mut merged: Vec<Group> = Vec::new();
    for group in groups {
        match merged.iter_mut().find(|known| known.setting == group.setting) {
            Some(known) => {
                let new = group.movers.into_iter().filter(|mover| !known.movers.contains(mover));
                let new: Vec<_> = new.collect();
                known.movers.extend(new);
            }
            None => merged.push(group),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        options: Options,
    }

    fn groups(arguments: &[&str]) -> Vec<Group> {
        let arguments = std::iter::once(&"bench").chain(arguments);
        Command::try_parse_from(arguments).map(|command| command.options.groups()).unwrap_or_default()
    }

    #[test]
    fn any_cell_can_be_had_alone() {
        let cell = groups(&["--workload", "memcached", "--size", "256", "--rate", "0", "--mode", "pclive"]);
        let names: Vec<_> =
            cell.iter().flat_map(|group| group.movers.iter().map(|mover| group.cell_name(mover))).collect();
        assert_eq!(names, ["memcached, 256 MiB, unshaped: pclive"]);
    }

    #[test]
    fn a_selection_is_a_product_and_a_preset_can_be_cut() {
        let product =
            groups(&["--mode", "one-shot,pclive-g", "--size", "128,256", "--shared", "--hot", "10"]);
        assert_eq!(product.len(), 2);
        assert!(product.iter().all(|group| group.movers.len() == 2 && group.setting.shared));
        let one_shot = groups(&["--only", "one-shot"]);
        assert_eq!(one_shot.len(), 1);
        assert_eq!(one_shot[0].movers, [Mover::mode(Mode::OneShot)]);
        let compared = groups(&["--with", "", "--with", "--max-rounds 3"]);
        let names: Vec<_> = compared[0].movers.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["pclive-g", "pclive-g --max-rounds 3"]);
        assert_eq!(compared[0].movers[1].options().last().map(String::as_str), Some("3"));
        assert!(groups(&["--quick", "--mode", "pclive"]).is_empty(), "a preset is no axis");
        assert!(groups(&["--open-loop", "-3"]).is_empty());
    }

    #[test]
    fn ablations_share_what_they_have_in_common() {
        let [patches, hot] = ["patches", "hot-pages"].map(|name| groups(&["--ablation", name]));
        let both = groups(&["--ablation", "patches,hot-pages"]);
        assert_eq!((patches.len(), hot.len(), both.len()), (2, 2, 2));
        assert!(patches[0].movers.iter().all(|mover| both[0].movers.contains(mover)));
        assert_eq!(both[0].movers.len(), hot[0].movers.len());
        assert!(groups(&["--ablation", "patches", "--size", "128"]).is_empty(), "its settings are its own");
    }

    #[test]
    fn the_quick_preset_is_quick() {
        let options = Options { quick: true, ..Options::default() };
        assert!(options.estimate(&options.groups()) < Duration::from_secs(300));
    }
}
