//! The socket tables of a network namespace, opened before they are needed: to enter a namespace takes a thread.

use super::{SO_NETNS_COOKIE, SocketError};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use pclive_sys::namespace::run_in_netns;
use pclive_sys::sock_diag::{SockDiag, TcpEntry, UnixEntry};
use pclive_sys::sockopt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};

/// The socket tables of a network namespace.
#[derive(Debug)]
pub struct SocketTables {
    tables: Mutex<SockDiag>,
    netns_cookie: Option<u64>,
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
            Ok(Self { tables: Mutex::new(tables), netns_cookie: netns_cookie(own.as_fd()) })
        })?
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
