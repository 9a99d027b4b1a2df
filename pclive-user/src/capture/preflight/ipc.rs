//! System V IPC objects and POSIX message queues, which live in the IPC namespace and belong to no process.

use super::PreflightError;
use crate::capture::env::ContainerEnv;
use crate::capture::{Obstacles, SourceProcess};
use nix::sched::{CloneFlags, setns};
use pclive_sys::namespace::{NamespaceKind, open_namespace};
use std::path::Path;

/// A kind of System V object.
struct SystemV {
    /// File of `/proc/sysvipc` that lists them (sysvipc(7)).
    table: &'static str,
    name: &'static str,
    /// Option of `ipcrm(1)`.
    option: char,
}

const SYSTEM_V: [SystemV; 3] = [
    SystemV { table: "shm", name: "shared memory segment", option: 'm' },
    SystemV { table: "msg", name: "message queue", option: 'q' },
    SystemV { table: "sem", name: "semaphore set", option: 's' },
];

/// Adds the objects in the container's IPC namespace.
pub(super) fn survey(
    init: &SourceProcess,
    env: &ContainerEnv,
    obstacles: &mut Obstacles,
) -> Result<(), PreflightError> {
    for (SystemV { name, option, .. }, text) in read_tables(init)? {
        for (key, id) in parse_table(&text) {
            obstacles.add(
                init.ns_pid,
                format!("System V {name} {id}"),
                format!("a System V {name} (key {key}), which is not moved yet"),
                format!("have the program do without, or remove a left-over with `ipcrm -{option} {id}`"),
            );
        }
    }
    for mount in env.mounts_of_type("mqueue") {
        for queue in list(init, mount)? {
            obstacles.add(
                init.ns_pid,
                format!("message queue {queue}"),
                "a POSIX message queue, which is not moved yet",
                "have the program do without, or remove a left-over",
            );
        }
    }
    Ok(())
}

/// The three tables, as seen from inside: `/proc/sysvipc` shows the namespace of the thread that opens it.
fn read_tables(init: &SourceProcess) -> Result<Vec<(SystemV, String)>, PreflightError> {
    let namespace = open_namespace(init.pid, NamespaceKind::Ipc)?;
    let read = || {
        setns(namespace, CloneFlags::CLONE_NEWIPC)
            .map_err(|errno| PreflightError::EnterIpc { init: init.pid, errno })?;
        let table = |kind: SystemV| {
            let path = format!("/proc/sysvipc/{}", kind.table);
            match std::fs::read_to_string(&path) {
                Ok(text) => Ok((kind, text)),
                // A kernel without System V IPC.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok((kind, String::new())),
                Err(error) => Err(PreflightError::Read { path, error }),
            }
        };
        SYSTEM_V.into_iter().map(table).collect()
    };
    // A thread of its own, which ends in that namespace.
    std::thread::scope(|scope| {
        scope.spawn(read).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Key and id of each object in a table, below its heading.
fn parse_table(text: &str) -> Vec<(&str, &str)> {
    let columns = text.lines().skip(1).map(str::split_whitespace);
    columns.filter_map(|mut columns| Some((columns.next()?, columns.next()?))).collect()
}

/// The queues of an mqueue file system (mq_overview(7)).
fn list(init: &SourceProcess, mount: &str) -> Result<Vec<String>, PreflightError> {
    let path = format!("/proc/{}/root{mount}", init.pid);
    let error = |error| PreflightError::Read { path: path.clone(), error };
    let entries = std::fs::read_dir(Path::new(&path)).map_err(error)?;
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        Ok(entry.map_err(error)?.file_name().to_string_lossy().into_owned())
    };
    entries.map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_sysvipc() {
        let text = "       key      shmid perms                  size  cpid  lpid nattch   uid\n\
                    1627455575     327680   600                  4096  5000  5000      2     0\n\
                             0          4  1600                    56     1     1      0     0\n";
        assert_eq!(parse_table(text), [("1627455575", "327680"), ("0", "4")]);
        assert!(parse_table("").is_empty());
    }
}
