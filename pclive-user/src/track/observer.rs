//! The user side of the eBPF programs: attaches them to one container and hands out what they saw.
//!
//! # What the events are good for
//!
//! They say *when* and *how often* a page is written, and that an address space or the process tree has changed. The
//! truth about *which* pages are dirty is `PAGEMAP_SCAN`'s: an event may stand for a write that failed, and at the
//! tracepoint tier writes through `get_user_pages` raise none. So nothing here needs to be perfect, but it must never
//! be silently incomplete: what found its ring full is counted in [`Lost`]. The two rings are apart so that a flood of
//! writes cannot push out the news of a fork. Lost writes are answered by a scan, lost changes by reading the process
//! list and the maps again.

use super::mapping_flags::MappingFlags;
use super::option_watch::StoredMarks;
use super::programs::{Attached, ObserveError, Programs, map, of_map};
use crate::runtime::Cgroup;
use nix::time::{ClockId, clock_gettime};
use pclive_abi::{Event, Kind, Ring};
use pclive_wire::{HostPid, PageRange, VirtAddr};
use std::time::Duration;

type Result<T> = std::result::Result<T, ObserveError>;

/// A write fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageWrite {
    /// Whose memory.
    pub pid: HostPid,
    /// The page.
    pub page: VirtAddr,
    /// When, on `CLOCK_MONOTONIC`.
    pub time: Duration,
}

/// A change of an address space or of the process tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Whose.
    pub pid: HostPid,
    /// When, on `CLOCK_MONOTONIC`.
    pub time: Duration,
    /// What.
    pub what: ChangeKind,
}

/// What has changed. Ranges are the callers' arguments: they may be larger than what was mapped, and they are empty
/// where the length is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// A new mapping; whatever was there is gone.
    Mapped(PageRange),
    /// No mapping any more.
    Unmapped(PageRange),
    /// One end of an `mremap`; the other end is an event of its own.
    Remapped(PageRange),
    /// Other access rights.
    Protected(PageRange),
    /// Contents given back: the pages read as new.
    Discarded(PageRange),
    /// The heap ends here now.
    HeapMoved(VirtAddr),
    /// A child process, whose memory nobody tracks yet.
    Forked(HostPid),
    /// A new program in a new address space, which nobody tracks yet.
    Execed,
    /// The process ended.
    Exited,
}

/// Now, on the clock of events.
pub fn now() -> Result<Duration> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(ObserveError::Clock)?;
    Ok(now.into())
}

/// Events that found their ring full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Write faults.
    pub writes: u64,
    /// Changes.
    pub changes: u64,
}

/// What was seen since the last time, in the order in which it happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Write faults.
    pub writes: Vec<PageWrite>,
    /// Changes.
    pub changes: Vec<Change>,
    /// What is missing from the two.
    pub lost: Lost,
}

/// The eBPF programs, attached to one container until this is dropped.
pub struct WriteObserver {
    attached: Attached,
    lost_before: Lost,
}

impl WriteObserver {
    /// Watches a container by these programs.
    pub fn attach(programs: Programs, container: &Cgroup) -> Result<Self> {
        Ok(Self { attached: programs.attach(container)?, lost_before: Lost::default() })
    }

    /// What notices that options of the container's sockets are set; once, and only where the kernel has it.
    pub fn take_option_watch(&mut self) -> Option<StoredMarks> {
        self.attached.options.take()
    }

    /// What tells the flags of mappings; once, and only where the kernel has it.
    pub fn take_mapping_flags(&mut self) -> Option<MappingFlags> {
        self.attached.flags.take()
    }

    /// Everything seen since the last call. Never waits.
    pub fn drain(&mut self) -> Result<Drained> {
        self.attached.log.flush();
        let mut drained = Drained::default();
        while let Some(record) = self.attached.writes.next() {
            if let Some(event) = Event::from_record(&record) {
                drained.writes.push(PageWrite {
                    pid: HostPid(event.tgid as i32),
                    page: VirtAddr(event.page()),
                    time: Duration::from_nanos(event.time),
                });
            }
        }
        while let Some(record) = self.attached.changes.next() {
            drained.changes.extend(Event::from_record(&record).as_ref().and_then(change));
        }
        let lost = Lost { writes: self.lost(Ring::Writes)?, changes: self.lost(Ring::Changes)? };
        drained.lost = Lost {
            writes: lost.writes - self.lost_before.writes,
            changes: lost.changes - self.lost_before.changes,
        };
        self.lost_before = lost;
        Ok(drained)
    }

    fn lost(&self, ring: Ring) -> Result<u64> {
        let counts = self.attached.lost.get(&(ring as u32), 0).map_err(of_map(map::LOST))?;
        Ok(counts.iter().sum())
    }
}

/// A change event; `None` for kinds that the changes ring does not carry.
fn change(event: &Event) -> Option<Change> {
    let start = VirtAddr(event.page());
    let range = PageRange::new(start, u64::from(event.extra));
    let what = match event.kind()? {
        Kind::Write => return None,
        Kind::Mapped => ChangeKind::Mapped(range),
        Kind::Unmapped => ChangeKind::Unmapped(range),
        Kind::Remapped => ChangeKind::Remapped(range),
        Kind::Protected => ChangeKind::Protected(range),
        Kind::Discarded => ChangeKind::Discarded(range),
        Kind::HeapMoved => ChangeKind::HeapMoved(start),
        Kind::Forked => ChangeKind::Forked(HostPid(event.extra as i32)),
        Kind::Execed => ChangeKind::Execed,
        Kind::Exited => ChangeKind::Exited,
    };
    Some(Change { pid: HostPid(event.tgid as i32), time: Duration::from_nanos(event.time), what })
}

#[cfg(test)]
mod tests;
