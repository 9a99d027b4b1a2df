//! A container that is followed: rounds as in a migration, but nothing is sent.

use super::audit::{self, Comparison};
use crate::{
    engine::source::Container,
    runtime::{Cgroup, CgroupError},
    track::{
        Heat, Tracker, WriteObserver,
        observer::{ChangeKind, Drained, Lost, now},
    },
};
use anyhow::Result;
use pclive_wire::manifest::Process;
use pclive_wire::{HostPid, NsPid, PageSet};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// How long the freezer may take.
const FREEZE_LIMIT: Duration = Duration::from_secs(5);

/// The dirty pages of one process in one interval.
#[derive(Debug)]
pub struct ProcessInterval {
    /// As the host numbers it.
    pub pid: HostPid,
    /// As the container numbers it.
    pub ns_pid: NsPid,
    /// What `PAGEMAP_SCAN` found.
    pub written: PageSet,
    /// Write faults that eBPF saw.
    pub events: u64,
    /// Changes of the address space that eBPF saw.
    pub changes: u64,
}

/// What happened in one interval.
#[derive(Debug)]
pub struct Interval {
    /// Each process of the container.
    pub processes: Vec<ProcessInterval>,
    /// Pages written in the newest intervals.
    pub working_set: u64,
    /// Events that found their ring full.
    pub lost: Lost,
    /// How long finding the written pages and protecting them again took, with taking in what eBPF saw.
    pub round: Duration,
    /// eBPF against scan, where it was asked for.
    pub audit: Option<Audit>,
}

/// eBPF against scan.
#[derive(Debug)]
pub enum Audit {
    /// Process by process.
    Compared(Vec<(HostPid, Comparison)>),
    /// Processes came or executed another program, in this interval or at the end of the one before: they had to run
    /// between drain and scan, to be attached to.
    TreeChanged,
    /// Some events are missing.
    EventsLost,
}

/// Number of intervals that the working-set estimate looks back.
pub const WORKING_SET_INTERVALS: usize = 5;

/// A container whose writes are followed. Dropping it leaves nothing behind.
pub struct Session {
    cgroup: Cgroup,
    container: Container,
    observer: Option<WriteObserver>,
    audit: bool,
    heat: Heat,
    /// When the newest intervals began, oldest first.
    begins: Vec<Duration>,
    /// Mappings with pages of their own at the end of the last interval.
    own: HashMap<HostPid, PageSet>,
    /// Whether the container was frozen when the last interval ended, so that events and scan begin at the same moment.
    ended_frozen: bool,
}

impl Session {
    /// Attaches to the container whose PID 1 is `init`.
    pub fn start(init: HostPid, tracker: Tracker, audit: bool) -> Result<Self> {
        let cgroup = Cgroup::of(init)?;
        let observer = tracker.observe(&cgroup)?;
        let mut session = Self {
            cgroup,
            container: Container::open(init)?,
            observer,
            audit,
            heat: Heat::default(),
            begins: Vec::new(),
            own: HashMap::new(),
            ended_frozen: false,
        };
        // Everything populated counts as written in the first round, which also attaches to the processes.
        session.finish_interval()?;
        if audit {
            session.finish_interval()?;
        }
        session.heat = Heat::default();
        Ok(session)
    }

    /// For how long processes were stopped to attach, together.
    pub fn attach_stop(&self) -> Duration {
        self.container.attach_stop()
    }

    /// How hot pages have been so far.
    pub fn heat(&self) -> &Heat {
        &self.heat
    }

