//! What can be measured: settings in which a container is moved, and the ways to move it.
//!
//! All ways in the same setting form a [`Group`]: they are measured in turns and shown beside each other, together with
//! a control that is not moved at all.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use pclive_tests::lab::BitRate;
use pclive_tests::load::{LoadSpec, Pace, Service};
use pclive_tests::scene::Network;
use serde::{Deserialize, Serialize};

/// How long [`Mover::Track`] follows a container.
pub const TRACK: Duration = Duration::from_secs(8);
/// How often it looks at what was written: about as often as short rounds of a migration do.
const TRACK_INTERVAL: Duration = Duration::from_millis(250);

/// What runs in the container, and what its clients do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Redis, 90 % reads, 10 % writes
    #[value(name = "redis-90")]
    Redis90,
    /// Redis, half reads, half writes
    #[value(name = "redis-50")]
    Redis50,
    /// Redis, 10 % reads, 90 % writes
    #[value(name = "redis-10")]
    Redis10,
    /// memcached with four threads, 90 % reads
    Memcached,
    /// Redis with its data and open connections, but nobody asks it anything
    Idle,
}

impl Workload {
    /// Every workload.
    pub const ALL: [Self; 5] = [Self::Redis90, Self::Redis50, Self::Redis10, Self::Memcached, Self::Idle];

    /// The server's program.
    pub fn program(self) -> &'static str {
        match self {
            Self::Memcached => "/usr/bin/memcached",
            _ => "/usr/bin/redis-server",
        }
    }

    fn service(self) -> Service {
        if self == Self::Memcached { Service::Memcached } else { Service::Redis }
    }

    fn read_percent(self) -> u8 {
        match self {
            Self::Redis50 => 50,
            Self::Redis10 => 10,
            Self::Redis90 | Self::Memcached | Self::Idle => 90,
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Redis90 => "Redis 90:10",
            Self::Redis50 => "Redis 50:50",
            Self::Redis10 => "Redis 10:90",
            Self::Memcached => "memcached",
            Self::Idle => "idle",
        })
    }
}

/// The circumstances of a migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// What runs and is asked.
    pub workload: Workload,
    /// The data set.
    pub data_mib: u64,
    /// The part of the data set that clients read and write; `None` is all of it.
    pub hot_mib: Option<u64>,
    /// The rate of the link that pages take, 0 for as fast as the machine can.
    pub rate_mbit: u64,
    /// Whether clients use that link too.
    pub shared: bool,
    /// Client connections.
    pub connections: usize,
    /// Requests per second of an open loop; `None` is a closed loop at full load.
    pub open_loop: Option<f64>,
}

impl Setting {
    /// A setting with everything else as the figures of the README have it.
    pub fn new(workload: Workload, data_mib: u64, rate_mbit: u64) -> Self {
        Self { workload, data_mib, hot_mib: None, rate_mbit, shared: false, connections: 16, open_loop: None }
    }

    /// The same with clients that use only so many MiB.
    pub fn hot(self, mib: u64) -> Self {
        Self { hot_mib: Some(mib), ..self }
    }

    /// What the load program is told.
    pub fn load(&self) -> LoadSpec {
        let data_bytes = self.data_mib << 20;
        let pace = match self.open_loop {
            _ if self.workload == Workload::Idle => Pace::Idle,
            Some(rate) => Pace::PerSecond(rate),
            None => Pace::FullLoad,
        };
        LoadSpec {
            connections: self.connections,
            pace,
            read_percent: self.workload.read_percent(),
            hot_bytes: self.hot_mib.map_or(data_bytes, |mib| mib << 20),
            ..LoadSpec::new(self.workload.service(), data_bytes)
        }
    }

