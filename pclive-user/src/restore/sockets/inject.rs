//! TCP segments that pclive itself makes.
//!
//! To the restored socket, in the peer's name: the FIN that the source had received. It cannot be put into a receive queue,
//! so it comes as a packet, sent through a raw socket to an address of this host. The kernel routes that through loopback
//! and delivers it without asking where it came from (the route of an outgoing packet stays with it, so `ip_rcv_finish`
//! checks no source).
//!
//! To the peer, in the socket's name: its first segment once more, if nobody has answered it.

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

/// Flags of a TCP header.
pub(super) const FIN: u8 = 1;
pub(super) const PUSH: u8 = 8;
pub(super) const ACK: u8 = 16;

/// TTL or hop limit of what is sent (`IPDEFTTL`).
const TTL: u8 = 64;

/// A TCP segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment<'a> {
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) sequence: u32,
    pub(super) acknowledgement: u32,
    pub(super) flags: u8,
    /// As in the header: scaled.
    pub(super) window: u16,
    /// Value of the timestamp option.
    pub(super) timestamp: Option<u32>,
    pub(super) payload: &'a [u8],
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

    /// Sends a segment.
    pub(super) fn send(&self, segment: &Segment<'_>) -> nix::Result<()> {
        let (socket, packet) = match (segment.from.ip().to_canonical(), segment.to.ip().to_canonical()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                (&self.ipv4, ipv4_packet(from.octets(), to.octets(), segment))
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let socket = self.ipv6.as_ref().ok_or(Errno::EAFNOSUPPORT)?;
                (socket, ipv6_packet(from.octets(), to.octets(), segment))
            }
            _ => return Err(Errno::EAFNOSUPPORT),
        };
        let to = SockaddrStorage::from(SocketAddr::new(segment.to.ip().to_canonical(), 0));
        sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::MSG_DONTWAIT).map(drop)
    }
}

/// Header and payload; `pseudo_header` takes the length and gives what the checksum covers in addition.
fn tcp_segment(segment: &Segment<'_>, pseudo_header: impl FnOnce([u8; 2]) -> Vec<u8>) -> Vec<u8> {
    let options = match segment.timestamp {
        // Two NOPs align it, as everybody does (RFC 7323, appendix A). No echo: the restored socket has seen none.
        Some(value) => [&[1, 1, 8, 10][..], &value.to_be_bytes(), &[0; 4]].concat(),
        None => Vec::new(),
    };
    let mut bytes = Vec::with_capacity(20 + options.len() + segment.payload.len());
    bytes.extend_from_slice(&segment.from.port().to_be_bytes());
    bytes.extend_from_slice(&segment.to.port().to_be_bytes());
    bytes.extend_from_slice(&segment.sequence.to_be_bytes());
    bytes.extend_from_slice(&segment.acknowledgement.to_be_bytes());
    bytes.extend_from_slice(&[((20 + options.len() as u8) / 4) << 4, segment.flags]);
    bytes.extend_from_slice(&segment.window.to_be_bytes());
    bytes.extend_from_slice(&[0; 4]); // checksum, urgent pointer
    bytes.extend_from_slice(&options);
    bytes.extend_from_slice(segment.payload);
    let sum = checksum(&[pseudo_header((bytes.len() as u16).to_be_bytes()).as_slice(), &bytes].concat());
    bytes[16..18].copy_from_slice(&sum.to_be_bytes());
    bytes
}

fn ipv4_packet(from: [u8; 4], to: [u8; 4], segment: &Segment<'_>) -> Vec<u8> {
    let tcp =
        tcp_segment(segment, |length| [&from[..], &to, &[0, libc::IPPROTO_TCP as u8], &length].concat());
    // Version and length, TOS, total length, id, do not fragment, TTL, protocol, checksum; the kernel fills in what is 0.
    let [high, low] = (20 + tcp.len() as u16).to_be_bytes();
    let header = [0x45, 0, high, low, 0, 0, 0x40, 0, TTL, libc::IPPROTO_TCP as u8, 0, 0];
    [&header[..], &from, &to, &tcp].concat()
}

fn ipv6_packet(from: [u8; 16], to: [u8; 16], segment: &Segment<'_>) -> Vec<u8> {
    let pseudo_header =
        |length: [u8; 2]| [&from[..], &to, &[0, 0], &length, &[0, 0, 0, libc::IPPROTO_TCP as u8]].concat();
    let tcp = tcp_segment(segment, pseudo_header);
    // Version, class and flow label, payload length, next header, hop limit.
    let [high, low] = (tcp.len() as u16).to_be_bytes();
    let header = [0x60, 0, 0, 0, high, low, libc::IPPROTO_TCP as u8, TTL];
    [&header[..], &from, &to, &tcp].concat()
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
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
        let segment = Segment {
            from: "10.0.0.9:4242".parse().unwrap(),
            to: "10.0.0.1:6379".parse().unwrap(),
            sequence: 0x1234_5678,
            acknowledgement: 0x9abc_def0,
            flags: PUSH | ACK,
            window: 502,
            timestamp: Some(7),
            payload: b"odd",
        };
        let packet = ipv4_packet([10, 0, 0, 9], [10, 0, 0, 1], &segment);
        assert_eq!(packet.len(), 20 + 32 + 3);
        let pseudo_header = [10, 0, 0, 9, 10, 0, 0, 1, 0, 6, 0, 35];
        assert_eq!(checksum(&[&pseudo_header[..], &packet[20..]].concat()), 0);
        assert_eq!(packet[24..28], [0x12, 0x34, 0x56, 0x78]);
        assert_eq!(packet[32], 8 << 4);
    }
}
