//! The questions that `pclive check` asks a host.

use crate::capture::{process::prepare_injection, vmas::find_vdso};
use crate::engine::awake::Awake;
use crate::host::{accesses_all_memory, has_capability};
use crate::track::{Tier, programs::ObserveError};
use anyhow::{Context, Result, bail, ensure};
use pclive_sys::{
    kcmp,
    pagemap::{Filter, Pagemap},
    pidfd::{pidfd_getfd, pidfd_open},
    prctl::can_name_timers,
    sock_diag::SockDiag,
    sockopt, tcp,
    uffd::{Features, Uffd},
};
use pclive_wire::{HostPid, PageRange, VirtAddr};
use std::{
    fs::{self, File},
    io::ErrorKind,
    os::fd::{AsFd, AsRawFd},
    process::Command,
};

/// One question.
pub struct Probe {
    /// What is asked for.
    pub name: &'static str,
    /// Whether every migration needs it.
    pub required: bool,
    /// What is lost without it.
    pub without: &'static str,
    /// Answers with what was found, or why it was not.
    pub run: fn() -> Result<String>,
}

const fn need(name: &'static str, without: &'static str, run: fn() -> Result<String>) -> Probe {
    Probe { name, required: true, without, run }
}

const fn want(name: &'static str, without: &'static str, run: fn() -> Result<String>) -> Probe {
    Probe { name, required: false, without, run }
}

/// All questions, in the order of the answer.
pub const PROBES: &[Probe] = &[
    need("kernel", "pclive knows the registers and system calls of x86-64 Linux only", kernel),
    need("asynchronous write-protect", "writes cannot be tracked, in no tier (Linux 6.7)", write_protect),
    need("PAGEMAP_SCAN", "the pages that were written cannot be listed (Linux 6.7)", pagemap_scan),
    need(
        "protected memory",
        "what a process has protected from itself would be lost (proc_mem.force_override, Linux 6.12)",
        protected_memory,
    ),
    want(
        "room behind the vDSO",
        "a process dies if pclive is killed while one of its threads makes calls for it",
        way_back,
    ),
    want("tracker fentry", "the next tier is used; writes through get_user_pages show in scans only", fentry),
    want(
        "tracker tracepoint",
        "without fentry too, when and how often pages are written is unknown",
        tracepoint,
    ),
    need("CAP_SYS_PTRACE", "memory, registers and descriptors of containers cannot be read", || {
        capability(19)
    }),
    need("CAP_SYS_ADMIN", "namespaces and cgroups of containers cannot be entered", || capability(21)),
    need("CAP_NET_ADMIN", "TCP connections and network links cannot be moved", || capability(12)),
    need("set_tid", "processes cannot get the ids that they had (clone3, Linux 5.5)", set_tid),
    want("CAP_SYS_NICE", "freezing competes with busy CPUs: milliseconds more blackout", || capability(23)),
    want(
        "processors awake",
        "in the blackout threads wait for idle processors to wake up: up to some milliseconds in all",
        processors_awake,
    ),
    want("CAP_SYS_RESOURCE", "resource limits above pclive's own cannot be given to processes", || {
        capability(24)
    }),
    want("CAP_BPF, CAP_PERFMON", "no eBPF: tier scan is used", bpf_capabilities),
    need("pidfd_getfd", "open files of containers cannot be taken over (Linux 5.6)", pidfd),
    need("kcmp", "which processes share files, memory or handlers cannot be told (CONFIG_KCMP)", kcmp),
    need("/proc/PID/timers", "POSIX timers of containers would be lost (CONFIG_CHECKPOINT_RESTORE)", timers),
    want(
        "timer ids",
        "POSIX timers get their ids by counting: those of a process with many deleted ones may be out of reach (Linux 6.15)",
        timer_ids,
    ),
    need(
        "sock_diag",
        "sockets cannot be found and described (CONFIG_INET_DIAG, CONFIG_UNIX_DIAG)",
        sock_diag,
    ),
    need("TCP_REPAIR", "TCP connections cannot be moved (CONFIG_CHECKPOINT_RESTORE)", tcp_repair),
    want("MSG_ZEROCOPY", "pages are copied once more when they are sent", zerocopy),
    need("cgroup v2", "containers cannot be told apart, frozen or traced", cgroup_v2),
    need("runtime", "neither runc nor crun is there to make the container at the destination", runtimes),
];

fn kernel() -> Result<String> {
    let uname = nix::sys::utsname::uname().context("uname")?;
    let machine = uname.machine().to_string_lossy();
    ensure!(machine == "x86_64", "this is {machine}");
    Ok(format!("Linux {} on {machine}", uname.release().to_string_lossy()))
}

fn write_protect() -> Result<String> {
    Uffd::of_self(Features::TRACKING)?;
    Ok("userfaultfd with WP_ASYNC and WP_UNPOPULATED".into())
}

fn protected_memory() -> Result<String> {
    accesses_all_memory()?;
    Ok("wrote to a page of pclive's own that must not be written".into())
}

fn pagemap_scan() -> Result<String> {
    // Any page will do, also one that is not mapped.
    let page = PageRange::new(VirtAddr(0x1000), 1);
    Pagemap::open(own_pid())?.scan(page, Filter::default(), &mut Vec::new())?;
    Ok("scanned a page of pclive's own".into())
}

