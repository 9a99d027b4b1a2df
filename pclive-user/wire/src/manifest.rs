//! The manifest: everything about a container that is not page contents.
//!
//! Every round brings a whole manifest; the destination makes its skeleton equal to it. Manifests taken while the
//! container runs carry the layout (process tree, VMAs); the one taken after the freeze also carries what only a
//! stopped container has ([`ProcessState`], [`ThreadState`], [`Description`]s). It takes the same path.

mod sockets;

pub use sockets::{OptionValue, SocketOption, TcpConnection, TcpSocket, TcpState, UnixPeer, UnixSocket};

use crate::limits::{MAX_DESCRIPTIONS, MAX_PENDING_SIGNALS, MAX_PROCESSES, at_most};
use crate::units::{NsPid, PageRange, Round, VirtAddr};
use serde::{Deserialize, Serialize};

/// The state of a container at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The round whose pages belong to this layout.
    pub round: Round,
    /// The container stands still, and is to do so for a short time only: no processor of the destination is to sleep.
    pub keep_awake: bool,
    /// Every `state` is present, and no round follows.
    pub last: bool,
    /// How far placing these pages steps back behind other work of the destination, as a nice value; 0 after the freeze.
    pub nice: u8,
    /// Parents come before their children; the first is PID 1.
    #[serde(deserialize_with = "at_most::<MAX_PROCESSES, _, _>")]
    pub processes: Vec<Process>,
    /// Open file descriptions; empty unless `last`.
    #[serde(deserialize_with = "at_most::<MAX_DESCRIPTIONS, _, _>")]
    pub descriptions: Vec<Description>,
}

/// One process (thread group) with its own mm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Thread group id in the container's pid namespace.
    pub pid: NsPid,
    /// Parent; 0 for PID 1.
    pub ppid: NsPid,
    /// Process group.
    pub pgid: NsPid,
    /// Session.
    pub sid: NsPid,
    /// Path of the executable, in the container's mount namespace.
    #[serde(with = "serde_bytes")]
    pub exe: Vec<u8>,
    /// Address-space bounds and auxiliary vector.
    pub mm: MmBounds,
    /// Mappings, sorted, not overlapping.
    pub vmas: Vec<Vma>,
    /// Threads; the first is the leader (`tid == pid`).
    pub threads: Vec<Thread>,
    /// How many descriptors its table can hold by now (`FDSize` of proc_pid_status(5)): the destination makes as much
    /// room ahead of the blackout.
    pub fd_size: u32,
    /// What only a frozen process has. Boxed, so that a peer's list of empty processes costs little memory to decode.
    pub state: Option<Box<ProcessState>>,
}

/// What `PR_SET_MM_MAP` sets: see `struct prctl_mm_map` in `linux/prctl.h` (Linux 3.18).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the kernel's own field names
pub struct MmBounds {
    pub start_code: VirtAddr,
    pub end_code: VirtAddr,
    pub start_data: VirtAddr,
    pub end_data: VirtAddr,
    pub start_brk: VirtAddr,
    pub brk: VirtAddr,
    pub start_stack: VirtAddr,
    pub arg_start: VirtAddr,
    pub arg_end: VirtAddr,
    pub env_start: VirtAddr,
    pub env_end: VirtAddr,
    /// `/proc/PID/auxv`, verbatim.
    #[serde(with = "serde_bytes")]
    pub auxv: Vec<u8>,
}

/// One mapping, as a line of `/proc/PID/maps` plus the flags of `smaps`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vma {
    /// Where.
    pub range: PageRange,
    /// `PROT_READ`, `PROT_WRITE`, `PROT_EXEC` bits.
    pub prot: u8,
    /// What `madvise`, `mlock` and `mmap` flags asked for.
    pub flags: VmaFlags,
    /// What backs it.
    pub backing: Backing,
}

impl Vma {
    /// Whether it has pages of its own, which must travel: not those of a file or of memory that others share.
    pub fn has_own_pages(&self) -> bool {
        match self.backing {
            Backing::Anonymous => true,
            Backing::File { shared, .. } => !shared,
            Backing::Shared { .. } | Backing::Special(_) => false,
        }
    }
}

/// Mapping attributes that must be set again at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmaFlags(pub u16);

#[allow(missing_docs)] // one bit for each `VmFlags` code of proc_pid_smaps(5)
impl VmaFlags {
    pub const GROWSDOWN: u16 = 1; // gd
    pub const NORESERVE: u16 = 1 << 1; // nr
    pub const LOCKED: u16 = 1 << 2; // lo
    pub const DONTFORK: u16 = 1 << 3; // dc
    pub const WIPEONFORK: u16 = 1 << 4; // wf
    pub const DONTDUMP: u16 = 1 << 5; // dd
    pub const HUGEPAGE: u16 = 1 << 6; // hg
    pub const NOHUGEPAGE: u16 = 1 << 7; // nh
    pub const MERGEABLE: u16 = 1 << 8; // mg
    pub const SEQUENTIAL: u16 = 1 << 9; // sr
    pub const RANDOM: u16 = 1 << 10; // rr
    /// Every bit that has a meaning.
    pub const ALL: u16 = (1 << 11) - 1;
    /// Those that a mapping has for good.
    pub const FIXED: u16 = Self::GROWSDOWN | Self::NORESERVE;

