//! The processes of a cgroup v2 directory.

use pclive_wire::HostPid;
use std::{
    io,
    path::{Path, PathBuf},
};

/// Every process in `cgroup` and below it, in no order. The list may be outdated when it is returned.
pub fn processes(cgroup: &Path) -> io::Result<Vec<HostPid>> {
    let mut pids = Vec::new();
    let mut directories = vec![PathBuf::from(cgroup)];
    while let Some(directory) = directories.pop() {
        match read_procs(&directory) {
            Ok(found) => pids.extend(found),
            // A threaded cgroup lists no processes; those are listed by the cgroup above it.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            // Removed meanwhile.
            Err(error) if directory != cgroup && is_gone(&error) => continue,
            Err(error) => return Err(error),
        }
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    Ok(pids)
}

fn read_procs(directory: &Path) -> io::Result<Vec<HostPid>> {
    let list = std::fs::read_to_string(directory.join("cgroup.procs"))?;
    // A process outside pclive's pid namespace is listed as 0.
    Ok(list.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).map(HostPid).collect())
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}
