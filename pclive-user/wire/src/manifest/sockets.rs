//! What a socket has beside its open file description.

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::net::SocketAddr;
use std::ops::Deref;

/// A socket option as `getsockopt(2)` returned it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    /// Level, for example `SOL_SOCKET`.
    pub level: i32,
    /// Option name.
    pub name: i32,
    /// Value, verbatim.
    pub value: OptionValue,
}

/// The value of a socket option. There are some fifty of each socket, so none of them is in an allocation of its own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct OptionValue {
    length: u8,
    /// The rest is zero.
    bytes: [u8; Self::LONGEST],
}

impl OptionValue {
    /// Most bytes of a value. `IFNAMSIZ` and `TCP_CA_NAME_MAX` are as large.
    pub const LONGEST: usize = 16;

    /// The value with these bytes; `None` if there are too many.
    pub fn new(value: &[u8]) -> Option<Self> {
        let mut bytes = [0; Self::LONGEST];
        bytes.get_mut(..value.len())?.copy_from_slice(value);
        Some(Self { length: value.len() as u8, bytes })
    }
}

impl Deref for OptionValue {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

impl fmt::Debug for OptionValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl Serialize for OptionValue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self)
    }
}

impl<'de> Deserialize<'de> for OptionValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = OptionValue;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {} bytes", OptionValue::LONGEST)
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<OptionValue, E> {
                OptionValue::new(bytes).ok_or_else(|| E::invalid_length(bytes.len(), &self))
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_is_too_long_is_refused() {
        let longest = [7; OptionValue::LONGEST];
        let value = OptionValue::new(&longest).unwrap();
        let encoded = postcard::to_allocvec(&value).unwrap();
        assert_eq!(encoded, [&[16][..], &longest].concat());
        assert_eq!(postcard::from_bytes::<OptionValue>(&encoded).unwrap(), value);
        assert_eq!(OptionValue::new(&[7; OptionValue::LONGEST + 1]), None);
        let too_long = [&[17][..], &[7; OptionValue::LONGEST + 1]].concat();
        postcard::from_bytes::<OptionValue>(&too_long).unwrap_err();
    }
}