    /// Whether all bits of `flag` are set.
    pub fn has(self, flag: u16) -> bool {
        self.0 & flag == flag
    }
}

/// What a mapping shows.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Backing {
    /// Private anonymous memory (heap and stacks included).
    Anonymous,
    /// A regular file. Private mappings carry pages only where they differ from the file.
    File {
        /// Path in the container's mount namespace.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Offset of the first byte in the file.
        offset: u64,
        /// `MAP_SHARED`.
        shared: bool,
        /// Size of the file in bytes, which the destination's file must have too.
        size: u64,
    },
    /// Shared anonymous memory or memfd: contents belong to the object and are sent once.
    Shared {
        /// The object, numbered within this manifest.
        object: u32,
        /// Offset of the first byte in the object.
        offset: u64,
        /// Size of the object in bytes.
        size: u64,
    },
    /// The vDSO and its data pages, by the name `/proc/PID/maps` gives (`[vdso]`, `[vvar]`, `[vvar_vclock]`).
    Special(SpecialMapping),
}

/// Mappings that the kernel makes at exec; at the destination they are moved, not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SpecialMapping {
    /// `[vdso]`: code.
    Vdso,
    /// `[vvar]`: time data.
    Vvar,
    /// `[vvar_vclock]`: paravirtual clock pages (Linux 6.13).
    VvarVclock,
}

/// One thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// Thread id in the container's pid namespace.
    pub tid: NsPid,
    /// What only a stopped thread shows. Boxed for the same reason as [`Process::state`].
    pub state: Option<Box<ThreadState>>,
}

/// A stopped thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadState {
    /// General registers (`NT_PRSTATUS`, `struct user_regs_struct`), already set up to restart an interrupted call.
    pub registers: Registers,
    /// `NT_X86_XSTATE`, verbatim.
    #[serde(with = "serde_bytes")]
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub blocked: u64,
    /// Pending signals directed at this thread: raw 128-byte `siginfo_t`s.
    #[serde(deserialize_with = "at_most::<MAX_PENDING_SIGNALS, _, _>")]
    pub pending: Vec<Vec<u8>>,
    /// `sigaltstack(2)`.
    pub altstack: AltStack,
    /// `get_robust_list(2)`: head and length.
    pub robust_list: (VirtAddr, u64),
    /// `set_tid_address(2)`.
    pub clear_child_tid: VirtAddr,
    /// `rseq(2)` registration, if any (`PTRACE_GET_RSEQ_CONFIGURATION`, Linux 5.13).
    pub rseq: Option<Rseq>,
    /// `PR_GET_NAME`, without the NUL.
    #[serde(with = "serde_bytes")]
    pub comm: Vec<u8>,
    /// `PR_GET_PDEATHSIG`.
    pub parent_death_signal: i32,
    /// `PR_GET_TIMERSLACK` in nanoseconds.
    pub timer_slack_ns: u64,
    /// Credentials; the kernel keeps them per thread.
    pub credentials: Credentials,
    /// Scheduling policy, nice value and real-time priority.
    pub scheduling: Scheduling,
}

/// `struct user_regs_struct` of x86-64, in the kernel's order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // register names
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

/// `stack_t`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct AltStack {
    pub sp: VirtAddr,
    pub flags: i32,
    pub size: u64,
}

/// A registered restartable-sequences area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Rseq {
    pub address: VirtAddr,
    pub size: u32,
    pub signature: u32,
    pub flags: u32,
}

/// `credentials(7)` and `capabilities(7)` of one thread, as ids of the container's user namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Credentials {
    /// Real, effective, saved, filesystem.
    pub uids: [u32; 4],
    /// Real, effective, saved, filesystem.
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    pub inheritable: u64,
    pub permitted: u64,
    pub effective: u64,
    pub bounding: u64,
    pub ambient: u64,
    pub securebits: u32,
    pub no_new_privs: bool,
}

/// `sched(7)` attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Scheduling {
    pub policy: i32,
    pub priority: i32,
    pub nice: i32,
    /// CPUs that the thread is bound to; empty if it may use all of the host.
    pub cpus: Vec<u16>,
}

/// A frozen process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessState {
    /// Working directory, a path in the container.
    #[serde(with = "serde_bytes")]
    pub cwd: Vec<u8>,
    /// `umask(2)`.
    pub umask: u32,
    /// Soft and hard limit for each `RLIMIT_*`, in the kernel's numbering.
    pub limits: Vec<(u64, u64)>,
    /// `PR_GET_DUMPABLE`.
    pub dumpable: u32,
    /// `PR_GET_CHILD_SUBREAPER`.
    pub child_subreaper: bool,
    /// `personality(2)`.
    pub personality: u32,
    /// `/proc/PID/oom_score_adj`.
    pub oom_score_adj: i32,
    /// Signal actions for signals 1 to 64.
    pub actions: Vec<SigAction>,
    /// Pending signals directed at the process: raw 128-byte `siginfo_t`s.
    #[serde(deserialize_with = "at_most::<MAX_PENDING_SIGNALS, _, _>")]
    pub pending: Vec<Vec<u8>>,
    /// `ITIMER_REAL`, `ITIMER_VIRTUAL`, `ITIMER_PROF`.
    pub itimers: [ItimerSpec; 3],
    /// POSIX timers (`timer_create(2)`).
    pub timers: Vec<PosixTimer>,
    /// The descriptor table.
    pub fds: Vec<FdEntry>,
}

