//! `epoll(7)` interest lists.
//!
//! An entry names a file *and* the number under which it was added. It can be added again only by a process that has the
//! file at that number, so each entry needs such a process; an entry whose descriptor was closed while a duplicate of it
//! lives on has none, and is an obstacle.

use super::error::{FileError, Refusal};
use super::identity::{Found, Index};
use super::socket;
use super::table::Slot;
use nix::errno::Errno;
use pclive_sys::kcmp::{EpollSlot, is_epoll_target};
use pclive_wire::manifest::{DescriptionKind, EpollTarget};
use std::collections::HashMap;

/// A `tfd:` line of fdinfo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    fd: i32,
    events: u32,
    data: u64,
    inode: u64,
    device: u64,
}

impl Entry {
    /// Parses what follows `tfd:` (`ep_show_fdinfo` in fs/eventpoll.c; inode and device since Linux 4.13).
    fn parse(line: &str) -> Option<Self> {
        let after = |name: &str| {
            let (_, rest) = line.split_once(name)?;
            rest.split_whitespace().next()
        };
        let hexadecimal = |name| u64::from_str_radix(after(name)?, 16).ok();
        Some(Self {
            fd: line.split_whitespace().next()?.parse().ok()?,
            events: u32::try_from(hexadecimal("events:")?).ok()?,
            data: hexadecimal("data:")?,
            inode: hexadecimal("ino:")?,
            device: hexadecimal("sdev:")?,
        })
    }
}

/// Captures an interest list; `all` are the container's descriptions and `index` finds them by descriptor.
pub(super) fn capture(
    found: &Found,
    all: &[Found],
    index: &Index,
    sockets: Option<u64>,
) -> Result<DescriptionKind, Refusal> {
    let mut targets = Vec::new();
    // Entries under one number are told apart by their place among each other.
    let mut seen: HashMap<i32, u32> = HashMap::new();
    for line in found.open.info.lines("tfd:") {
        let entry = Entry::parse(line)
            .ok_or_else(|| FileError::FdInfo { object: found.slot().to_string(), field: "tfd" })?;
        let nth = seen.entry(entry.fd).or_default();
        let owner = owner(found, all, index, &entry, *nth, sockets)?;
        *nth += 1;
        targets.push(EpollTarget {
            process: owner.ns_pid,
            fd: entry.fd,
            events: entry.events,
            data: entry.data,
        });
    }
    Ok(DescriptionKind::Epoll { targets })
}

/// A descriptor of the epoll set in a process that has the watched file under the entry's number.
fn owner(
    found: &Found,
    all: &[Found],
    index: &Index,
    entry: &Entry,
    nth: u32,
    sockets: Option<u64>,
) -> Result<Slot, Refusal> {
    for holder in &found.holders {
        let slot = holder.slot;
        let Some(&target) = index.get(&(slot.process, entry.fd)) else { continue };
        // The inode number is enough for a socket, which has only one description; lists of thousands have nothing else.
        if socket::inode(&all[target].open.link) == Some(entry.inode) && sockets == Some(entry.device) {
            return Ok(slot);
        }
        let place = EpollSlot { epoll: slot.fd as u32, target: entry.fd as u32, nth };
        match is_epoll_target((slot.pid, entry.fd), slot.pid, &place) {
            Ok(true) => return Ok(slot),
            // Closed or removed meanwhile: only possible while the container runs.
            Ok(false) | Err(Errno::EBADF | Errno::ENOENT) => {}
            Err(errno) => return Err(FileError::call("kcmp(KCMP_EPOLL_TFD)", &slot)(errno).into()),
        }
    }
    Err(Refusal::unsupported(
        format!(
            "an epoll set that watches a file added as fd {}, which no process has under that number any more",
            entry.fd
        ),
        "have the program remove descriptors from the set before closing them",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_fdinfo() {
        let line = "        8 events:       19 data:      123400000008  pos:0 ino:a7c2 sdev:8";
        let entry = Entry { fd: 8, events: 0x19, data: 0x1234_0000_0008, inode: 0xa7c2, device: 8 };
        assert_eq!(Entry::parse(line), Some(entry));
        assert_eq!(Entry::parse("8 events: 19"), None);
    }
}
