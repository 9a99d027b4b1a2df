//! TCP and unix-domain sockets: what the destination needs to make them anew.
//!
//! # How a connection moves without its peer noticing
//!
//! `TCP_REPAIR` gives sequence numbers, queues, windows and negotiated options of a connection. While it is read, the
//! socket is unusable for its owner: so each socket is in repair mode for microseconds only, and a [`Codicil`] takes it
//! out should pclive die meanwhile. [`SocketCapture::silence`] puts all of them into it for good when the source's copy is
//! to be destroyed, so that closing them sends neither FIN nor RST.
//!
//! # Both ends in the container
//!
//! The links are down, but loopback is not: softirqs go on moving bytes between two sockets of a frozen container, and
//! delayed acknowledgements come up to 200 ms later. Read at different times the two ends can contradict each other:
//! bytes that the receiver did not have yet when it was read may be gone from the sender's queue when that is read.
//! [`SocketCapture::finish`] therefore reads such a pair once more: first end, second end, then the sequence numbers of
//! the first again, until they did not change in between. Sequence numbers only grow, so then both readings are true of
//! the moment in the middle.
//!
//! # What must not be lost
//!
//! A connection in an accept queue or half way through its handshake, and one that was closed and still has bytes or a
//! FIN to deliver, belongs to no descriptor and is not captured. They are short-lived: they are reported as
//! [`SocketError::Transient`], and the engine lets the container run on for a few milliseconds.
//!
//! # What is lost
//!
//! The kernel neither shows nor takes these: that ECN was negotiated (the connection goes on without), segments that
//! came out of order (the peer sends them again), urgent data, MD5 and TCP-AO keys, eBPF programs of `SO_REUSEPORT`
//! groups, and who is at the other end of a unix socket for `SO_PEERCRED` (it is pclive).

mod ahead;
pub(crate) mod options;
mod tables;
mod tcp;
mod unix;

pub use ahead::OptionWatch;
pub use tables::SocketTables;

use super::Access;
use ahead::ReadAhead;
use nix::errno::Errno;
use pclive_sys::codicil::{Codicil, Setting};
use pclive_sys::namespace::NamespaceError;
use pclive_sys::sock_diag::{UnixEntry, state};
use pclive_sys::{sockopt, tcp::Repair};
use pclive_wire::manifest::{Description, DescriptionKind, TcpState, UnixPeer};
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

const SO_NETNS_COOKIE: i32 = 71;
/// A peer that did not react to so many repetitions is not waited for: the kernel itself would go on for minutes.
const GIVEN_UP: u8 = 3;

/// Why a socket was not captured.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// pclive cannot move sockets like this one.
    #[error("{reason}")]
    Unsupported {
        /// What it is and why it cannot be moved.
        reason: String,
        /// What the operator can do.
        remedy: String,
    },
    /// The socket is in a state that passes: thaw, wait some milliseconds, and try again.
    #[error("{reason}")]
    Transient {
        /// Which state.
        reason: String,
    },
    /// A call about one socket failed.
    #[error("{call} on socket {inode}")]
    Call {
        /// Call or option.
        call: &'static str,
        /// The socket.
        inode: u64,
        /// Cause.
        source: Errno,
    },
    /// A call about all sockets of the network namespace failed.
    #[error("{call} in the container's network namespace")]
    Tables {
        /// Call.
        call: &'static str,
        /// Cause.
        source: Errno,
    },
    /// The network namespace cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
}

impl SocketError {
    fn unsupported(reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Unsupported { reason: reason.into(), remedy: remedy.into() }
    }

    fn transient(reason: impl Into<String>) -> Self {
        Self::Transient { reason: reason.into() }
    }
}

/// One socket to capture.
#[derive(Clone, Copy)]
struct Source<'a> {
    fd: BorrowedFd<'a>,
    inode: u64,
    access: Access,
}

impl Source<'_> {
    /// Names call and socket in the error.
    fn call<T>(self, call: &'static str, result: nix::Result<T>) -> Result<T, SocketError> {
        result.map_err(|source| SocketError::Call { call, inode: self.inode, source })
    }

    fn int(self, call: &'static str, level: i32, name: i32) -> Result<i32, SocketError> {
        self.call(call, sockopt::get_int(self.fd, level, name))
    }

    /// Domain and protocol.
    fn kind(self) -> Result<(i32, i32), SocketError> {
        let domain = self.int("SO_DOMAIN", libc::SOL_SOCKET, libc::SO_DOMAIN)?;
        Ok((domain, self.int("SO_PROTOCOL", libc::SOL_SOCKET, libc::SO_PROTOCOL)?))
    }

    /// User who made the socket.
    fn owner(self) -> Result<u32, SocketError> {
        self.call("fstat", nix::sys::stat::fstat(self.fd)).map(|stat| stat.st_uid)
    }

    fn options(
        self,
        family: options::Family,
        connected: bool,
        wanted: impl Fn(&options::Known) -> bool,
    ) -> Result<Vec<pclive_wire::manifest::SocketOption>, SocketError> {
        options::read(self.fd, family, connected, wanted).map_err(|(call, source)| SocketError::Call {
            call,
            inode: self.inode,
            source,
        })
    }
}

