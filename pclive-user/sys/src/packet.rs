//! Raw link-layer frames: `packet(7)`.

use nix::errno::Errno;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Bytes of an Ethernet header.
pub const ETHERNET_HEADER: usize = 14;

/// A packet socket, which belongs to the network namespace that it was made in.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// A socket that sends frames and receives none.
    pub fn for_sending() -> nix::Result<Self> {
        // SAFETY: socket takes three integers and touches no memory of ours.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        let fd = Errno::result(fd)?;
        // SAFETY: the kernel has just made this descriptor for us; nobody else knows its number.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sends a whole Ethernet frame through link `index`.
    ///
    /// # Errors
    /// `EMSGSIZE` without a whole Ethernet header, `ENETDOWN` if the link is down, `ENXIO` if there is none.
    pub fn send(&self, index: u32, frame: &[u8]) -> nix::Result<()> {
        let protocol = frame.get(12..ETHERNET_HEADER).ok_or(Errno::EMSGSIZE)?;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: u16::from_ne_bytes([protocol[0], protocol[1]]),
            sll_ifindex: index as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: buffer and address are valid for reading with the lengths given, and the kernel only reads them.
        let sent = unsafe {
            libc::sendto(
                self.0.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        Errno::result(sent).map(drop)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_needs_a_header_and_a_link() {
        let socket = PacketSocket::for_sending().unwrap();
        assert_eq!(socket.send(1, &[0; 13]).unwrap_err(), Errno::EMSGSIZE);
        assert_eq!(socket.send(1 << 30, &[0; 60]).unwrap_err(), Errno::ENXIO);
    }
}