    /// The lab's links.
    pub fn network(&self) -> Network {
        let rate = (self.rate_mbit > 0).then_some(BitRate(self.rate_mbit * 1_000_000));
        if self.shared { Network::Shared(rate) } else { Network::Separate(rate) }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.workload, Mib(self.data_mib))?;
        if let Some(hot) = self.hot_mib {
            write!(f, " ({} hot)", Mib(hot))?;
        }
        match self.rate_mbit {
            0 => write!(f, ", unshaped")?,
            rate if rate % 1000 == 0 => write!(f, ", {} Gbit/s", rate / 1000)?,
            rate => write!(f, ", {rate} Mbit/s")?,
        }
        if self.shared {
            write!(f, " shared with clients")?;
        }
        match self.open_loop {
            Some(rate) => write!(f, ", {rate} requests/s"),
            None => Ok(()),
        }
    }
}

/// A size as one says it.
struct Mib(u64);

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            mib if mib >= 1024 && mib % 1024 == 0 => write!(f, "{} GiB", mib / 1024),
            mib => write!(f, "{mib} MiB"),
        }
    }
}

/// `pclive migrate --mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Freeze, then move everything
    OneShot,
    /// The destination applies complete rounds
    Pclive,
    /// The destination applies pages as they arrive
    PcliveG,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Self; 3] = [Self::PcliveG, Self::Pclive, Self::OneShot];

    fn name(self) -> &'static str {
        match self {
            Self::OneShot => "one-shot",
            Self::Pclive => "pclive",
            Self::PcliveG => "pclive-g",
        }
    }
}

/// `pclive migrate --tracker`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tracker {
    /// The best one that the host offers
    Auto,
    /// eBPF at the functions that handle faults
    Fentry,
    /// eBPF at the tracepoints of faults
    Tracepoint,
    /// PAGEMAP_SCAN alone
    Scan,
}

impl Tracker {
    /// Every tier, the choice of the host left out.
    pub const TIERS: [Self; 3] = [Self::Fentry, Self::Tracepoint, Self::Scan];

    /// As `pclive` names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Fentry => "fentry",
            Self::Tracepoint => "tracepoint",
            Self::Scan => "scan",
        }
    }
}

/// A way to move a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mover {
    /// By pclive.
    Pclive {
        /// Its mode.
        mode: Mode,
        /// Its tracker.
        tracker: Tracker,
        /// The first round that is applied when it comes; 0 is every round.
        restore_from: u32,
        /// Further options of `pclive migrate`, as one types them; none of them has a space in it.
        further: String,
    },
    /// By CRIU, which copies everything while the container stands still.
    Criu,
    /// Not at all, but its writes are tracked as for a migration: `pclive track`.
    Track {
        /// Its tracker.
        tracker: Tracker,
    },
    /// Not at all: the noise of the machine.
    Control,
}

impl Mover {
    /// pclive in a mode, with everything else as it is by default.
    pub const fn mode(mode: Mode) -> Self {
        Self::pclive(mode, Tracker::Auto, 0)
    }

    /// pclive without further options.
    pub const fn pclive(mode: Mode, tracker: Tracker, restore_from: u32) -> Self {
        Self::Pclive { mode, tracker, restore_from, further: String::new() }
    }

    /// pclive in its default mode with further options.
    pub fn with(further: &str) -> Self {
        let (mode, tracker) = (Mode::PcliveG, Tracker::Auto);
        Self::Pclive { mode, tracker, restore_from: 0, further: further.to_owned() }
    }

    /// The options of `pclive migrate`, or of `pclive track`; none for other movers.
    pub fn options(&self) -> Vec<String> {
        let words = match self {
            Self::Pclive { mode, tracker, restore_from, further } => {
                let (mode, tracker) = (mode.name(), tracker.name());
                format!("--mode {mode} --tracker {tracker} --restore-from {restore_from} {further}")
            }
            Self::Track { tracker } => {
                let (seconds, interval) = (TRACK.as_secs(), TRACK_INTERVAL.as_millis());
                format!("--tracker {} --seconds {seconds} --interval {interval}", tracker.name())
            }
            Self::Criu | Self::Control => String::new(),
        };
        words.split_whitespace().map(str::to_owned).collect()
    }

