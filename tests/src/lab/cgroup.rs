//! The cgroups that the containers of a lab are in.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::patience::wait_until_none;

/// Where cgroup hierarchies are mounted.
const CGROUP_DIR: &str = "/sys/fs/cgroup";

/// The cgroup that has everything of a lab, below the root of each hierarchy.
pub(super) fn lab_path(id: &str) -> String {
    format!("/pclive-lab/{id}")
}

/// The cgroup of that path in each hierarchy that has it.
pub(super) fn existing(path: &str) -> Result<Vec<PathBuf>> {
    let below = path.trim_start_matches('/');
    Ok(hierarchies()?.into_iter().map(|root| root.join(below)).filter(|cgroup| cgroup.exists()).collect())
}

/// Whether the cgroup of that path is frozen in the hierarchy with cgroup v2.
pub(super) fn is_frozen(path: &str) -> Result<bool> {
    let events = existing(path)?
        .into_iter()
        .filter_map(|cgroup| fs::read_to_string(cgroup.join("cgroup.events")).ok());
    Ok(events.into_iter().any(|events| events.lines().any(|line| line == "frozen 1")))
}

/// Lets it go on.
pub(super) fn thaw(path: &str) -> Result<()> {
    let files = existing(path)?.into_iter().map(|cgroup| cgroup.join("cgroup.freeze"));
    files.filter(|file| file.exists()).try_for_each(|file| Ok(fs::write(file, "0")?))
}

/// Removes the cgroups of a lab, which must be empty of processes, in every hierarchy.
pub(super) fn remove(id: &str) -> Result<()> {
    for root in hierarchies()? {
        let lab = root.join(lab_path(id).trim_start_matches('/'));
        remove_tree(&lab).with_context(|| format!("remove {}", lab.display()))?;
        // The parent is shared with other labs: the last one takes it away.
        let _ = fs::remove_dir(lab.parent().expect("it was joined to its root"));
    }
    Ok(())
}

/// The roots of all hierarchies: one with cgroup v2, one per controller else.
fn hierarchies() -> Result<Vec<PathBuf>> {
    let root = Path::new(CGROUP_DIR);
    if statfs(root).with_context(|| format!("statfs {CGROUP_DIR}"))?.filesystem_type() == CGROUP2_SUPER_MAGIC
    {
        return Ok(vec![root.to_owned()]);
    }
    let entries = fs::read_dir(root).with_context(|| format!("read {CGROUP_DIR}"))?;
    Ok(entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir() && !path.is_symlink())
        .collect())
}

/// Removes a cgroup with those below it. Its files are the kernel's and need no removing.
fn remove_tree(cgroup: &Path) -> Result<()> {
    let entries = match fs::read_dir(cgroup) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries.flatten() {
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    // Processes may have ended for those who wait for them, but not yet for their cgroup: to free gigabytes takes seconds.
    wait_until_none(|| match fs::remove_dir(cgroup) {
        Err(busy) if busy.kind() == ErrorKind::ResourceBusy => Ok(vec![busy]),
        removed => Ok(removed.map(|()| Vec::new())?),
    })
}
