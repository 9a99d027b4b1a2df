//! Unix-domain sockets: pairs, listeners and connections with abstract names, and what waits in their queues.

use super::options::Family;
use super::{Provision, SocketError, Source};
use crate::capture::Access;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recvmsg};
use pclive_sys::codicil::Setting;
use pclive_sys::sock_diag::{UnixEntry, state};
use pclive_sys::sockopt;
use pclive_wire::manifest::{UnixPeer, UnixSocket};
use std::collections::HashMap;
use std::io::IoSliceMut;
use std::os::fd::AsRawFd;

/// `RCV_SHUTDOWN | SEND_SHUTDOWN`: what the kernel does to a socket whose peer is closed.
const BOTH_WAYS: u8 = 3;

/// Captures one unix socket, which `entry` describes; `table` has all of the network namespace.
pub(super) fn capture(
    source: Source<'_>,
    entry: &UnixEntry,
    table: &HashMap<u32, UnixEntry>,
    provision: &mut Provision,
) -> Result<UnixSocket, SocketError> {
    if entry.name.first().is_some_and(|first| *first != 0) {
        let path = String::from_utf8_lossy(&entry.name);
        return Err(SocketError::unsupported(
            format!("a unix socket with the path {}", path.trim_end_matches('\0')),
            "have the program use a TCP or an abstract unix address",
        ));
    }
    let listens = entry.state == state::LISTEN;
    if listens && entry.receive_queue > 0 && source.access == Access::Frozen {
        return Err(SocketError::transient(format!(
            "{} unix connections that wait to be accepted",
            entry.receive_queue
        )));
    }
    let peer = peer(source, entry, table)?;
    Ok(UnixSocket {
        id: entry.inode,
        socket_type: entry.socket_type.into(),
        address: entry.name.clone(),
        peer,
        backlog: listens.then_some(entry.backlog),
        queue: if listens || source.access == Access::Survey {
            Vec::new()
        } else {
            queue(source, entry, peer, table, provision)?
        },
        shutdown: entry.shutdown,
        owner: source.owner()?,
        options: source.options(Family::Unix, peer != UnixPeer::None, |_| true)?,
    })
}

fn is_datagram(entry: &UnixEntry) -> bool {
    i32::from(entry.socket_type) == libc::SOCK_DGRAM
}

fn peer(
    source: Source<'_>,
    entry: &UnixEntry,
    table: &HashMap<u32, UnixEntry>,
) -> Result<UnixPeer, SocketError> {
    match entry.peer {
        None => Ok(UnixPeer::None),
        Some(0) if is_datagram(entry) || entry.shutdown == BOTH_WAYS => Ok(UnixPeer::Closed),
        Some(0) if source.access == Access::Survey => Ok(UnixPeer::Closed),
        Some(0) => Err(SocketError::transient("a unix connection that was not accepted yet")),
        Some(peer) => {
            let named = table.get(&peer).is_none_or(|peer| !peer.name.is_empty());
            if is_datagram(entry) && !named && !is_mutual(entry, table) {
                return Err(SocketError::unsupported(
                    "a unix datagram socket connected to one without a name that is not connected back",
                    "have the program use a pair of sockets, or give the receiving one an abstract name",
                ));
            }
            Ok(UnixPeer::Socket(peer))
        }
    }
}

fn is_mutual(entry: &UnixEntry, table: &HashMap<u32, UnixEntry>) -> bool {
    let peer = entry.peer.and_then(|peer| table.get(&peer));
    peer.is_some_and(|peer| peer.peer == Some(entry.inode))
}

/// Everything that waits to be read, which stays there.
fn queue(
    source: Source<'_>,
    entry: &UnixEntry,
    peer: UnixPeer,
    table: &HashMap<u32, UnixEntry>,
    provision: &mut Provision,
) -> Result<Vec<Vec<u8>>, SocketError> {
    let peek_from = |value| Setting { level: libc::SOL_SOCKET, name: libc::SO_PEEK_OFF, value };
    let reader = peek_from(source.int("SO_PEEK_OFF", libc::SOL_SOCKET, libc::SO_PEEK_OFF)?);
    let messages = provision.during(source, &[reader], || {
        // With an offset every peek goes on where the last one ended (Linux 3.4).
        source.call("SO_PEEK_OFF", peek_from(0).apply(source.fd))?;
        let messages = peek_all(source, entry);
        source.call("SO_PEEK_OFF", reader.apply(source.fd))?;
        messages
    })?;
    if messages.is_empty() {
        return Ok(messages);
    }
    if source.int("SO_PASSCRED", libc::SOL_SOCKET, libc::SO_PASSCRED)? != 0 {
        return Err(SocketError::transient(
            "messages in a unix socket that come with their sender's credentials",
        ));
    }
    if is_datagram(entry) && peer != UnixPeer::Closed && !is_mutual(entry, table) {
        return Err(SocketError::transient("datagrams in a unix socket that anybody may have sent"));
    }
    if i32::from(entry.socket_type) == libc::SOCK_STREAM {
        return Ok(vec![messages.concat()]);
    }
    Ok(messages)
}

/// Largest message that is looked for; `SO_SNDBUF` limits them to about 200 KiB unless raised by a privileged sender.
const LARGEST_MESSAGE: usize = 4 << 20;

fn peek_all(source: Source<'_>, entry: &UnixEntry) -> Result<Vec<Vec<u8>>, SocketError> {
    let mut messages = Vec::new();
    while let Some(message) = peek_one(source, entry)? {
        messages.push(message);
    }
    Ok(messages)
}

/// The next message, or the next piece of a stream.
fn peek_one(source: Source<'_>, entry: &UnixEntry) -> Result<Option<Vec<u8>>, SocketError> {
    let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let stream = i32::from(entry.socket_type) == libc::SOCK_STREAM;
    // One peek for each message: the kernel passes over an empty message that was peeked at before (`skb->peeked`).
    let len = match stream {
        true => source.call("SIOCINQ", sockopt::readable_bytes(source.fd))?,
        false => LARGEST_MESSAGE,
    };
    let mut message = vec![0; len];
    let mut buffer = [IoSliceMut::new(&mut message)];
    // Without room for control data descriptors in flight are not received, and say so.
    let received = match recvmsg::<()>(source.fd.as_raw_fd(), &mut buffer, None, peek) {
        Ok(received) => received,
        Err(Errno::EAGAIN) => return Ok(None),
        // A peer that was closed or has reset the connection; what waits was read before.
        Err(Errno::ECONNRESET) => return Err(SocketError::transient("a unix socket with an unread error")),
        Err(errno) => return source.call("recvmsg MSG_PEEK", Err(errno)),
    };
    if received.flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(SocketError::unsupported(
            format!("a message of more than {LARGEST_MESSAGE} bytes in a unix socket"),
            "let its receiver read it first",
        ));
    }
    let (len, truncated) = (received.bytes, received.flags.contains(MsgFlags::MSG_CTRUNC));
    if truncated {
        return Err(SocketError::transient("descriptors or credentials in flight in a unix socket"));
    }
    message.truncate(len);
    // End of file, on which peeking never ends.
    let over = len == 0 && (stream || entry.shutdown & 1 != 0);
    Ok((!over).then_some(message))
}