    /// The tracker that is asked for, if it tracks.
    pub fn tracker(&self) -> Option<Tracker> {
        match self {
            Self::Pclive { tracker, .. } | Self::Track { tracker } => Some(*tracker),
            Self::Criu | Self::Control => None,
        }
    }
}

impl fmt::Display for Mover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mode, tracker, restore_from, further) = match self {
            Self::Pclive { mode, tracker, restore_from, further } => (mode, tracker, restore_from, further),
            Self::Track { tracker } => return write!(f, "track only, {}", tracker.name()),
            Self::Criu => return f.write_str("CRIU, no pre-dump"),
            Self::Control => return f.write_str("control"),
        };
        f.write_str(mode.name())?;
        if *tracker != Tracker::Auto {
            write!(f, " {}", tracker.name())?;
        }
        if *restore_from > 0 {
            write!(f, " from {restore_from}")?;
        }
        if !further.is_empty() {
            write!(f, " {further}")?;
        }
        Ok(())
    }
}

/// Ways to move a container that are compared in one setting.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// The setting.
    pub setting: Setting,
    /// The ways, in the order in which they take turns; the control is none of them yet.
    pub movers: Vec<Mover>,
}

impl Group {
    /// What a cell of this group is called: what `--only` looks into.
    pub fn cell_name(&self, mover: &Mover) -> String {
        format!("{}: {mover}", self.setting)
    }
}

/// The axes of a matrix that is asked for by hand.
#[derive(Debug, Clone)]
pub struct Axes {
    /// What runs and is asked.
    pub workloads: Vec<Workload>,
    /// The data sets in MiB.
    pub sizes_mib: Vec<u64>,
    /// The links' rates in Mbit/s.
    pub rates_mbit: Vec<u64>,
    /// Modes of pclive.
    pub modes: Vec<Mode>,
    /// Its trackers.
    pub trackers: Vec<Tracker>,
    /// Its first rounds to restore from.
    pub restore_from: Vec<u32>,
    /// Its further options.
    pub further: Vec<String>,
}

impl Axes {
    /// Each with each.
    pub fn product(&self) -> Vec<Group> {
        let mut movers = Vec::new();
        for mode in &self.modes {
            for tracker in &self.trackers {
                for restore_from in &self.restore_from {
                    movers.extend(self.further.iter().map(|further| Mover::Pclive {
                        mode: *mode,
                        tracker: *tracker,
                        restore_from: *restore_from,
                        further: further.clone(),
                    }));
                }
            }
        }
        let mut groups = Vec::new();
        for workload in &self.workloads {
            for size in &self.sizes_mib {
                for rate in &self.rates_mbit {
                    let setting = Setting::new(*workload, *size, *rate);
                    groups.push(Group { setting, movers: movers.clone() });
                }
            }
        }
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_has_each_with_each() {
        let axes = Axes {
            workloads: vec![Workload::Redis90, Workload::Idle],
            sizes_mib: vec![128, 1024, 2048],
            rates_mbit: vec![0, 1000],
            modes: Mode::ALL.to_vec(),
            trackers: vec![Tracker::Auto, Tracker::Scan],
            restore_from: vec![0, 2],
            further: vec![String::new()],
        };
        let groups = axes.product();
        assert_eq!(groups.len(), 12);
        assert!(groups.iter().all(|group| group.movers.len() == 12));
    }

    #[test]
    fn names_say_what_differs() {
        let setting = Setting::new(Workload::Redis10, 1024, 1000).hot(10);
        assert_eq!(setting.to_string(), "Redis 10:90, 1 GiB (10 MiB hot), 1 Gbit/s");
        let mover = Mover::pclive(Mode::Pclive, Tracker::Scan, 2);
        assert_eq!(mover.to_string(), "pclive scan from 2");
        assert_eq!(Mover::mode(Mode::OneShot).to_string(), "one-shot");
        assert_eq!(Mover::with("--whole-pages").to_string(), "pclive-g --whole-pages");
        assert_eq!(Mover::Track { tracker: Tracker::Scan }.to_string(), "track only, scan");
    }
}
