//! Gives a restored connection the FIN that the source had received.
//!
//! A FIN cannot be put into a receive queue, so it comes as a packet: from the peer's address, sent by pclive through a raw
//! socket to an address of this host. The kernel routes that through loopback and delivers it without asking where it
//! came from (the route of an outgoing packet stays with it, so `ip_rcv_finish` checks no source).

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

const FIN_ACK: u8 = 0x11;

/// A bare TCP segment with FIN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fin {
    /// Sender: the peer.
    pub(super) from: SocketAddr,
    /// Receiver: the restored socket.
    pub(super) to: SocketAddr,
    pub(super) sequence: u32,
    pub(super) acknowledgement: u32,
    /// As in the header: scaled.
    pub(super) window: u16,
}

/// Raw sockets of one network namespace.
#[derive(Debug)]
pub(super) struct Injector {
    ipv4: OwnedFd,
    ipv6: Option<OwnedFd>,
}

impl Injector {
    /// Opens them in the calling thread's network namespace.
    pub(super) fn open() -> nix::Result<Self> {
        // IPPROTO_RAW: the caller writes the IP header (raw(7); for IPv6 since Linux 4.5).
        let raw = |family| socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw);
        let ipv6 = match raw(AddressFamily::Inet6) {
            Ok(socket) => Some(socket),
            Err(Errno::EAFNOSUPPORT) => None,
            Err(errno) => return Err(errno),
        };
        Ok(Self { ipv4: raw(AddressFamily::Inet)?, ipv6 })
    }

    /// Sends the segment to the socket.
    pub(super) fn inject(&self, fin: Fin) -> nix::Result<()> {
        let (socket, packet) = match (fin.from.ip().to_canonical(), fin.to.ip().to_canonical()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => (&self.ipv4, ipv4_packet(from.octets(), to.octets(), fin)),
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let socket = self.ipv6.as_ref().ok_or(Errno::EAFNOSUPPORT)?;
                (socket, ipv6_packet(from.octets(), to.octets(), fin))
            }
            _ => return Err(Errno::EAFNOSUPPORT),
        };
        let to = SockaddrStorage::from(SocketAddr::new(fin.to.ip().to_canonical(), 0));
        sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty()).map(drop)
    }
}

fn segment(fin: Fin, pseudo_header: &[u8]) -> Vec<u8> {
    let mut segment = Vec::with_capacity(20);
    segment.extend_from_slice(&fin.from.port().to_be_bytes());
    segment.extend_from_slice(&fin.to.port().to_be_bytes());
    segment.extend_from_slice(&fin.sequence.to_be_bytes());
    segment.extend_from_slice(&fin.acknowledgement.to_be_bytes());
    segment.extend_from_slice(&[5 << 4, FIN_ACK]);
    segment.extend_from_slice(&fin.window.to_be_bytes());
    segment.extend_from_slice(&[0; 4]); // checksum, urgent pointer
    let sum = checksum(&[pseudo_header, &segment].concat());
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

fn ipv4_packet(from: [u8; 4], to: [u8; 4], fin: Fin) -> Vec<u8> {
    let pseudo_header = [&from[..], &to, &[0, libc::IPPROTO_TCP as u8, 0, 20]].concat();
    // Version and length, TOS, total length, id, no fragment, TTL, protocol, checksum: the kernel fills in what is 0.
    let header = [0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, libc::IPPROTO_TCP as u8, 0, 0];
    [&header[..], &from, &to, &segment(fin, &pseudo_header)].concat()
}

fn ipv6_packet(from: [u8; 16], to: [u8; 16], fin: Fin) -> Vec<u8> {
    let pseudo_header = [&from[..], &to, &[0, 0, 0, 20, 0, 0, 0, libc::IPPROTO_TCP as u8]].concat();
    // Version, class and flow label, payload length, next header, hop limit.
    let header = [0x60, 0, 0, 0, 0, 20, libc::IPPROTO_TCP as u8, 64];
    [&header[..], &from, &to, &segment(fin, &pseudo_header)].concat()
}

/// The internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    #[test]
    fn a_packet_with_its_checksum_sums_up_to_zero() {
        let fin = Fin {
            from: "10.0.0.9:4242".parse().unwrap(),
            to: "10.0.0.1:6379".parse().unwrap(),
            sequence: 0x1234_5678,
            acknowledgement: 0x9abc_def0,
            window: 502,
        };
        let packet = ipv4_packet([10, 0, 0, 9], [10, 0, 0, 1], fin);
        assert_eq!(packet.len(), 40);
        let pseudo_header = [10, 0, 0, 9, 10, 0, 0, 1, 0, 6, 0, 20];
        assert_eq!(checksum(&[&pseudo_header[..], &packet[20..]].concat()), 0);
        assert_eq!(packet[24..28], [0x12, 0x34, 0x56, 0x78]);
    }
}
