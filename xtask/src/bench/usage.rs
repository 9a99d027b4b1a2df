//! CPU time and memory at both ends, sampled while a migration runs.
//!
//! Processes are told apart by their network namespace: whoever is in a host's own works for the migration (pclive, its
//! helpers, the runtime), whoever is in the container's namespace on that host is the container, also while it is only
//! being made. So the same rule serves every mover, and nothing has to be told to the processes that are watched.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};
use pclive_tests::lab::{Container, Lab, Netns};
use procfs::process::{Process, Stat};
use procfs::{CurrentSI, KernelStats};
use serde::{Deserialize, Serialize};

use super::criu::size;

/// How far samples are apart. One takes less than a millisecond.
const INTERVAL: Duration = Duration::from_millis(50);
/// A process that is not of the lab by then is not looked at again: it may change its namespace right after its start
/// only.
const SETTLED: Duration = Duration::from_secs(1);

/// What was used at a moment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sample {
    /// When, on the machine's monotonic clock.
    pub at_us: u64,
    /// At the source.
    pub source: End,
    /// At the destination.
    pub destination: End,
    /// CPU time since the first sample that was not the lab's: of other processes, of the kernel, and of other virtual
    /// machines in this one's place.
    pub others_cpu_us: u64,
}

/// One host's part.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct End {
    /// By those who move the container.
    pub mover: Use,
    /// By the container.
    pub container: Use,
}

/// What some processes have used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Use {
    /// CPU time since the first sample, of processes that have ended too.
    pub cpu_us: u64,
    /// Resident memory now, with the files that the mover keeps in memory.
    pub rss_bytes: u64,
}

/// Takes samples until it is stopped.
pub struct Sampler {
    stop: Sender<()>,
    thread: JoinHandle<Vec<Sample>>,
}

impl Sampler {
    /// Starts to watch both hosts of a lab and the container on them. `kept` is a directory in memory that the mover uses
    /// at the destination.
    ///
    /// # Errors
    /// When a namespace of the lab is gone.
    pub fn start(lab: &Lab, container: &Container, kept: Option<PathBuf>) -> Result<Self> {
        let mut namespaces = Vec::new();
        let mut add = |netns: &Netns| -> Result<()> {
            let path = netns.path();
            namespaces.push(fs::metadata(&path).with_context(|| format!("stat {}", path.display()))?.ino());
            Ok(())
        };
        for host in [lab.source(), lab.destination()] {
            add(host.netns())?;
            add(&host.container_netns(&container.name))?;
        }
        add(lab.client())?;
        let mut watch = Watch::new(namespaces, kept);
        let (stop, stopped) = channel();
        let thread = std::thread::spawn(move || {
            let mut samples = vec![watch.sample()];
            let mut next = Instant::now() + INTERVAL;
            while stopped.recv_timeout(next.saturating_duration_since(Instant::now()))
                == Err(RecvTimeoutError::Timeout)
            {
                samples.push(watch.sample());
                next = (next + INTERVAL).max(Instant::now());
            }
            samples
        });
        Ok(Self { stop, thread })
    }

