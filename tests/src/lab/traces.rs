//! What is left of a container on a host.

use std::fs;

use anyhow::Result;
use nix::unistd::Pid;

use super::{Host, Lab, cgroup};
use crate::identity::processes;

impl Lab {
    /// Everything of a container that `host` still has, one line each; empty if it is as if the container had never
    /// been there. Its bundle and its network namespace are the host owner's and stay.
    ///
    /// # Errors
    /// When the runtime or the kernel does not tell.
    pub fn traces(&self, host: &Host, container: &str) -> Result<Vec<String>> {
        let mut found = Vec::new();
        if let Some(state) = host.state(container)? {
            found.push(format!("runc has it: {state:?}"));
        }
        let pids = host.container_netns(container).pids()?;
        if !pids.is_empty() {
            found.push(format!("processes in its network: {pids:?}"));
        }
        for cgroup in cgroup::existing(&self.cgroup_path(host, container))? {
            found.push(format!("cgroup {}", cgroup.display()));
        }
        let bundle = host.bundles().join(container);
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mounted = mounts.lines().filter(|line| line.contains(&*bundle.to_string_lossy()));
        found.extend(mounted.map(|line| format!("mount {line}")));
        Ok(found)
    }

    /// Whether the container lives on `host`: it is there, not frozen, and not what a migration is building or has left.
    ///
    /// # Errors
    /// When the runtime or the kernel does not tell.
    pub fn is_alive(&self, host: &Host, container: &str) -> Result<bool> {
        let runs = host.state(container)?.is_some_and(|state| state.status == "running");
        let frozen = cgroup::is_frozen(&self.cgroup_path(host, container))?;
        Ok(runs && !frozen && !host.is_unfinished(container))
    }

    /// Lets a container run on that `pclive migrate` has left frozen, with its link up: what an operator does who has
    /// made sure that it runs nowhere else.
    ///
    /// # Errors
    /// When it is not there.
    pub fn thaw(&self, host: &Host, container: &str) -> Result<()> {
        host.container_netns(container).ip("link set eth0 up")?;
        cgroup::thaw(&self.cgroup_path(host, container))
    }
}

/// What pclive has left in the processes of a container that it was to move and did not; empty if nothing.
///
/// # Errors
/// When `init` is gone.
pub fn injected(init: Pid) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for pid in processes(init)? {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        if let Some(tracer) =
            status.lines().find(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
        {
            found.push(format!("process {pid} is traced: {tracer}"));
        }
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        // `uw` and `um`: the range is registered with a userfaultfd (proc_pid_smaps(5)).
        let watched = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
        let watched =
            watched.filter(|flags| flags.split_whitespace().any(|flag| matches!(flag, "uw" | "um")));
        match watched.count() {
            0 => {}
            count => found.push(format!("process {pid} has {count} mappings with a userfaultfd")),
        }
    }
    Ok(found)
}
