//! The eBPF programs on their way into the kernel: loaded, which it may refuse, and attached to one container.
//!
//! Loading costs 50 to 130 ms of processor time, most of it to read the kernel's BTF, and the container's clients may want that
//! processor. So programs are loaded once: those with which a tier was tried are those that are attached.

use super::btf;
use super::mapping_flags::MappingFlags;
use super::option_watch::StoredMarks;
use crate::runtime::{Cgroup, CgroupError};
use aya::{
    Btf, Ebpf, EbpfError, EbpfLoader,
    maps::{CgroupArray, HashMap, MapData, MapError, PerCpuArray, RingBuf},
    programs::{CgroupAttachMode, CgroupSockopt, FEntry, ProgramError, RawTracePoint},
};
use aya_log::EbpfLogger;
use pclive_wire::HostPid;
use std::{fs::File, io, path::PathBuf, sync::OnceLock};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/pclive-ebpf"));

/// Names of the object's maps.
pub(super) mod map {
    pub const WRITES: &str = "WRITES";
    pub const CHANGES: &str = "CHANGES";
    pub const LOST: &str = "LOST";
    pub const CONTAINER: &str = "CONTAINER";
    pub const PROCESSES: &str = "PROCESSES";
    pub const OPTIONS_UNCHANGED: &str = "OPTIONS_UNCHANGED";
    pub const FLAG_QUESTION: &str = "FLAG_QUESTION";
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
/// The offset that [`FLAGS_PROGRAM`] needs.
const VMA_FLAGS: (&str, &str, &str) = ("VMA_FLAGS", "vm_area_struct", "vm_flags");

/// Raw tracepoints of processes; each program has its tracepoint's name.
const PROCESS_PROGRAMS: [&str; 3] = ["sched_process_fork", "sched_process_exec", "sched_process_exit"];
/// The raw tracepoint behind which address spaces have changed.
const ADDRESS_SPACE_PROGRAM: &str = "sys_exit";
/// The hook of the cgroup that sees options of sockets being set (Linux 5.3).
const OPTIONS_PROGRAM: &str = "setsockopt";
/// The raw tracepoint at which a process is asked for the flags of its mappings (`bpf_find_vma`, Linux 5.17).
const FLAGS_PROGRAM: &str = "sched_process_wait";
const FAULT_TRACEPOINTS: [&str; 2] = ["page_fault_user", "page_fault_kernel"];
pub(super) const FAULT_FUNCTION: &str = "handle_mm_fault";

/// `PROC_PID_INIT_INO`: inode of the initial pid namespace (`include/uapi/linux/nsfs.h` since 6.18, the same since 3.8).
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";

/// How much the programs log, which is compiled into them.
static LOG_LEVEL: OnceLock<u8> = OnceLock::new();

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

/// Has the kernel accept programs. One for all attempts: making it reads the kernel's BTF.
pub struct ProgramLoader {
    aya: EbpfLoader<'static>,
}

impl ProgramLoader {
    /// A loader for the running kernel.
    pub fn new() -> Result<Self> {
        check_pid_namespace()?;
        let log_level = LOG_LEVEL.get_or_init(|| log::max_level() as u8);
        let mut aya = EbpfLoader::new();
        aya.override_global(aya_log::LEVEL, log_level, true);
        for (global, offset) in offsets()? {
            aya.override_global(global, offset, true);
        }
        Ok(Self { aya })
    }

    /// Loads the programs that `watch` needs, with events from `source`.
    pub fn load(&mut self, source: FaultSource, watch: Watch, sizes: RingSizes) -> Result<Programs> {
        let mut ebpf = self
            .aya
            .map_max_entries(map::WRITES, sizes.writes)
            .map_max_entries(map::CHANGES, sizes.changes)
            .load(OBJECT)
            .map_err(ObserveError::Maps)?;
        let log = EbpfLogger::init(&mut ebpf).map_err(ObserveError::Log)?;
        let mut programs = Programs { ebpf, source, watch, log };
        // First, what the kernel may refuse.
        programs.load_faults()?;
        for program in programs.without_faults() {
            programs.raw_tracepoint(program)?.load().map_err(|error| refusal(program, error))?;
        }
        // It is faster with these, and works without.
        let _ = programs.load_options().inspect_err(no_options);
        let _ = programs.load_flags().inspect_err(no_flags);
        Ok(programs)
    }
}

/// Where the programs find what they read in the running kernel's structures, by the global that tells them.
fn offsets() -> Result<&'static [(&'static str, u64)]> {
    static FOUND: OnceLock<Vec<(&str, u64)>> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(found);
    }
    let blob = btf::read_vmlinux()?;
    let kernel = btf::Btf::parse(&blob)?;
    let of = |(global, structure, member)| Ok((global, kernel.offset_of(structure, member)?));
    let mut found = OFFSETS.into_iter().map(of).collect::<Result<Vec<_>>>()?;
    // Not known to the program, it says nothing that is true.
    found.extend(of(VMA_FLAGS).ok());
    Ok(FOUND.get_or_init(|| found))
}

