//! Which descriptors name the same open file description.
//!
//! Descriptors with different links differ. Among those with the same link, `kcmp(2)` orders descriptions, so each
//! descriptor finds its place by binary search. A socket inode has one description ever (`sock_alloc_file`), so sockets,
//! of which there may be thousands, need no call at all.

use super::error::FileError;
use super::socket;
use super::table::{OpenFd, Slot};
use crate::capture::{Access, SourceProcess};
use nix::errno::Errno;
use pclive_sys::kcmp;
use std::collections::HashMap;
use std::os::fd::{OwnedFd, RawFd};

/// One open file description and every descriptor that names it.
#[derive(Debug)]
pub(super) struct Found {
    /// What `/proc/PID/fd/FD` points to.
    pub open: OpenFd,
    /// The descriptors, in the order of processes; the first is that of `open`.
    pub holders: Vec<Holder>,
}

/// A descriptor that names a description.
#[derive(Clone, Copy, Debug)]
pub(super) struct Holder {
    /// Where.
    pub slot: Slot,
    /// `FD_CLOEXEC`.
    pub cloexec: bool,
}

impl Found {
    fn new(open: OpenFd) -> Self {
        let holder = Holder { slot: open.slot, cloexec: open.cloexec() };
        Self { open, holders: vec![holder] }
    }

    /// The first descriptor that names it: how it is called in messages.
    pub fn slot(&self) -> Slot {
        self.open.slot
    }

    /// Status flags and access mode, without `O_CLOEXEC`.
    pub fn flags(&self) -> u32 {
        self.open.info.flags & !(libc::O_CLOEXEC as u32)
    }

    /// `O_RDONLY`, `O_WRONLY` or `O_RDWR`.
    pub fn access_mode(&self) -> i32 {
        self.open.info.flags as i32 & libc::O_ACCMODE
    }

    /// The lowest standard stream number under which the first process that uses one knows it.
    pub fn stream(&self) -> Option<u8> {
        self.holders.iter().map(|holder| holder.slot.fd).find(|fd| (0..=2).contains(fd)).map(|fd| fd as u8)
    }

    /// A duplicate in this process, to ask what procfs does not tell.
    pub fn duplicate(&self, processes: &[SourceProcess]) -> Result<OwnedFd, FileError> {
        match self.open.duplicate.take() {
            Some(duplicate) => Ok(duplicate),
            None => self.slot().duplicate(&processes[self.slot().process]),
        }
    }
}

/// Groups descriptors (sorted by process and number) by description, in the order in which they first appear.
pub(super) fn group(tables: Vec<OpenFd>, access: Access) -> Result<Vec<Found>, FileError> {
    let mut found: Vec<Found> = Vec::new();
    // For each link: indices into `found`, sorted by kcmp.
    let mut groups: HashMap<Vec<u8>, Vec<usize>> = HashMap::new();
    for open in tables {
        let group = groups.entry(open.link.clone()).or_default();
        let holder = Holder { slot: open.slot, cloexec: open.cloexec() };
        match search(group, &found, &open) {
            Ok(Ok(place)) => found[group[place]].holders.push(holder),
            Ok(Err(place)) => {
                group.insert(place, found.len());
                found.push(Found::new(open));
            }
            Err(FileError::Call { errno: Errno::EBADF, .. }) if access == Access::Survey => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Looks for the description of `open`: the place where it is, or where it belongs.
fn search(group: &[usize], found: &[Found], open: &OpenFd) -> Result<Result<usize, usize>, FileError> {
    if socket::inode(&open.link).is_some() {
        return Ok(if group.is_empty() { Err(0) } else { Ok(0) });
    }
    kcmp::search(group, |&place| {
        let other = found[place].slot();
        kcmp::compare_files((other.pid, other.fd), (open.slot.pid, open.slot.fd))
            .map_err(FileError::call("kcmp", &open.slot))
    })
}

/// Finds a description (by its place in the slice) from process index and descriptor number.
pub(super) type Index = HashMap<(usize, RawFd), usize>;

/// Makes the [`Index`] of `found`.
pub(super) fn index(found: &[Found]) -> Index {
    let holders = |(place, found): (usize, &Found)| {
        found
            .holders
            .iter()
            .map(move |holder| ((holder.slot.process, holder.slot.fd), place))
            .collect::<Vec<_>>()
    };
    found.iter().enumerate().flat_map(holders).collect()
}
