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

use super::btf;
use crate::runtime::{Cgroup, CgroupError};
use aya::{
    Btf, Ebpf, EbpfError, EbpfLoader,
    maps::{CgroupArray, HashMap, MapData, MapError, PerCpuArray, RingBuf},
    programs::{FEntry, ProgramError, RawTracePoint},
};
use aya_log::EbpfLogger;
use nix::time::{ClockId, clock_gettime};
use pclive_abi::{Event, Kind, Ring};
use pclive_wire::{HostPid, PAGE_SIZE, PageRange, VirtAddr};
use std::{fs::File, io, path::PathBuf, time::Duration};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/pclive-ebpf"));

/// Names of the object's maps.
mod map {
    pub const WRITES: &str = "WRITES";
    pub const CHANGES: &str = "CHANGES";
    pub const LOST: &str = "LOST";
    pub const CONTAINER: &str = "CONTAINER";
    pub const PROCESSES: &str = "PROCESSES";
}

/// Globals of the object that hold offsets in kernel structures.
const OFFSETS: [(&str, &str, &str); 6] = [
    ("TASK_PID", "task_struct", "pid"),
    ("TASK_TGID", "task_struct", "tgid"),
    ("TASK_SIGNAL", "task_struct", "signal"),
    ("SIGNAL_LIVE", "signal_struct", "live"),
    ("VMA_MM", "vm_area_struct", "vm_mm"),
    ("MM_OWNER", "mm_struct", "owner"),
];

/// Raw tracepoints of processes; each program has its tracepoint's name.
const PROCESS_PROGRAMS: [&str; 3] = ["sched_process_fork", "sched_process_exec", "sched_process_exit"];
/// The raw tracepoint behind which address spaces have changed.
const ADDRESS_SPACE_PROGRAM: &str = "sys_exit";
const FAULT_TRACEPOINTS: [&str; 2] = ["page_fault_user", "page_fault_kernel"];
const FAULT_FUNCTION: &str = "handle_mm_fault";

/// `PROC_PID_INIT_INO`: inode of the initial pid namespace (`include/uapi/linux/nsfs.h` since 6.18, the same since 3.8).
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";