/// The kernel's `struct sigaction` (x86-64: `rt_sigaction(2)` with an 8-byte mask).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SigAction {
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

/// `struct itimerval`, in microseconds: time to the next expiry and interval; both 0 when disarmed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ItimerSpec {
    pub value_us: u64,
    pub interval_us: u64,
}

/// A POSIX per-process timer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// The kernel's timer id, which the process keeps using.
    pub id: i32,
    /// Clock.
    pub clock: i32,
    /// `sigev_notify`.
    pub notify: i32,
    /// `sigev_signo`.
    pub signal: i32,
    /// `sigev_value`.
    pub value: u64,
    /// Thread for `SIGEV_THREAD_ID`; else 0.
    pub thread: NsPid,
    /// Nanoseconds to the next expiry; 0 when disarmed.
    pub value_ns: u64,
    /// Interval in nanoseconds.
    pub interval_ns: u64,
}

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdEntry {
    /// Descriptor number.
    pub fd: i32,
    /// `FD_CLOEXEC`.
    pub cloexec: bool,
    /// The open file description it names.
    pub description: DescriptionId,
}

/// Number of an open file description within a manifest: its index in [`Manifest::descriptions`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DescriptionId(pub u32);

/// An open file description (`open(2)`), shared by every descriptor that names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Status flags and access mode as in `/proc/PID/fdinfo/FD` (octal there), without `O_CLOEXEC`.
    pub flags: u32,
    /// `F_GETOWN_EX` type and id, `F_GETSIG`; zeros when unset.
    pub owner: (i32, i32, i32),
    /// What it is open on.
    pub kind: DescriptionKind,
}

/// What an open file description refers to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DescriptionKind {
    /// A stream that came from outside the container (the runtime's): replaced by the destination runtime's own.
    Stdio {
        /// 0, 1 or 2: which of the runtime's streams.
        stream: u8,
    },
    /// A regular file that has a name.
    Regular {
        /// Path in the container's mount namespace.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// File offset.
        offset: u64,
        /// Size in bytes, which the destination's file must have too.
        size: u64,
    },
    /// A regular file without a name: its contents travel.
    Unlinked {
        /// Open files on the same inode carry the same number, and the contents once.
        inode: u32,
        /// File offset.
        offset: u64,
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Directory of the lost name; the destination makes the file with `O_TMPFILE` there.
        #[serde(with = "serde_bytes")]
        directory: Vec<u8>,
        /// The bytes; empty if another description with the same `inode` carries them.
        #[serde(with = "serde_bytes")]
        contents: Vec<u8>,
    },
    /// A directory.
    Directory {
        /// Path in the container.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// `getdents` position.
        offset: u64,
    },
    /// A character device that keeps no state in the description (null, zero, full, random, urandom).
    Device {
        /// Path in the container.
        #[serde(with = "serde_bytes")]
        path: Vec<u8>,
        /// Device number.
        rdev: u64,
    },
    /// One end of a pipe.
    Pipe {
        /// Both ends carry the same number.
        pipe: u32,
        /// Capacity in bytes.
        capacity: u32,
        /// Unread bytes; carried by one description of the pipe, empty in the others.
        #[serde(with = "serde_bytes")]
        contents: Vec<u8>,
    },
    /// `eventfd(2)`.
    Eventfd {
        /// Counter.
        count: u64,
        /// `EFD_SEMAPHORE`.
        semaphore: bool,
    },
    /// `epoll(7)`.
    Epoll {
        /// Watched descriptors, in a process that has this description and the watched ones.
        targets: Vec<EpollTarget>,
    },
    /// `timerfd_create(2)`.
    Timerfd {
        /// Clock.
        clock: i32,
        /// Unread expirations.
        ticks: u64,
        /// Nanoseconds to the next expiry; 0 when disarmed.
        value_ns: u64,
        /// Interval in nanoseconds.
        interval_ns: u64,
    },
    /// `signalfd(2)`.
    Signalfd {
        /// Signals accepted.
        mask: u64,
    },
    /// A unix-domain socket of an unnamed or abstract pair, or a listener.
    Unix(Box<UnixSocket>),
    /// A TCP socket.
    Tcp(Box<TcpSocket>),
}

/// A descriptor in an epoll interest list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollTarget {
    /// Process whose descriptor number counts.
    pub process: NsPid,
    /// Watched descriptor.
    pub fd: i32,
    /// `EPOLL*` bits.
    pub events: u32,
    /// User data.
    pub data: u64,
}
