//! Tells of a socket whether anybody has called `setsockopt(2)` on it.

use crate::capture::sockets::OptionWatch;
use aya::maps::{MapData, SkStorage};
use aya::programs::cgroup_sockopt::CgroupSockoptLink;
use pclive_sys::sockopt;
use std::fmt;
use std::os::fd::BorrowedFd;

/// Entries at sockets, which the eBPF program `setsockopt` removes (socket-local storage, Linux 5.2).
pub struct StoredMarks {
    marks: SkStorage<MapData, u8>,
    /// Without the program marks would stay whatever happens.
    _attached: CgroupSockoptLink,
}

impl StoredMarks {
    pub(super) fn new(marks: SkStorage<MapData, u8>, attached: CgroupSockoptLink) -> Self {
        Self { marks, _attached: attached }
    }

    fn mark(&mut self, socket: BorrowedFd<'_>) -> bool {
        self.marks.insert(&socket, 1, 0).is_ok()
    }
}

impl fmt::Debug for StoredMarks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoredMarks")
    }
}

impl OptionWatch for StoredMarks {
    /// The program sees the calls on sockets of the container's cgroup only, and a container may have been given others: so
    /// it is tried with a call that every socket refuses.
    fn watch(&mut self, socket: BorrowedFd<'_>) {
        const NO_LEVEL: i32 = i32::MAX;
        let is_tried = self.mark(socket) && sockopt::set(socket, NO_LEVEL, 0, &[0; 4]).is_err();
        let is_seen = is_tried && !self.is_unchanged(socket);
        if !(is_seen && self.mark(socket)) {
            let _ = self.marks.remove(&socket);
        }
    }

    fn is_unchanged(&self, socket: BorrowedFd<'_>) -> bool {
        self.marks.get(&socket, 0).is_ok()
    }
}
