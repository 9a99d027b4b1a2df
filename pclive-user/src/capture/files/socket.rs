//! Sockets are [`crate::capture::sockets`]' business; here is what the other files need to know about them.

use super::error::FileError;
use super::identity::Found;
use super::table::Slot;
use nix::sys::stat::{major, minor, stat};

/// The inode number in the link of a socket's descriptor; `None` for anything else.
pub(super) fn inode(link: &[u8]) -> Option<u64> {
    let number = link.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    std::str::from_utf8(number).ok()?.parse().ok()
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
        assert_eq!(inode(b"socket:[4711]"), Some(4711));
        assert_eq!(inode(b"pipe:[4711]"), None);
        assert_eq!(inode(b"/tmp/socket:[4711]"), None);
    }
}
