//! Everything about a running container that stands in the way of moving it and is not an open file.
//!
//! Nothing here touches the container: procfs is read and `kcmp(2)` asked. All obstacles are collected before anyone
//! hears of the first. A process that ends while it is looked at has none.

mod ipc;
mod memory;
mod namespaces;
mod process;
mod sharing;
mod strays;
#[cfg(test)]
mod tests;

use super::env::ContainerEnv;
use super::tree::{TreeError, has_ended};
use super::vmas::VmaError;
use super::{Obstacles, SourceProcess};
use nix::errno::Errno;
use pclive_sys::namespace::NamespaceError;
use pclive_wire::HostPid;

/// The container could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// A file of procfs could not be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: String,
        /// Why not.
        #[source]
        error: std::io::Error,
    },
    /// Two processes could not be compared.
    #[error("kcmp of {first} and {second}")]
    Compare {
        /// A process or thread.
        first: HostPid,
        /// Another.
        second: HostPid,
        /// Why not.
        #[source]
        errno: Errno,
    },
    /// The container's IPC namespace could not be entered.
    #[error("setns to the IPC namespace of {init}")]
    EnterIpc {
        /// PID 1 of the container.
        init: HostPid,
        /// Why not.
        #[source]
        errno: Errno,
    },
    /// Namespaces could not be read.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// Threads could not be listed.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// Mappings could not be read.
    #[error(transparent)]
    Vma(#[from] VmaError),
}

/// Adds every obstacle that is not an open file. `processes` are all of the container's, PID 1 first.
///
/// # Errors
/// The container could not be looked at; what was found so far is in `obstacles`.
pub fn survey(
    processes: &[SourceProcess],
    env: &ContainerEnv,
    obstacles: &mut Obstacles,
) -> Result<(), PreflightError> {
    let Some(init) = processes.first() else { return Ok(()) };
    namespaces::survey_container(init, obstacles)?;
    ipc::survey(init, env, obstacles)?;
    strays::survey(processes, obstacles)?;
    process::survey_relations(processes, obstacles);
    let living = strays::without_zombies(processes, obstacles)?;
    strays::survey_cgroups(&living, obstacles)?;
    sharing::survey(&living, obstacles)?;
    for process in living {
        let result = process::survey(process, env, obstacles)
            .and_then(|()| namespaces::survey_process(process, init, obstacles))
            .and_then(|()| memory::survey(process, obstacles));
        match result {
            Err(_) if has_ended(process.pid) => {}
            result => result?,
        }
    }
    Ok(())
}

/// Reads a file in `/proc/PID`.
fn read(pid: HostPid, name: &str) -> Result<String, PreflightError> {
    let path = format!("/proc/{pid}/{name}");
    match std::fs::read(&path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) => Err(PreflightError::Read { path, error }),
    }
}

/// The value behind `name` (which ends in a colon) at the start of a line, without blanks around it.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}
