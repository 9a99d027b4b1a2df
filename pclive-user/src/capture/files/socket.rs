//! Sockets are [`crate::capture::sockets`]' business; here is what the other files need to know about them.

use super::error::FileError;
use super::identity::Found;
use super::table::{self, Slot};
use crate::capture::SourceProcess;
use crate::capture::proc;
use crate::capture::sockets::SocketTables;
use nix::sys::stat::{fstat, major, minor, stat};
use pclive_sys::pidfd::pidfd_getfd;
use std::collections::HashSet;
use std::os::fd::AsFd;

/// The inode number in the link of a socket's descriptor; `None` for anything else.
pub(super) fn inode(link: &[u8]) -> Option<u64> {
    let number = link.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    std::str::from_utf8(number).ok()?.parse().ok()
}

/// The link of a descriptor of the socket `inode`.
pub(super) fn link(inode: u64) -> Vec<u8> {
    format!("socket:[{inode}]").into_bytes()
}

/// Looks at all sockets of the running container, so that their options are known at the freeze: those that the call before
/// has seen, too, and that have not changed since. Descriptors that come and go meanwhile are the next call's business.
pub fn read_options_ahead(processes: &[SourceProcess], tables: &SocketTables) {
    if !tables.watches_options() {
        return;
    }
    let mut open = HashSet::new();
    for (index, process) in processes.iter().enumerate() {
        for fd in proc::descriptors(process.pid).unwrap_or_default() {
            let slot = Slot { process: index, pid: process.pid, ns_pid: process.ns_pid, fd };
            let Some(inode) = table::link_of(slot).as_deref().and_then(inode) else { continue };
            if !open.insert(inode) {
                continue;
            }
            // For the microseconds that this takes the container's own descriptor is not the last one: should it be closed just
            // then, the connection ends, or the port is free, that much later.
            let Ok(duplicate) = pidfd_getfd(process.pidfd.as_fd(), fd) else { continue };
            if fstat(&duplicate).is_ok_and(|stat| stat.st_ino == inode) {
                tables.read_ahead(duplicate.as_fd(), inode);
            }
        }
    }
    tables.retain(&open);
}

/// The device number of the sockets' file system as epoll's fdinfo writes it (the kernel's internal `dev_t`); `None` if
/// the container has no socket.
pub(super) fn device(found: &[Found]) -> Result<Option<u64>, FileError> {
    let Some(socket) = found.iter().find(|found| inode(&found.open.link).is_some()) else { return Ok(None) };
    let Slot { pid, fd, .. } = socket.slot();
    let stat =
        stat(format!("/proc/{pid}/fd/{fd}").as_str()).map_err(FileError::call("stat", &socket.slot()))?;
    Ok(Some(major(stat.st_dev) << 20 | minor(stat.st_dev)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_has_a_socket_inode() {
        assert_eq!(link(4711), b"socket:[4711]");
        assert_eq!(inode(&link(4711)), Some(4711));
        assert_eq!(inode(b"pipe:[4711]"), None);
        assert_eq!(inode(b"/tmp/socket:[4711]"), None);
    }
}
