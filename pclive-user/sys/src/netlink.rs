//! Blocking netlink requests (`netlink(7)`): one request, its acknowledgement or its dump.
//!
//! Message payloads are the callers' business: fixed structures of sock_diag, or those of netlink-packet-route. A crate
//! with its own event loop would cost more than the request in the middle of a blackout.

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use std::os::fd::{AsRawFd, OwnedFd};

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// What the kernel puts into one datagram of a dump at most (`netlink_dump`).
const DATAGRAM: usize = 32 << 10;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;

/// A netlink socket of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(protocol: SockProtocol) -> nix::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)?;
        Ok(Self { socket, buffer: vec![0; DATAGRAM], sequence: 0 })
    }

    /// Sends a request and waits for its acknowledgement. `flags` are added to those that every request has.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn request(&mut self, kind: u16, flags: u16, payload: &[u8]) -> nix::Result<()> {
        self.send(kind, flags | NLM_F_ACK, payload)?;
        self.receive(|_| ())
    }

    /// Asks for a dump and passes the payload of each message of the answer on.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn dump(&mut self, kind: u16, payload: &[u8], each: impl FnMut(&[u8])) -> nix::Result<()> {
        self.send(kind, NLM_F_DUMP, payload)?;
        self.receive(each)
    }

    fn send(&mut self, kind: u16, flags: u16, payload: &[u8]) -> nix::Result<()> {
        self.sequence += 1;
        let mut message = Vec::with_capacity(HEADER + payload.len());
        message.extend_from_slice(&((HEADER + payload.len()) as u32).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        message.extend_from_slice(&self.sequence.to_ne_bytes());
        message.extend_from_slice(&0u32.to_ne_bytes());
        message.extend_from_slice(payload);
        send(self.socket.as_raw_fd(), &message, MsgFlags::empty()).map(drop)
    }

    /// Reads until the message that ends the answer to the last request.
    fn receive(&mut self, mut each: impl FnMut(&[u8])) -> nix::Result<()> {
        loop {
            let len = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            let mut rest = &self.buffer[..len];
            while let Some((kind, sequence, payload)) = next_message(&mut rest) {
                match kind {
                    _ if sequence != self.sequence => (), // what an earlier request that failed has left behind
                    NLMSG_ERROR | NLMSG_DONE => return end_of_answer(payload),
                    _ => each(payload),
                }
            }
        }
    }
}

/// Both an acknowledgement and the end of a dump begin with a negative error number or 0.
fn end_of_answer(payload: &[u8]) -> nix::Result<()> {
    match payload.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        None | Some(0) => Ok(()),
        Some(code) => Err(Errno::from_raw(code.wrapping_neg())),
    }
}

/// Splits one message off: type, sequence number, payload.
fn next_message<'a>(rest: &mut &'a [u8]) -> Option<(u16, u32, &'a [u8])> {
    let header: &[u8; HEADER] = rest.first_chunk()?;
    let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let kind = u16::from_ne_bytes([header[4], header[5]]);
    let sequence = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
    let payload = rest.get(HEADER..len)?;
    *rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, sequence, payload))
}

/// The attributes (`struct nlattr`) in the rest of a message: type and value.
pub fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header: &[u8; 4] = rest.first_chunk()?;
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]);
        let value = rest.get(4..len)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_attributes_are_split_within_their_bounds() {
        let message = |len: u32, kind: u16, payload: &[u8]| {
            [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0, 0], &7u32.to_ne_bytes(), &[0; 4], payload]
                .concat()
        };
        let two = [message(18, 20, b"ab\0\0"), message(16, 3, b"")].concat();
        let mut rest = two.as_slice();
        assert_eq!(next_message(&mut rest), Some((20, 7, &b"ab"[..])));
        assert_eq!(next_message(&mut rest), Some((3, 7, &b""[..])));
        assert_eq!(next_message(&mut rest), None);
        for lying in [message(15, 20, b"ab"), message(19, 20, b"ab"), vec![1; 10]] {
            assert_eq!(next_message(&mut lying.as_slice()), None);
        }
        let list = [5, 0, 2, 0, b'x', 0, 0, 0, 8, 0, 4, 0, 1, 2, 3, 4, 99, 0, 1, 0];
        assert_eq!(attributes(&list).collect::<Vec<_>>(), [(2, &b"x"[..]), (4, &[1, 2, 3, 4][..])]);
    }

    #[test]
    fn the_kernels_refusal_is_the_error() {
        let mut netlink = Netlink::open(SockProtocol::NetlinkSockDiag).unwrap();
        assert_eq!(netlink.request(20, 0, &[250, 0, 0, 0]).unwrap_err(), Errno::EINVAL);
    }
}