/// A connection that was captured, and whose socket is kept so that it can be silenced.
#[derive(Debug)]
struct Connection {
    fd: OwnedFd,
    inode: u64,
    local: SocketAddr,
    remote: SocketAddr,
}

impl Connection {
    fn source(&self) -> Source<'_> {
        Source { fd: self.fd.as_fd(), inode: self.inode, access: Access::Frozen }
    }
}

/// Captures the sockets of one container, all from the same look at its network namespace's tables.
#[derive(Debug)]
pub struct SocketCapture {
    tables: Arc<SocketTables>,
    unix: HashMap<u32, UnixEntry>,
    /// Connections without a file, for messages.
    unowned: Vec<String>,
    connections: Vec<Connection>,
    captured_unix: HashSet<u32>,
    provision: Provision,
    /// How many sockets' options had been read ahead.
    known: u64,
}

/// Who makes good what is changed in a socket while it is read, should pclive die meanwhile.
#[derive(Debug)]
struct Provision(Option<Codicil>);

impl Provision {
    /// Makes a `change` to a socket which that closure undoes itself; otherwise the `settings` do.
    fn during<T>(
        &mut self,
        source: Source<'_>,
        settings: &[Setting],
        change: impl FnOnce() -> Result<T, SocketError>,
    ) -> Result<T, SocketError> {
        match &mut self.0 {
            Some(codicil) => source.call("SCM_RIGHTS", codicil.during(source.fd, settings, change)).flatten(),
            None => change(),
        }
    }
}

impl SocketCapture {
    /// Reads the `tables` of the container's network namespace: after the freeze and with the links down, or for a survey.
    ///
    /// Sockets of a frozen container are changed while they are read. With a `codicil` they are as before even if pclive
    /// is killed at that moment.
    ///
    /// # Errors
    /// [`SocketError::Tables`] if the kernel has no sock_diag.
    pub fn begin(tables: Arc<SocketTables>, codicil: Option<Codicil>) -> Result<Self, SocketError> {
        let unix = tables.unix()?;
        // Without a file: in their handshake, or closed with something left to deliver.
        let states = [state::SYN_RECV, state::FIN_WAIT1, state::LAST_ACK, state::CLOSING];
        let mask = states.iter().fold(0, |mask, state| mask | 1 << state);
        let tcp = tables.tcp(mask)?;
        let unowned = tcp.iter().filter(|entry| entry.inode == 0 && entry.retransmits < GIVEN_UP);
        Ok(Self {
            tables,
            unix: unix.into_iter().map(|entry| (entry.inode, entry)).collect(),
            unowned: unowned.map(|entry| format!("{} to {}", entry.local, entry.remote)).collect(),
            connections: Vec::new(),
            captured_unix: HashSet::new(),
            provision: Provision(codicil),
            known: 0,
        })
    }

    /// Captures one socket. `socket` is a duplicate of the container's descriptor, `inode` the socket's.
    ///
    /// With [`Access::Survey`] the socket is only looked at, and what is returned has empty queues.
    ///
    /// # Errors
    /// [`SocketError::Unsupported`] and [`SocketError::Transient`], or a call that failed.
    pub fn capture(
        &mut self,
        socket: BorrowedFd<'_>,
        inode: u64,
        access: Access,
    ) -> Result<DescriptionKind, SocketError> {
        let source = Source { fd: socket, inode, access };
        if access == Access::Frozen
            && let Some(known) = self.tables.known(socket, inode)
        {
            return self.capture_tcp(source, known.ipv6, Some(known));
        }
        if !self.tables.has(socket) {
            return Err(SocketError::unsupported(
                "a socket of another network namespace",
                "close the socket, or make it in the container's own network namespace",
            ));
        }
        let (domain, protocol) = source.kind()?;
        match (domain, protocol) {
            (libc::AF_UNIX, _) => self.capture_unix(source),
            (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_TCP) => {
                self.capture_tcp(source, domain == libc::AF_INET6, None)
            }
            _ => {
                let kind = kind_of(domain, protocol);
                Err(SocketError::unsupported(
                    format!("a {kind} socket; pclive moves TCP and unix-domain sockets"),
                    format!("have the program close its {kind} sockets, or stop it"),
                ))
            }
        }
    }

    fn capture_unix(&mut self, source: Source<'_>) -> Result<DescriptionKind, SocketError> {
        let entry = u32::try_from(source.inode).ok().and_then(|inode| self.unix.get(&inode));
        let entry =
            entry.ok_or_else(|| SocketError::transient("a unix socket made after the tables were read"))?;
        let socket = unix::capture(source, entry, &self.unix, &mut self.provision)?;
        self.captured_unix.insert(entry.inode);
        Ok(DescriptionKind::Unix(Box::new(socket)))
    }

