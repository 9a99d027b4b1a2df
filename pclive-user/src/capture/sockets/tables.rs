//! The socket tables of a network namespace, opened before they are needed: to enter a namespace takes a thread. And what is
//! known of its sockets before they are captured.

use super::ahead::{Ahead, OptionWatch, ReadAhead};
use super::{SO_NETNS_COOKIE, SocketError, Source, tcp};
use crate::capture::Access;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use pclive_sys::namespace::run_in_netns;
use pclive_sys::sock_diag::{SockDiag, TcpEntry, UnixEntry};
use pclive_sys::sockopt;
use pclive_sys::tcp::TcpInfo;
use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The socket tables of a network namespace.
#[derive(Debug)]
pub struct SocketTables {
    tables: Mutex<SockDiag>,
    netns_cookie: Option<u64>,
    ahead: Mutex<Ahead>,
}

impl SocketTables {
    /// Opens the tables of `netns`.
    ///
    /// # Errors
    /// [`SocketError::Namespace`] if it cannot be entered, [`SocketError::Tables`] if the kernel has no sock_diag.
    pub fn open(netns: BorrowedFd<'_>) -> Result<Self, SocketError> {
        run_in_netns(netns, || {
            let tables = SockDiag::open().map_err(failed("socket NETLINK_SOCK_DIAG"))?;
            let own = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
                .map_err(failed("socket AF_UNIX"))?;
            let ahead = Mutex::default();
            Ok(Self { tables: Mutex::new(tables), netns_cookie: netns_cookie(own.as_fd()), ahead })
        })?
    }

    /// From now on it is noticed when options of sockets change, so that they can be read ahead of the freeze.
    pub fn watch_options(&self, watch: Box<dyn OptionWatch>) {
        self.ahead().watch_with(watch);
    }

    /// Whether that is so.
    pub fn watches_options(&self) -> bool {
        self.ahead().watches()
    }

    /// Looks at a socket of the running container, if it is one that has options to be read ahead.
    pub fn read_ahead(&self, socket: BorrowedFd<'_>, inode: u64) {
        let source = Source { fd: socket, inode, access: Access::Survey };
        let ipv6 = match source.kind() {
            Ok((libc::AF_INET, libc::IPPROTO_TCP)) => false,
            Ok((libc::AF_INET6, libc::IPPROTO_TCP)) => true,
            _ => return,
        };
        if self.has(socket)
            && let Ok(info) = TcpInfo::of(socket)
        {
            self.ahead().learn(socket, inode, info.state, || tcp::read_ahead(source, ipv6, info.state));
        }
    }

    /// Forgets what is known of all but these sockets.
    pub fn retain(&self, open: &HashSet<u64>) {
        self.ahead().retain(open);
    }

    /// What is known of a socket of the frozen container.
    pub(super) fn known(&self, socket: BorrowedFd<'_>, inode: u64) -> Option<ReadAhead> {
        self.ahead().known(socket, inode).cloned()
    }

    fn ahead(&self) -> MutexGuard<'_, Ahead> {
        self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a socket is of this namespace, as far as the kernel tells (Linux 5.14).
    pub(super) fn has(&self, socket: BorrowedFd<'_>) -> bool {
        self.netns_cookie.is_none() || netns_cookie(socket) == self.netns_cookie
    }

    /// All unix sockets.
    pub(super) fn unix(&self) -> Result<Vec<UnixEntry>, SocketError> {
        self.ask("unix_diag", SockDiag::unix)
    }

    /// TCP sockets in one of the given states (one bit for each state number).
    pub(super) fn tcp(&self, states: u32) -> Result<Vec<TcpEntry>, SocketError> {
        self.ask("tcp_diag", |tables| tables.tcp(states))
    }

    fn ask<T>(
        &self,
        call: &'static str,
        question: impl FnOnce(&mut SockDiag) -> nix::Result<T>,
    ) -> Result<T, SocketError> {
        // Answers to a question that was given up are passed over by the next one.
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        question(&mut tables).map_err(failed(call))
    }
}

fn failed(call: &'static str) -> impl FnOnce(Errno) -> SocketError {
    move |source| SocketError::Tables { call, source }
}

/// Identity of a socket's network namespace (Linux 5.14).
fn netns_cookie(socket: BorrowedFd<'_>) -> Option<u64> {
    let mut cookie = [0; 8];
    let len = sockopt::get(socket, libc::SOL_SOCKET, SO_NETNS_COOKIE, &mut cookie).ok()?;
    (len == cookie.len()).then(|| u64::from_ne_bytes(cookie))
}
