//! What is read of TCP sockets while the container still runs: what only `setsockopt(2)` changes.
//!
//! That is some sixty calls for each socket, more than all the rest of it takes, and it hardly ever changes. Whether it has
//! changed an [`OptionWatch`] tells in the blackout with one call. Where there is none, everything is read then.
//!
//! A kernel-side change that passes by `setsockopt(2)` is not noticed: an eBPF program of the host that sets options of the
//! container's connections (`bpf_setsockopt`), in the milliseconds before the freeze.

use super::options::{self, Family};
use super::{SocketError, Source};
use pclive_wire::manifest::SocketOption;
use std::collections::{HashMap, HashSet};
use std::os::fd::BorrowedFd;

/// Notices `setsockopt(2)`.
pub trait OptionWatch: std::fmt::Debug + Send {
    /// Watches a socket from now on. False if it cannot be watched.
    fn watch(&mut self, socket: BorrowedFd<'_>) -> bool;

    /// Whether nobody has called `setsockopt(2)` on a socket since it is watched.
    fn is_unchanged(&self, socket: BorrowedFd<'_>) -> bool;
}

/// What was read of a socket.
#[derive(Clone, Debug)]
pub(super) struct ReadAhead {
    pub(super) ipv6: bool,
    /// Whether it was connected: other sockets have more options.
    pub(super) connected: bool,
    /// Those that do not change by themselves.
    pub(super) options: Vec<SocketOption>,
}

impl ReadAhead {
    /// All its options.
    pub(super) fn options_now(self, source: Source<'_>) -> Result<Vec<SocketOption>, SocketError> {
        let family = Family::tcp(self.ipv6);
        let mut options = source.options(family, self.connected, options::Known::changes_by_itself)?;
        options.extend(self.options);
        Ok(options)
    }
}

/// What is known of the sockets of a container, by inode.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    watch: Option<Box<dyn OptionWatch>>,
    known: HashMap<u64, ReadAhead>,
}

impl Ahead {
    pub(super) fn watch_with(&mut self, watch: Box<dyn OptionWatch>) {
        self.watch = Some(watch);
    }

    pub(super) fn watches(&self) -> bool {
        self.watch.is_some()
    }

    /// What is known of a socket and still true.
    pub(super) fn known(&self, socket: BorrowedFd<'_>, inode: u64) -> Option<&ReadAhead> {
        let known = self.known.get(&inode)?;
        self.watch.as_ref()?.is_unchanged(socket).then_some(known)
    }

    /// Reads a socket of the running container with `read`, unless that is known.
    pub(super) fn learn(
        &mut self,
        socket: BorrowedFd<'_>,
        inode: u64,
        connected: bool,
        read: impl FnOnce() -> Option<ReadAhead>,
    ) {
        if self.known(socket, inode).is_some_and(|known| known.connected == connected) {
            return;
        }
        self.known.remove(&inode);
        // Watched first: what is changed while it is read is not known.
        if self.watch.as_mut().is_some_and(|watch| watch.watch(socket))
            && let Some(known) = read()
        {
            self.known.insert(inode, known);
        }
    }

    /// Forgets all other sockets.
    pub(super) fn retain(&mut self, open: &HashSet<u64>) {
        self.known.retain(|inode, _| open.contains(inode));
    }
}