    fn capture_tcp(
        &mut self,
        source: Source<'_>,
        ipv6: bool,
        known: Option<ReadAhead>,
    ) -> Result<DescriptionKind, SocketError> {
        let (socket, was_known) = tcp::capture(source, ipv6, known, &mut self.provision)?;
        self.known += u64::from(was_known);
        if let (TcpState::Connected(connection), Some(local), Access::Frozen) =
            (&socket.state, socket.local, source.access)
        {
            let fd = source.fd.try_clone_to_owned();
            let fd = fd.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()));
            let fd = source.call("dup", fd)?;
            self.connections.push(Connection { fd, inode: source.inode, local, remote: connection.remote });
        }
        Ok(DescriptionKind::Tcp(Box::new(socket)))
    }

    /// Of how many sockets the options had been read ahead.
    pub fn known(&self) -> u64 {
        self.known
    }

    /// To be called when all sockets have been captured: checks what can only be seen of all of them, and makes the two
    /// ends of each connection inside the container agree. Returns the sockets, by inode, for which something is wrong;
    /// inode 0 stands for sockets that no process has.
    pub fn finish(&mut self, descriptions: &mut [Description], access: Access) -> Vec<(u64, SocketError)> {
        let mut wrong = self.foreign_unix_peers(descriptions);
        if access == Access::Survey {
            return wrong;
        }
        if !self.unowned.is_empty() {
            let reason =
                format!("connections without a process yet or any more: {}", self.unowned.join(", "));
            wrong.push((0, SocketError::Transient { reason }));
        }
        wrong.extend(self.reconcile_pairs(descriptions));
        wrong
    }

    /// Reads connections with both ends in the container again, both ends at one moment.
    fn reconcile_pairs(&mut self, descriptions: &mut [Description]) -> Vec<(u64, SocketError)> {
        let by_address: HashMap<_, _> =
            self.connections.iter().enumerate().map(|(at, c)| ((c.local, c.remote), at)).collect();
        let mut readings = HashMap::new();
        let mut wrong = Vec::new();
        for (at, first) in self.connections.iter().enumerate() {
            let Some(&other) = by_address.get(&(first.remote, first.local)) else { continue };
            // Each pair once. A socket connected to itself is its own other end, and always agrees.
            if at < other {
                match tcp::capture_pair(first, &self.connections[other], &mut self.provision) {
                    Ok((here, there)) => {
                        readings.insert((first.local, first.remote), here);
                        readings.insert((first.remote, first.local), there);
                    }
                    Err(error) => wrong.push((first.inode, error)),
                }
            }
        }
        for description in descriptions {
            let DescriptionKind::Tcp(socket) = &mut description.kind else { continue };
            let TcpState::Connected(connection) = &mut socket.state else { continue };
            let Some(local) = socket.local else { continue };
            if let Some(reading) = readings.remove(&(local, connection.remote)) {
                **connection = reading;
            }
        }
        wrong
    }

    /// Unix sockets whose peer is not among those captured.
    fn foreign_unix_peers(&self, descriptions: &[Description]) -> Vec<(u64, SocketError)> {
        let sockets = descriptions.iter().filter_map(|description| match &description.kind {
            DescriptionKind::Unix(socket) => Some(socket),
            _ => None,
        });
        let foreign = sockets.filter(
            |socket| matches!(socket.peer, UnixPeer::Socket(peer) if !self.captured_unix.contains(&peer)),
        );
        foreign
            .map(|socket| {
                let error = SocketError::unsupported(
                    "a unix socket connected to a process outside of the container",
                    "close the connection (a system log, a message bus, a supervisor), or have the program use TCP",
                );
                (u64::from(socket.id), error)
            })
            .collect()
    }

    /// Puts every captured connection into repair mode, so that destroying the source's copy sends neither FIN nor RST.
    ///
    /// Only after the destination runs the container: there is no way back.
    ///
    /// # Errors
    /// The first failure; the other connections are silenced all the same.
    pub fn silence(&self) -> Result<(), SocketError> {
        let mut result = Ok(());
        for connection in &self.connections {
            match Repair::enter(connection.fd.as_fd()) {
                Ok(repair) => repair.stay(),
                Err(source) => {
                    let error = SocketError::Call { call: "TCP_REPAIR", inode: connection.inode, source };
                    result = result.and(Err(error));
                }
            }
        }
        result
    }
}

/// What people call sockets of this domain and protocol.
fn kind_of(domain: i32, protocol: i32) -> String {
    /// `linux/in.h`.
    const IPPROTO_MPTCP: i32 = 262;
    let name = match (domain, protocol) {
        (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_UDP) => "UDP",
        (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_UDPLITE) => "UDP-Lite",
        (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_SCTP) => "SCTP",
        (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6) => "ping",
        (libc::AF_INET | libc::AF_INET6, IPPROTO_MPTCP) => "MPTCP",
        (libc::AF_INET | libc::AF_INET6, _) => "raw IP",
        (libc::AF_NETLINK, _) => "netlink",
        (libc::AF_PACKET, _) => "packet",
        (libc::AF_VSOCK, _) => "vsock",
        (libc::AF_ALG, _) => "kernel crypto (AF_ALG)",
        (libc::AF_XDP, _) => "XDP",
        _ => return format!("family {domain} protocol {protocol}"),
    };
    name.into()
}
