//! Network namespaces: how a host, the switch, the client and each container get a network of their own.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::command::{run, run_with_input};

/// Where iproute2 binds network namespaces.
const NETNS_DIR: &str = "/run/netns";
/// How long processes may take to die from SIGKILL. One that unmaps gigabytes needs a while.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// A network namespace bound at a path, so that it exists without a process.
#[derive(Debug, Clone)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes the namespace, with its loopback up.
    pub(super) fn create(name: String) -> Result<Self> {
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let netns = Self { name };
        netns.ip("link set lo up")?;
        // Duplicate address detection would keep an address from use for its first second.
        netns.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        netns.sysctl("net/ipv6/conf/all/accept_dad", "0")?;
        // Every kernel has it and lets a namespace choose it. The machine's own may pace each connection by a timer.
        netns.sysctl("net/ipv4/tcp_congestion_control", "reno")?;
        Ok(netns)
    }

    /// The namespace of that name, which was created before.
    pub(super) fn named(name: String) -> Self {
        Self { name }
    }

    /// Every namespace whose name starts with `prefix`.
    pub(super) fn with_prefix(prefix: &str) -> Vec<Self> {
        let entries = fs::read_dir(NETNS_DIR).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .map(|name| Self { name })
            .collect()
    }

    /// Its name, as iproute2 knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file it is bound to: what an OCI configuration takes as the path of a namespace.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(NETNS_DIR).join(&self.name)
    }

    /// A command that runs `program` in this namespace and leaves everything else as it is.
    ///
    /// Not `ip netns exec`: that mounts a fresh `/sys`, without the cgroups below it. `nsenter` executes the program
    /// in its own place, so the child's pid is the program's.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Calls `action` in a thread that is in this namespace: a socket made there stays there.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn enter<T: Send>(&self, action: impl FnOnce() -> T + Send) -> Result<T> {
        let file = fs::File::open(self.path()).with_context(|| format!("open {}", self.path().display()))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(file, CloneFlags::CLONE_NEWNET).context("setns")?;
                Ok(action())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs lines of `ip` commands in this namespace.
    ///
    /// # Errors
    /// When one of them fails.
    pub fn ip(&self, batch: &str) -> Result<()> {
        run_with_input(Command::new("ip").args(["-n", &self.name, "-batch", "-"]), batch).map(drop)
    }

    /// Runs lines of `tc` commands in this namespace.
    pub(super) fn tc(&self, batch: &str) -> Result<()> {
        run_with_input(Command::new("tc").args(["-n", &self.name, "-batch", "-"]), batch).map(drop)
    }

    /// Writes a setting of this namespace; `name` is its path below `/proc/sys`.
    pub(super) fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let file = format!("/proc/sys/{name}");
        run_with_input(self.command("tee").arg(file), value).map(drop)
    }

    /// The processes that have this namespace as their own.
    pub(super) fn pids(&self) -> Result<Vec<Pid>> {
        let inode = match fs::metadata(self.path()) {
            Ok(metadata) => metadata.ino(),
            Err(gone) if gone.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("stat {}", self.path().display())),
        };
        let mut pids = Vec::new();
        for entry in fs::read_dir("/proc").context("read /proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // A process that ends meanwhile is one less to find.
            let same = fs::metadata(entry.path().join("ns/net")).is_ok_and(|found| found.ino() == inode);
            if same {
                pids.push(Pid::from_raw(pid));
            }
        }
        Ok(pids)
    }

    /// Kills every process in this namespace and waits until none is left.
    pub(super) fn kill_all(&self) -> Result<()> {
        let end = Instant::now() + KILL_TIMEOUT;
        loop {
            let pids = self.pids()?;
            if pids.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("{pids:?} in network namespace {} outlive SIGKILL", self.name);
            }
            for pid in pids {
                // It may be gone by now; what counts is the next look.
                let _ = kill(pid, Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Removes the namespace and, with it, its links.
    pub(super) fn delete(&self) -> Result<()> {
        run(Command::new("ip").args(["netns", "del", &self.name])).map(drop)
    }
}