    /// Everything sampled until now.
    pub fn stop(self) -> Vec<Sample> {
        // It ends by itself only if it panicked: then there is nobody to tell.
        let _ = self.stop.send(());
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// A process that is watched.
#[derive(Debug, Clone, Copy)]
struct Watched {
    parent: i32,
    /// Its CPU time with that of its children that it has waited for, in ticks.
    ticks: u64,
    rss_bytes: u64,
}

struct Watch {
    /// Source, container there, destination, container there, client.
    namespaces: Vec<u64>,
    kept: Option<PathBuf>,
    ticks_per_second: u64,
    /// Processes of each namespace at the last sample.
    processes: Vec<HashMap<i32, Watched>>,
    /// Ticks of those that have ended and that no watched parent has waited for.
    ended: Vec<u64>,
    /// Ticks used before the first sample, in each namespace and in all.
    before: Option<(Vec<u64>, u64)>,
    /// Processes elsewhere, and when they were seen first.
    strangers: HashMap<i32, Instant>,
}

impl Watch {
    fn new(namespaces: Vec<u64>, kept: Option<PathBuf>) -> Self {
        let none = vec![HashMap::new(); namespaces.len()];
        let ended = vec![0; namespaces.len()];
        let ticks_per_second = procfs::ticks_per_second();
        let strangers = HashMap::new();
        Self { namespaces, kept, ticks_per_second, processes: none, ended, before: None, strangers }
    }

    fn sample(&mut self) -> Sample {
        let at = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock"));
        let found = self.look();
        for (number, processes) in found.into_iter().enumerate() {
            self.ended[number] += ended(&self.processes[number], &processes);
            self.processes[number] = processes;
        }
        let ticks: Vec<u64> = (0..self.namespaces.len())
            .map(|at| self.ended[at] + self.processes[at].values().map(|process| process.ticks).sum::<u64>())
            .collect();
        let all = machine_ticks();
        let (before, all_before) = self.before.get_or_insert_with(|| (ticks.clone(), all)).clone();
        let us = |ticks: u64| ticks * 1_000_000 / self.ticks_per_second;
        let lab = ticks.iter().sum::<u64>().saturating_sub(before.iter().sum());
        let used = |at: usize| Use {
            cpu_us: us(ticks[at].saturating_sub(before[at])),
            rss_bytes: self.processes[at].values().map(|process| process.rss_bytes).sum(),
        };
        let mut destination = End { mover: used(2), container: used(3) };
        destination.mover.rss_bytes += self.kept.as_deref().map_or(0, size);
        Sample {
            at_us: at.as_micros() as u64,
            source: End { mover: used(0), container: used(1) },
            destination,
            others_cpu_us: us(all.saturating_sub(all_before).saturating_sub(lab)),
        }
    }

    /// The processes of each namespace.
    fn look(&mut self) -> Vec<HashMap<i32, Watched>> {
        let mut found = vec![HashMap::new(); self.namespaces.len()];
        let mut strangers = HashMap::new();
        let now = Instant::now();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let since = self.strangers.get(&pid).copied().unwrap_or(now);
            if now - since < SETTLED {
                let namespace = fs::metadata(entry.path().join("ns/net")).map_or(0, |found| found.ino());
                if let Some(number) = self.namespaces.iter().position(|known| *known == namespace) {
                    // One that ends meanwhile is one less.
                    if let Ok(stat) = Process::new(pid).and_then(|process| process.stat()) {
                        found[number].insert(pid, Watched::of(&stat));
                    }
                    continue;
                }
            }
            strangers.insert(pid, since);
        }
        self.strangers = strangers;
        found
    }
}

impl Watched {
    fn of(stat: &Stat) -> Self {
        let children = stat.cutime.max(0) + stat.cstime.max(0);
        let rss_bytes = stat.rss * procfs::page_size();
        Self { parent: stat.ppid, ticks: stat.utime + stat.stime + children as u64, rss_bytes }
    }
}

/// Ticks in which the machine's CPUs were not idle, those in which it was not given one included. Interrupts count as
/// well: the kernel adds their time to that of the process which they interrupted.
fn machine_ticks() -> u64 {
    // There is no kernel without /proc/stat; nobody would be blamed then.
    KernelStats::current().map_or(0, |stats| {
        let cpu = stats.total;
        let interrupts = [cpu.irq, cpu.softirq, cpu.steal].map(Option::unwrap_or_default);
        cpu.user + cpu.nice + cpu.system + interrupts.iter().sum::<u64>()
    })
}

/// Ticks of processes that were there and are gone. One whose parent is there is left out: the parent waited for it and
/// has its ticks.
fn ended(before: &HashMap<i32, Watched>, now: &HashMap<i32, Watched>) -> u64 {
    let gone = before.iter().filter(|(pid, was)| !now.contains_key(*pid) && !now.contains_key(&was.parent));
    gone.map(|(_, was)| was.ticks).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ticks_of_who_has_ended_count_once() {
        let watched = |parent, ticks| Watched { parent, ticks, rss_bytes: 0 };
        let before = HashMap::from([(10, watched(1, 5)), (11, watched(10, 7)), (12, watched(1, 9))]);
        let now = HashMap::from([(10, watched(1, 12))]);
        assert_eq!(ended(&before, &now), 9, "11's are its parent's now");
    }

    #[test]
    fn this_process_is_seen() {
        let own = fs::metadata("/proc/self/ns/net").expect("a namespace").ino();
        let mut watch = Watch::new(vec![own, 0, 1, 2, 3], None);
        let sample = watch.sample();
        assert!(sample.source.mover.rss_bytes > 0);
        assert_eq!((sample.source.mover.cpu_us, sample.destination.container), (0, Use::default()));
    }
}
