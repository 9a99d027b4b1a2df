//! What a socket has beside its open file description.

use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// A socket option as `getsockopt(2)` returned it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    /// Level, for example `SOL_SOCKET`.
    pub level: i32,
    /// Option name.
    pub name: i32,
    /// Value, verbatim.
    #[serde(with = "serde_bytes")]
    pub value: Vec<u8>,
}

/// Whom a unix-domain socket is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnixPeer {
    /// Nobody.
    None,
    /// The socket of this number, which is in the manifest too.
    Socket(u32),
    /// One that has been closed.
    Closed,
}

/// A unix-domain socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixSocket {
    /// Its own number within the manifest.
    pub id: u32,
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub socket_type: i32,
    /// Bound address without the family: a path, or NUL and a name; empty when unbound.
    #[serde(with = "serde_bytes")]
    pub address: Vec<u8>,
    /// Whom it is connected to.
    pub peer: UnixPeer,
    /// Backlog, for a listener.
    pub backlog: Option<u32>,
    /// Messages waiting to be read here; for a stream one element with all bytes.
    pub queue: Vec<Vec<u8>>,
    /// `RCV_SHUTDOWN` (1) and `SEND_SHUTDOWN` (2) bits.
    pub shutdown: u8,
    /// User who made the socket.
    pub owner: u32,
    /// Options to set again.
    pub options: Vec<SocketOption>,
}

/// A TCP socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpSocket {
    /// `AF_INET6` instead of `AF_INET`.
    pub ipv6: bool,
    /// Local address, if bound.
    pub local: Option<SocketAddr>,
    /// What state it is in.
    pub state: TcpState,
    /// User who made the socket; `SO_REUSEPORT` groups are per user.
    pub owner: u32,
    /// Options to set again.
    pub options: Vec<SocketOption>,
}

/// TCP states that can be moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TcpState {
    /// `TCP_CLOSE`: made, perhaps bound, not connected.
    Closed,
    /// `TCP_CLOSE` after a connection that has ended: reading gives end of file.
    Dead,
    /// Listening.
    Listen {
        /// Backlog, as `ss -l` shows it (Send-Q).
        backlog: u32,
    },
    /// Connected: established or half-closed.
    Connected(Box<TcpConnection>),
}

/// A connection, as `TCP_REPAIR` (Linux 3.5) takes and gives it. Sequence numbers do not count a FIN.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpConnection {
    /// Remote address.
    pub remote: SocketAddr,
    /// A FIN was received (`CLOSE_WAIT`, `LAST_ACK`, `CLOSING`).
    pub fin_received: bool,
    /// The socket was shut down for writing (`FIN_WAIT1`, `FIN_WAIT2`, `LAST_ACK`, `CLOSING`).
    pub fin_sent: bool,
    /// The socket was shut down for reading by its owner.
    pub read_shutdown: bool,
    /// Sequence number after the last byte in the receive queue.
    pub receive_sequence: u32,
    /// Sequence number after the last byte in the send queue.
    pub send_sequence: u32,
    /// Received, unread bytes.
    #[serde(with = "serde_bytes")]
    pub receive_queue: Vec<u8>,
    /// Bytes not acknowledged, sent or not.
    #[serde(with = "serde_bytes")]
    pub send_queue: Vec<u8>,
    /// How many bytes at the end of `send_queue` were never sent.
    pub unsent: u32,
    /// `TCP_REPAIR_WINDOW`: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
    pub window: [u32; 5],
    /// Maximum segment size clamp.
    pub mss: u32,
    /// Maximum segment size that this side advertised.
    pub advertised_mss: u32,
    /// Path MTU.
    pub path_mtu: u32,
    /// Congestion window, in segments.
    pub congestion_window: u32,
    /// Send and receive window scale, if negotiated.
    pub window_scale: Option<(u8, u8)>,
    /// SACK permitted.
    pub sack: bool,
    /// `TCP_TIMESTAMP`, if timestamps were negotiated.
    pub timestamp: Option<u32>,
}
