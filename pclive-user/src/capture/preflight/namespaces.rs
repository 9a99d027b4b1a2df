//! Namespaces: the container has its own, made by the runtime, and all of its processes are in them.

use super::PreflightError;
use crate::capture::tree::{has_ended, read_threads};
use crate::capture::{Obstacles, SourceProcess};
use pclive_sys::namespace::{NamespaceKind, namespaces};
use pclive_wire::HostPid;

/// Namespaces that the container must not share with the host, with what it would mean.
const PRIVATE: [(NamespaceKind, &str); 4] = [
    (NamespaceKind::Pid, "its process numbers may be taken at the destination"),
    (NamespaceKind::Network, "its connections cannot be told from the host's, nor its links taken down"),
    (NamespaceKind::Mount, "its files are the host's"),
    (NamespaceKind::Ipc, "its System V objects cannot be told from the host's"),
];

/// Compares the container's namespaces with those of pclive.
pub(super) fn survey_container(
    init: &SourceProcess,
    obstacles: &mut Obstacles,
) -> Result<(), PreflightError> {
    let (container, host) = (namespaces(init.pid)?, namespaces(HostPid(std::process::id() as i32))?);
    for (kind, why) in PRIVATE {
        if container.share(&host, kind) {
            obstacles.add(
                init.ns_pid,
                format!("namespace {kind}"),
                format!("the container shares the host's {kind} namespace: {why}"),
                format!("give the container a {kind} namespace of its own (linux.namespaces in config.json)"),
            );
        }
    }
    for kind in [NamespaceKind::User, NamespaceKind::Time] {
        if !container.share(&host, kind) {
            obstacles.add(
                init.ns_pid,
                format!("namespace {kind}"),
                format!("the container has a {kind} namespace of its own, which is not moved yet"),
                format!("run the container in the host's {kind} namespace"),
            );
        }
    }
    Ok(())
}

/// Compares the namespaces of a process's threads, and those that its children would get, with PID 1's.
pub(super) fn survey_process(
    process: &SourceProcess,
    init: &SourceProcess,
    obstacles: &mut Obstacles,
) -> Result<(), PreflightError> {
    let container = namespaces(init.pid)?;
    for (tid, _) in read_threads(process.pid)? {
        let own = match namespaces(tid) {
            Err(_) if has_ended(tid) => continue,
            own => own?,
        };
        for kind in own.differing(&container) {
            obstacles.add(
                process.ns_pid,
                format!("namespace {kind}"),
                format!("a nested namespace: the process left the container's {kind} namespace"),
                "stop what makes containers or sandboxes inside the container",
            );
        }
    }
    let link = |name: &str| std::fs::read_link(format!("/proc/{}/ns/{name}", process.pid)).ok();
    for kind in ["pid", "time"] {
        if link(kind) != link(&format!("{kind}_for_children")) {
            obstacles.add(
                process.ns_pid,
                format!("namespace {kind}_for_children"),
                format!("a nested namespace: children of the process get a {kind} namespace of their own"),
                "stop what makes containers or sandboxes inside the container",
            );
        }
    }
    Ok(())
}