    /// Ends an interval and begins the next one.
    pub fn finish_interval(&mut self) -> Result<Interval> {
        let frozen = if self.audit { Some(Frozen::new(&self.cgroup)?) } else { None };
        let begin = Instant::now();
        let drained = match &mut self.observer {
            Some(observer) => observer.drain()?,
            None => Drained::default(),
        };
        // A process that is attached to runs a few injected calls, which a frozen one does not.
        let known =
            !tree_changed(&drained) && self.cgroup.processes()?.iter().all(|pid| self.own.contains_key(pid));
        let frozen = frozen.filter(|_| known);
        let now = now()?;
        let round = written(&mut self.container)?;
        let round_took = begin.elapsed();
        let is_frozen = frozen.is_some();
        drop(frozen);

        let host_pids: HashMap<NsPid, HostPid> =
            self.container.processes().iter().map(|process| (process.ns_pid, process.pid)).collect();
        let (mut processes, mut own) = (Vec::new(), HashMap::new());
        for (process, written) in round {
            let Some(&pid) = host_pids.get(&process.pid) else { continue };
            let mappings = process.vmas.iter().filter(|vma| vma.has_own_pages());
            own.insert(pid, mappings.map(|vma| vma.range).collect::<PageSet>());
            let events = drained.writes.iter().filter(|write| write.pid == pid).count() as u64;
            let changes = drained.changes.iter().filter(|change| change.pid == pid).count() as u64;
            processes.push(ProcessInterval { pid, ns_pid: process.pid, written, events, changes });
        }
        let audit = self.audit.then(|| match is_frozen && self.ended_frozen {
            false => Audit::TreeChanged,
            true if drained.lost.writes > 0 => Audit::EventsLost,
            true => Audit::Compared(compare(&processes, &self.own, &own, &drained)),
        });
        (self.own, self.ended_frozen) = (own, is_frozen);
        self.learn(&drained, &processes, now);
        let since = self.begins.first().copied().unwrap_or_default();
        Ok(Interval {
            processes,
            working_set: self.heat.working_set(since),
            lost: drained.lost,
            round: round_took,
            audit,
        })
    }

    /// Without events, a page found dirty counts as written at the end of the interval.
    fn learn(&mut self, drained: &Drained, processes: &[ProcessInterval], now: Duration) {
        if self.observer.is_some() {
            self.heat.absorb(drained);
        } else {
            for process in processes {
                self.heat.record(process.pid, &process.written, now);
            }
        }
        self.begins.push(now);
        if self.begins.len() > WORKING_SET_INTERVALS {
            self.begins.remove(0);
        }
    }
}

/// What each process has written since the last interval; protects it again.
fn written(container: &mut Container) -> Result<Vec<(Process, PageSet)>> {
    let mut processes = Vec::new();
    for (process, mut walk) in container.begin_round()? {
        let mut written = PageSet::new();
        while let Some(pages) = container.next_pages(process.pid, &mut walk, u64::MAX)? {
            written = written.union(&pages);
        }
        processes.push((process, written));
    }
    Ok(processes)
}

fn tree_changed(drained: &Drained) -> bool {
    let is_tree = |what| matches!(what, ChangeKind::Forked(_) | ChangeKind::Execed);
    drained.lost.changes > 0 || drained.changes.iter().any(|change| is_tree(change.what))
}

fn compare(
    processes: &[ProcessInterval],
    before: &HashMap<HostPid, PageSet>,
    after: &HashMap<HostPid, PageSet>,
    drained: &Drained,
) -> Vec<(HostPid, Comparison)> {
    let of = |process: &ProcessInterval| {
        let pid = process.pid;
        let (before, after) = (before.get(&pid)?, after.get(&pid)?);
        Some((pid, audit::compare(before, after, drained, pid, &process.written)))
    };
    processes.iter().filter_map(of).collect()
}

/// A frozen container; runs on when this is dropped.
struct Frozen<'c>(&'c Cgroup);

impl<'c> Frozen<'c> {
    fn new(cgroup: &'c Cgroup) -> Result<Self, CgroupError> {
        cgroup.freeze(FREEZE_LIMIT)?;
        Ok(Self(cgroup))
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.thaw(FREEZE_LIMIT) {
            tracing::error!(%error, "the container may still be frozen");
        }
    }
}