/// Why a container cannot be observed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObserveError {
    /// eBPF programs see the ids of the initial pid namespace only.
    #[error("pclive runs in a pid namespace of its own, where the ids in the kernel's events mean nothing")]
    PidNamespace,
    /// The kernel's structures are not known.
    #[error(transparent)]
    Btf(#[from] btf::BtfError),
    /// The kernel refused the maps, or the object does not suit this kernel.
    #[error("cannot create the maps of the eBPF programs")]
    Maps(#[source] EbpfError),
    /// The kernel's BTF is needed for fentry and cannot be used.
    #[error("cannot use the kernel's BTF")]
    KernelBtf(#[source] aya::BtfError),
    /// A program was refused.
    #[error("the kernel refused the eBPF program {program}")]
    Program {
        /// Its name.
        program: &'static str,
        /// Why; the verifier's log is in the debug log.
        source: io::Error,
    },
    /// A program cannot be attached, or is not as expected.
    #[error("cannot use the eBPF program {program}")]
    Attach {
        /// Its name.
        program: &'static str,
        /// Why.
        #[source]
        source: ProgramError,
    },
    /// A map cannot be used.
    #[error("cannot use the eBPF map {map}")]
    Map {
        /// Its name.
        map: &'static str,
        /// Why.
        #[source]
        source: MapError,
    },
    /// The log of the programs cannot be read.
    #[error("cannot read the log of the eBPF programs")]
    Log(#[source] aya_log::Error),
    /// The container's cgroup cannot be opened.
    #[error("cannot open the cgroup {path}")]
    OpenCgroup {
        /// Its directory in the v2 hierarchy.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The container's processes cannot be listed.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The clock of the events cannot be read.
    #[error("clock_gettime(CLOCK_MONOTONIC)")]
    Clock(#[source] nix::Error),
}

type Result<T, E = ObserveError> = std::result::Result<T, E>;

/// Where write events come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultSource {
    /// Entry of `handle_mm_fault`.
    Fentry,
    /// The raw tracepoints of page faults.
    Tracepoint,
}

/// Sizes in bytes of the rings: powers of two, and whole pages. An event takes 32 bytes.
#[derive(Clone, Copy, Debug)]
pub struct RingSizes {
    /// Ring of write faults.
    pub writes: u32,
    /// Ring of everything else.
    pub changes: u32,
}

impl Default for RingSizes {
    /// Room for every page of 1 GiB, and for 32,768 changes.
    fn default() -> Self {
        Self { writes: 8 << 20, changes: 1 << 20 }
    }
}

/// What is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Writes and processes.
    Writes,
    /// Changes of address spaces too. Every system call of the whole machine becomes some 50 ns slower for it: with it a
    /// server that answers 145,000 requests per second answers 4 % less.
    Everything,
}

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
    writes: RingBuf<MapData>,
    changes: RingBuf<MapData>,
    lost: PerCpuArray<MapData, u64>,
    lost_before: Lost,
    log: EbpfLogger<&'static dyn log::Log>,
    _attached: Ebpf,
}

impl WriteObserver {
    /// Watches a container.
    pub fn attach(container: &Cgroup, source: FaultSource, watch: Watch) -> Result<Self> {
        Self::attach_with(container, source, watch, RingSizes::default())
    }

    /// The same with rings of other sizes.
    pub fn attach_with(
        container: &Cgroup,
        source: FaultSource,
        watch: Watch,
        sizes: RingSizes,
    ) -> Result<Self> {
        let mut programs = Programs::load(source, sizes)?;
        let path = container.path();
        let directory =
            File::open(path).map_err(|source| ObserveError::OpenCgroup { path: path.into(), source })?;
        programs.set_container(directory)?;
        programs.attach(watch)?;
        // Only now, so that no process started meanwhile is missed. One that ended meanwhile stays in the map, unused.
        programs.add_processes(&container.processes()?)?;
        programs.into_observer()
    }

    /// Loads the programs and throws them away.
    pub(super) fn probe(source: FaultSource) -> Result<()> {
        Programs::load(source, RingSizes { writes: PAGE_SIZE as u32, changes: PAGE_SIZE as u32 }).map(drop)
    }

    /// Everything seen since the last call. Never waits.
    pub fn drain(&mut self) -> Result<Drained> {
        self.log.flush();
        let mut drained = Drained::default();
        while let Some(record) = self.writes.next() {
            if let Some(event) = Event::from_record(&record) {
                drained.writes.push(PageWrite {
                    pid: HostPid(event.tgid as i32),
                    page: VirtAddr(event.page()),
                    time: Duration::from_nanos(event.time),
                });
            }
        }
        while let Some(record) = self.changes.next() {
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
        let counts = self.lost.get(&(ring as u32), 0).map_err(of_map(map::LOST))?;
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

/// The loaded programs, not attached yet.
struct Programs {
    ebpf: Ebpf,
    source: FaultSource,
    log: EbpfLogger<&'static dyn log::Log>,
}

impl Programs {
    fn load(source: FaultSource, sizes: RingSizes) -> Result<Self> {
        check_pid_namespace()?;
        let blob = btf::read_vmlinux()?;
        let kernel = btf::Btf::parse(&blob)?;
        let offsets = OFFSETS
            .iter()
            .map(|(global, structure, member)| Ok((*global, kernel.offset_of(structure, member)?)))
            .collect::<Result<Vec<_>>>()?;
        let log_level = log::max_level() as u8;

        let mut loader = EbpfLoader::new();
        for (global, offset) in &offsets {
            loader.override_global(global, offset, true);
        }
        let mut ebpf = loader
            .override_global(aya_log::LEVEL, &log_level, true)
            .map_max_entries(map::WRITES, sizes.writes)
            .map_max_entries(map::CHANGES, sizes.changes)
            .load(OBJECT)
            .map_err(ObserveError::Maps)?;
        let log = EbpfLogger::init(&mut ebpf).map_err(ObserveError::Log)?;
        let mut programs = Self { ebpf, source, log };
        for program in PROCESS_PROGRAMS.into_iter().chain([ADDRESS_SPACE_PROGRAM]) {
            programs.raw_tracepoint(program)?.load().map_err(|error| refusal(program, error))?;
        }
        programs.load_faults()?;
        Ok(programs)
    }

    fn load_faults(&mut self) -> Result<()> {
        match self.source {
            FaultSource::Fentry => {
                let kernel = Btf::from_sys_fs().map_err(ObserveError::KernelBtf)?;
                let load = self.fentry()?.load(FAULT_FUNCTION, &kernel);
                load.map_err(|error| refusal(FAULT_FUNCTION, error))
            }
            FaultSource::Tracepoint => FAULT_TRACEPOINTS.into_iter().try_for_each(|program| {
                self.raw_tracepoint(program)?.load().map_err(|error| refusal(program, error))
            }),
        }
    }

    fn attach(&mut self, watch: Watch) -> Result<()> {
        let of = |program| move |source| ObserveError::Attach { program, source };
        let address_spaces = (watch == Watch::Everything).then_some(ADDRESS_SPACE_PROGRAM);
        for program in PROCESS_PROGRAMS.into_iter().chain(address_spaces) {
            self.raw_tracepoint(program)?.attach(program).map_err(of(program))?;
        }
        match self.source {
            FaultSource::Fentry => self.fentry()?.attach().map(drop).map_err(of(FAULT_FUNCTION)),
            FaultSource::Tracepoint => FAULT_TRACEPOINTS.into_iter().try_for_each(|program| {
                self.raw_tracepoint(program)?.attach(program).map(drop).map_err(of(program))
            }),
        }
    }

    fn set_container(&mut self, cgroup: File) -> Result<()> {
        let mut container: CgroupArray<_> = self.map_mut(map::CONTAINER)?;
        container.set(0, cgroup, 0).map_err(of_map(map::CONTAINER))
    }

    fn add_processes(&mut self, pids: &[HostPid]) -> Result<()> {
        let mut processes: HashMap<_, u32, u8> = self.map_mut(map::PROCESSES)?;
        pids.iter().try_for_each(|pid| processes.insert(pid.0 as u32, 0, 0)).map_err(of_map(map::PROCESSES))
    }

    fn into_observer(mut self) -> Result<WriteObserver> {
        Ok(WriteObserver {
            writes: self.take_map(map::WRITES)?,
            changes: self.take_map(map::CHANGES)?,
            lost: self.take_map(map::LOST)?,
            lost_before: Lost::default(),
            log: self.log,
            _attached: self.ebpf,
        })
    }

    fn raw_tracepoint(&mut self, tracepoint: &'static str) -> Result<&mut RawTracePoint> {
        self.program(tracepoint)
    }

    fn fentry(&mut self) -> Result<&mut FEntry> {
        self.program(FAULT_FUNCTION)
    }

    fn program<'p, P>(&'p mut self, program: &'static str) -> Result<&'p mut P>
    where
        &'p mut P: TryFrom<&'p mut aya::programs::Program, Error = ProgramError>,
    {
        let of = |source| ObserveError::Attach { program, source };
        let found = self.ebpf.program_mut(program).ok_or(ProgramError::UnexpectedProgramType).map_err(of)?;
        found.try_into().map_err(of)
    }

    fn map_mut<'p, M>(&'p mut self, map: &'static str) -> Result<M>
    where
        M: TryFrom<&'p mut aya::maps::Map, Error = MapError>,
    {
        let found = self.ebpf.map_mut(map).ok_or(MapError::KeyNotFound).map_err(of_map(map))?;
        found.try_into().map_err(of_map(map))
    }

    fn take_map<M>(&mut self, map: &'static str) -> Result<M>
    where
        M: TryFrom<aya::maps::Map, Error = MapError>,
    {
        let found = self.ebpf.take_map(map).ok_or(MapError::KeyNotFound).map_err(of_map(map))?;
        found.try_into().map_err(of_map(map))
    }
}

fn of_map(map: &'static str) -> impl Fn(MapError) -> ObserveError {
    move |source| ObserveError::Map { map, source }
}

/// The reason in one line; the verifier's log goes to the debug log.
fn refusal(program: &'static str, error: ProgramError) -> ObserveError {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            tracing::debug!(program, %verifier_log, "refused by the kernel");
            ObserveError::Program { program, source: io_error }
        }
        source => ObserveError::Attach { program, source },
    }
}

fn check_pid_namespace() -> Result<()> {
    match std::fs::read_link("/proc/self/ns/pid") {
        Ok(link) if link.as_os_str() == INITIAL_PID_NAMESPACE => Ok(()),
        _ => Err(ObserveError::PidNamespace),
    }
}

#[cfg(test)]
mod tests;
