//! Which sockets a network namespace has, and what only the kernel's own tables tell of them (`sock_diag(7)`):
//! peers of unix sockets, and TCP sockets that no file refers to.

use crate::netlink::{Netlink, attributes};
use nix::sys::socket::SockProtocol;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// The older question (`linux/inet_diag.h`), which alone has an answer for both address families at once: to answer, the
/// kernel walks through its table of all connections, which takes 0.3 ms if that has 262,144 places.
const TCPDIAG_GETSOCK: u16 = 18;

/// TCP and unix socket states (`include/net/tcp_states.h`).
pub mod state {
    #![allow(missing_docs)] // the kernel's names
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const SYN_RECV: u8 = 3;
    pub const FIN_WAIT1: u8 = 4;
    pub const FIN_WAIT2: u8 = 5;
    pub const TIME_WAIT: u8 = 6;
    pub const CLOSE: u8 = 7;
    pub const CLOSE_WAIT: u8 = 8;
    pub const LAST_ACK: u8 = 9;
    pub const LISTEN: u8 = 10;
    pub const CLOSING: u8 = 11;
}

/// A unix socket (`struct unix_diag_msg` and its attributes).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnixEntry {
    /// Inode of the socket; 0 for one that was never accepted.
    pub inode: u32,
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub socket_type: u8,
    /// [`state`].
    pub state: u8,
    /// Bound address: a path with its NUL, or NUL and a name; empty when unbound.
    pub name: Vec<u8>,
    /// Inode of the peer; 0 if the peer has none any more, or not yet.
    pub peer: Option<u32>,
    /// For a listener: connections to accept. Otherwise bytes to read (of the first message, for datagrams).
    pub receive_queue: u32,
    /// For a listener: its backlog.
    pub backlog: u32,
    /// `RCV_SHUTDOWN` (1) and `SEND_SHUTDOWN` (2) bits.
    pub shutdown: u8,
}

/// A TCP socket (`struct inet_diag_msg`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpEntry {
    /// [`state`].
    pub state: u8,
    /// Local address.
    pub local: SocketAddr,
    /// Remote address.
    pub remote: SocketAddr,
    /// Inode; 0 if no file refers to the socket.
    pub inode: u32,
    /// How often what waits for the peer's acknowledgement was sent again.
    pub retransmits: u8,
}

/// A handle on the socket tables of one network namespace.
#[derive(Debug)]
pub struct SockDiag(Netlink);

impl SockDiag {
    /// Opens the tables of the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open() -> nix::Result<Self> {
        Netlink::open(SockProtocol::NetlinkSockDiag).map(Self)
    }

    /// All unix sockets (Linux 3.3, `CONFIG_UNIX_DIAG`).
    ///
    /// # Errors
    /// `ENOENT` if the kernel has no unix_diag.
    pub fn unix(&mut self) -> nix::Result<Vec<UnixEntry>> {
        // struct unix_diag_req: family, protocol, pad, states, inode, what to show (NAME, PEER, RQLEN), cookie.
        const SHOW: u32 = 1 | 4 | 16;
        let mut request = vec![libc::AF_UNIX as u8, 0, 0, 0];
        for word in [u32::MAX, 0, SHOW, u32::MAX, u32::MAX] {
            request.extend_from_slice(&word.to_ne_bytes());
        }
        let mut found = Vec::new();
        self.0.dump(SOCK_DIAG_BY_FAMILY, &request, |message| found.extend(parse_unix(message)))?;
        Ok(found)
    }

    /// TCP sockets of both address families in one of the given states (one bit for each state number).
    ///
    /// # Errors
    /// `ENOENT` if the kernel has no tcp_diag.
    pub fn tcp(&mut self, states: u32) -> nix::Result<Vec<TcpEntry>> {
        // struct inet_diag_req: family, prefix lengths and extensions, socket id (none of which matters), states, debugging.
        let mut request = vec![0; 52];
        request.extend_from_slice(&states.to_ne_bytes());
        request.resize(60, 0);
        let mut found = Vec::new();
        self.0.dump(TCPDIAG_GETSOCK, &request, |message| found.extend(parse_tcp(message)))?;
        Ok(found)
    }
}

fn word(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn parse_unix(message: &[u8]) -> Option<UnixEntry> {
    let (header, rest) = message.split_first_chunk::<16>()?;
    let mut entry = UnixEntry {
        inode: word(&header[4..])?,
        socket_type: header[1],
        state: header[2],
        ..UnixEntry::default()
    };
    // UNIX_DIAG_NAME = 0, PEER = 2, RQLEN = 4, SHUTDOWN = 6 (linux/unix_diag.h)
    for (kind, value) in attributes(rest) {
        match kind {
            0 => entry.name = value.to_vec(),
            2 => entry.peer = word(value),
            4 => {
                entry.receive_queue = word(value)?;
                entry.backlog = word(value.get(4..)?)?;
            }
            6 => entry.shutdown = *value.first()?,
            _ => (),
        }
    }
    Some(entry)
}

fn parse_tcp(message: &[u8]) -> Option<TcpEntry> {
    let header = message.first_chunk::<72>()?;
    let ipv6 = i32::from(header[0]) == libc::AF_INET6;
    let port = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let address = |at: usize| -> IpAddr {
        let raw: [u8; 16] = header[at..at + 16].try_into().unwrap_or_default();
        if ipv6 { Ipv6Addr::from(raw).into() } else { [raw[0], raw[1], raw[2], raw[3]].into() }
    };
    Some(TcpEntry {
        state: header[1],
        local: (address(8), port(4)).into(),
        remote: (address(24), port(6)).into(),
        inode: word(&header[68..])?,
        retransmits: header[3],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn inode(socket: impl AsFd) -> u32 {
        nix::sys::stat::fstat(socket.as_fd()).unwrap().st_ino as u32
    }

    #[test]
    fn unix_peers_and_queues_are_found() {
        let (a, b) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut &a, b"123").unwrap();
        a.shutdown(std::net::Shutdown::Write).unwrap();
        let entries = SockDiag::open().unwrap().unix().unwrap();
        let entry = |socket| entries.iter().find(|entry| entry.inode == inode(socket)).unwrap();
        assert_eq!((entry(&a).peer, entry(&b).peer), (Some(inode(&b)), Some(inode(&a))));
        assert_eq!((entry(&b).receive_queue, entry(&b).shutdown, entry(&a).shutdown), (3, 1, 2));
        assert_eq!(entry(&a).state, state::ESTABLISHED);
    }

    #[test]
    fn tcp_sockets_of_both_families_are_found() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let entries =
                SockDiag::open().unwrap().tcp(1 << state::ESTABLISHED | 1 << state::LISTEN).unwrap();
            let entry = entries.iter().find(|entry| entry.inode == inode(&client)).unwrap();
            assert_eq!(
                (entry.local, entry.remote),
                (client.local_addr().unwrap(), client.peer_addr().unwrap())
            );
            assert!(entries.iter().any(|e| e.inode == inode(&listener) && e.state == state::LISTEN));
        }
    }
}