/// Programs that the kernel has accepted, not attached yet.
pub struct Programs {
    ebpf: Ebpf,
    source: FaultSource,
    watch: Watch,
    log: EbpfLogger<&'static dyn log::Log>,
}

impl Programs {
    /// Attaches them to a container.
    pub fn attach(mut self, container: &Cgroup) -> Result<Attached> {
        let path = container.path();
        let directory =
            File::open(path).map_err(|source| ObserveError::OpenCgroup { path: path.into(), source })?;
        let options = self.attach_options(&directory).inspect_err(no_options).ok();
        let flags = self.attach_flags().inspect_err(no_flags).ok().flatten();
        self.set_container(directory)?;
        self.attach_all()?;
        // Only now, so that no process started meanwhile is missed. One that ended meanwhile stays in the map, unused.
        self.add_processes(&container.processes()?)?;
        Ok(Attached {
            writes: self.take_map(map::WRITES)?,
            changes: self.take_map(map::CHANGES)?,
            lost: self.take_map(map::LOST)?,
            options,
            flags,
            log: self.log,
            _programs: self.ebpf,
        })
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

    fn load_options(&mut self) -> Result<()> {
        let program: &mut CgroupSockopt = self.program(OPTIONS_PROGRAM)?;
        program.load().map_err(|error| refusal(OPTIONS_PROGRAM, error))
    }

    fn load_flags(&mut self) -> Result<()> {
        self.raw_tracepoint(FLAGS_PROGRAM)?.load().map_err(|error| refusal(FLAGS_PROGRAM, error))
    }

    fn attach_flags(&mut self) -> Result<Option<MappingFlags>> {
        let of = |source| ObserveError::Attach { program: FLAGS_PROGRAM, source };
        let program = self.raw_tracepoint(FLAGS_PROGRAM)?;
        let link = program.attach(FLAGS_PROGRAM).and_then(|link| program.take_link(link)).map_err(of)?;
        Ok(MappingFlags::new(self.take_map(map::FLAG_QUESTION)?, link))
    }

    fn attach_options(&mut self, cgroup: &File) -> Result<StoredMarks> {
        let of = |source| ObserveError::Attach { program: OPTIONS_PROGRAM, source };
        let program: &mut CgroupSockopt = self.program(OPTIONS_PROGRAM)?;
        // A link takes no flags, and others may attach beside it (`cgroup_bpf_link_attach` in kernel/bpf/cgroup.c).
        let link = program.attach(cgroup, CgroupAttachMode::Single).map_err(of)?;
        let link = program.take_link(link).map_err(of)?;
        Ok(StoredMarks::new(self.take_map(map::OPTIONS_UNCHANGED)?, link))
    }

    /// The programs besides those that see faults; each has its tracepoint's name.
    fn without_faults(&self) -> impl Iterator<Item = &'static str> + use<> {
        let address_spaces = (self.watch == Watch::Everything).then_some(ADDRESS_SPACE_PROGRAM);
        PROCESS_PROGRAMS.into_iter().chain(address_spaces)
    }

    fn attach_all(&mut self) -> Result<()> {
        let of = |program| move |source| ObserveError::Attach { program, source };
        for program in self.without_faults() {
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

/// What attached programs write to; they are detached when it is dropped.
pub struct Attached {
    /// Ring of write faults.
    pub writes: RingBuf<MapData>,
    /// Ring of everything else.
    pub changes: RingBuf<MapData>,
    /// Events that found a ring full, by [`pclive_abi::Ring`].
    pub lost: PerCpuArray<MapData, u64>,
    /// Notices that options of sockets are set, where that is possible.
    pub options: Option<StoredMarks>,
    /// Tells the flags of mappings, where that is possible.
    pub flags: Option<MappingFlags>,
    /// What the programs have to say themselves.
    pub log: EbpfLogger<&'static dyn log::Log>,
    _programs: Ebpf,
}

pub(super) fn of_map(map: &'static str) -> impl Fn(MapError) -> ObserveError {
    move |source| ObserveError::Map { map, source }
}

fn no_options(error: &ObserveError) {
    tracing::debug!(?error, "options of sockets are read in the blackout");
}

fn no_flags(error: &ObserveError) {
    tracing::debug!(?error, "flags of mappings that change are read from smaps");
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