fn way_back() -> Result<String> {
    let pid = own_pid();
    let vdso = find_vdso(pid)?.context("this process has no vDSO")?;
    let (_, footing) = prepare_injection(pid, Some(vdso))?;
    let threads = footing.most_members().context("none")?;
    Ok(format!("for {} threads at a time", threads + 1))
}

fn tier(tier: Tier) -> Result<String> {
    match tier.probe() {
        Ok(()) => Ok("the kernel accepts its eBPF programs".into()),
        Err(error) if is_denied(&error) && bpf_capabilities().is_ok() => {
            Err(error).context("not a matter of capabilities: kernel lockdown or a security module")
        }
        Err(error) => Err(error.into()),
    }
}

fn is_denied(error: &ObserveError) -> bool {
    matches!(error, ObserveError::Program { source, .. } if source.kind() == ErrorKind::PermissionDenied)
}

fn fentry() -> Result<String> {
    tier(Tier::Fentry)
}

fn tracepoint() -> Result<String> {
    tier(Tier::Tracepoint)
}

fn capability(number: u32) -> Result<String> {
    ensure!(has_capability(number)?, "not in pclive's effective set");
    Ok("effective".into())
}

fn bpf_capabilities() -> Result<String> {
    capability(39).and(capability(38))
}

fn set_tid() -> Result<String> {
    // CAP_CHECKPOINT_RESTORE is number 40 since Linux 5.9; before, and still, CAP_SYS_ADMIN is enough.
    capability(40).map(|_| "CAP_CHECKPOINT_RESTORE".into()).or_else(|_| {
        capability(21)
            .map(|_| "CAP_SYS_ADMIN".into())
            .context("neither CAP_CHECKPOINT_RESTORE nor CAP_SYS_ADMIN")
    })
}

fn own_pid() -> HostPid {
    HostPid(std::process::id() as i32)
}

fn pidfd() -> Result<String> {
    let pidfd = pidfd_open(own_pid()).context("pidfd_open")?;
    pidfd_getfd(pidfd.as_fd(), pidfd.as_raw_fd()).context("pidfd_getfd")?;
    Ok("took over a descriptor of pclive's own".into())
}

fn kcmp() -> Result<String> {
    let file = File::open("/proc/self/status").context("open /proc/self/status")?;
    let fd = (own_pid(), file.as_raw_fd());
    ensure!(kcmp::compare_files(fd, fd).context("kcmp")?.is_eq(), "kcmp finds a file different from itself");
    Ok("compared a descriptor of pclive's own".into())
}

fn timers() -> Result<String> {
    fs::read_to_string("/proc/self/timers").context("read /proc/self/timers")?;
    Ok("readable".into())
}

fn timer_ids() -> Result<String> {
    ensure!(can_name_timers(), "this kernel chooses them");
    Ok("PR_TIMER_CREATE_RESTORE_IDS".into())
}

fn sock_diag() -> Result<String> {
    const LISTEN: u32 = 1 << 10;
    let mut tables = SockDiag::open().context("open a sock_diag socket")?;
    tables.unix().context("list unix sockets")?;
    tables.tcp(LISTEN).context("list TCP sockets")?;
    Ok("unix and TCP".into())
}

fn tcp_socket() -> Result<impl AsFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("make a TCP socket")
}

fn tcp_repair() -> Result<String> {
    let socket = tcp_socket()?;
    tcp::Repair::enter(socket.as_fd()).context("enter repair mode")?.leave().context("leave repair mode")?;
    Ok("entered and left on a socket of pclive's own".into())
}

fn processors_awake() -> Result<String> {
    Awake::keep().context("/dev/cpu_dma_latency")?;
    Ok("idle ones can be kept from sleeping".into())
}

fn zerocopy() -> Result<String> {
    sockopt::set_int(tcp_socket()?.as_fd(), libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1)
        .context("set SO_ZEROCOPY")?;
    Ok("accepted; whether it pays depends on the network device".into())
}

fn cgroup_v2() -> Result<String> {
    let mounts = fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
    let of_type = |wanted: &str| {
        let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        fields
            .filter(|fields| fields.get(2) == Some(&wanted))
            .map(|fields| fields[1].to_owned())
            .collect::<Vec<_>>()
    };
    let v2 = of_type("cgroup2");
    let Some(mount) = v2.first() else { bail!("no cgroup2 file system is mounted") };
    let layout = match of_type("cgroup").len() {
        0 => "unified".to_owned(),
        controllers => format!("hybrid, {controllers} hierarchies of version 1"),
    };
    Ok(format!("{layout}, version 2 at {mount}"))
}

fn runtimes() -> Result<String> {
    let found: Vec<_> = ["runc", "crun"].into_iter().filter_map(version).collect();
    ensure!(!found.is_empty(), "neither runc nor crun is in PATH");
    Ok(found.join(", "))
}

/// The first line of what `program --version` says.
fn version(program: &str) -> Option<String> {
    let output =
        Command::new(program).arg("--version").output().ok().filter(|output| output.status.success())?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
}
