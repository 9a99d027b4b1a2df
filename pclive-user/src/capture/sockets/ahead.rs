//! What is read of TCP sockets while the container still runs: what only `setsockopt(2)` changes.
//!
//! That is some sixty calls for each socket, more than all the rest of it takes, and it hardly ever changes. Whether it has
//! changed an [`OptionWatch`] tells in the blackout with one call. Where there is none, everything is read then.
//!
//! A watch notices a call before it takes effect (`do_sock_setsockopt` in net/socket.c). So a socket is read only if the
//! watch of an earlier look at it still stands, which is a round later at best: a call that had begun before that is over.
//!
//! What passes by `setsockopt(2)` is not noticed: an eBPF program of the host that sets options of the container's connections
//! (`bpf_setsockopt`) after they were read.

use super::options::{self, Family};
use super::{SocketError, Source};
use pclive_wire::manifest::SocketOption;
use std::collections::{HashMap, HashSet};
use std::os::fd::BorrowedFd;

/// Notices `setsockopt(2)`.
pub trait OptionWatch: std::fmt::Debug + Send {
    /// Watches a socket from now on, if it can.
    fn watch(&mut self, socket: BorrowedFd<'_>);

    /// Whether a socket is watched, and nobody has called `setsockopt(2)` on it since.
    fn is_unchanged(&self, socket: BorrowedFd<'_>) -> bool;
}

/// What was read of a socket.
#[derive(Clone, Debug)]
pub(super) struct ReadAhead {
    pub(super) ipv6: bool,
    /// TCP state: `listen(2)` may set an option, and a connection has other ones.
    pub(super) state: u8,
    /// Those that do not change by themselves.
    pub(super) options: Vec<SocketOption>,
}

impl ReadAhead {
    /// All its options.
    pub(super) fn options_now(
        self,
        source: Source<'_>,
        connected: bool,
    ) -> Result<Vec<SocketOption>, SocketError> {
        let family = Family::tcp(self.ipv6);
        let mut options = source.options(family, connected, options::Known::changes_by_itself)?;
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

    /// Looks at a socket of the running container, which is in `state`: has it watched the first time, and `read` the next.
    pub(super) fn learn(
        &mut self,
        socket: BorrowedFd<'_>,
        inode: u64,
        state: u8,
        read: impl FnOnce() -> Option<ReadAhead>,
    ) {
        let Some(watch) = &mut self.watch else { return };
        if !watch.is_unchanged(socket) {
            self.known.remove(&inode);
            watch.watch(socket);
        } else if self.known.get(&inode).is_none_or(|known| known.state != state) {
            self.known.remove(&inode);
            self.known.extend(read().map(|known| (inode, known)));
        }
    }

    /// Forgets all other sockets.
    pub(super) fn retain(&mut self, open: &HashSet<u64>) {
        self.known.retain(|inode, _| open.contains(inode));
    }
}
