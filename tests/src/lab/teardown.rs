//! Taking labs down: one's own when it is dropped, others' when their owner died. There is one way for both.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

use super::netns::Netns;
use super::{HOSTS, cgroup, host, swap};

/// Every lab has a directory of its own here. Not below `/run` or `/tmp`, which may be mounted `noexec`.
const LABS_DIR: &str = "/var/tmp/pclive-lab";
/// The file in a lab's directory that its owner holds locked.
const OWNER_FILE: &str = "owner";

/// The directory of the lab `id`.
pub(super) fn lab_dir(id: &str) -> PathBuf {
    Path::new(LABS_DIR).join(id)
}

/// What the names of a lab's network namespaces start with.
pub(super) fn netns_prefix(id: &str) -> String {
    format!("pclive-{id}-")
}

/// Waits until no other lab is being made; they wait until the file is dropped.
pub(super) fn lock_labs() -> Result<File> {
    fs::create_dir_all(LABS_DIR).with_context(|| format!("create {LABS_DIR}"))?;
    let file = File::create(Path::new(LABS_DIR).join(".lock"))?;
    file.lock().context("lock the labs")?;
    Ok(file)
}

/// Makes a lab's directory and locks it for as long as the file is held.
pub(super) fn claim(dir: &Path) -> Result<File> {
    fs::create_dir(dir).with_context(|| format!("create {}", dir.display()))?;
    let owner = File::create(dir.join(OWNER_FILE))?;
    owner.lock().with_context(|| format!("lock {}", dir.display()))?;
    Ok(owner)
}

/// Takes down every lab whose owner is dead.
pub(super) fn sweep() -> Result<()> {
    for entry in fs::read_dir(LABS_DIR).with_context(|| format!("read {LABS_DIR}"))?.flatten() {
        if !entry.path().is_dir() {
            continue;
        }
        if let Ok(owner) = File::open(entry.path().join(OWNER_FILE)) {
            match owner.try_lock() {
                Err(TryLockError::WouldBlock) => continue,
                Err(TryLockError::Error(error)) => return Err(error).context("lock a leftover lab"),
                Ok(()) => {}
            }
        }
        let id = entry.file_name().to_string_lossy().into_owned();
        remove(&id).with_context(|| format!("sweep the leftover lab {id}"))?;
    }
    Ok(())
}

/// Takes all labs of this process down, for a process that is about to end without dropping them.
///
/// # Errors
/// What could not be removed.
pub fn remove_own_labs() -> Result<()> {
    let own = format!("{}-", std::process::id());
    for entry in fs::read_dir(LABS_DIR).with_context(|| format!("read {LABS_DIR}"))?.flatten() {
        let id = entry.file_name().to_string_lossy().into_owned();
        if id.starts_with(&own) {
            remove(&id)?;
        }
    }
    Ok(())
}

/// Takes the lab `id` down, however much of it exists.
///
/// The hosts' own processes go first: a migration that is killed lets go of the container that it holds. The
/// directory goes last: as long as it exists, a sweep knows of the lab.
pub(super) fn remove(id: &str) -> Result<()> {
    // An interrupted process removes a lab in one thread while another, whose programs are gone, drops it.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = lab_dir(id);
    let (mut hosts, mut containers) = (Vec::new(), Vec::new());
    let prefix = netns_prefix(id);
    for netns in Netns::with_prefix(&prefix) {
        let is_host = !netns.name()[prefix.len()..].contains('-');
        if is_host { &mut hosts } else { &mut containers }.push(netns);
    }
    hosts.iter().try_for_each(Netns::kill_all)?;
    HOSTS.iter().try_for_each(|role| host::delete_containers(&dir.join(role)))?;
    containers.iter().try_for_each(Netns::kill_all)?;
    hosts.iter().chain(&containers).try_for_each(Netns::delete)?;
    cgroup::remove(id)?;
    swap::remove(&dir)?;
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
