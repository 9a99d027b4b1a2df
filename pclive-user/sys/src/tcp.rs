//! TCP repair mode: reading and making connections without a packet (`TCP_REPAIR`, Linux 3.5).
//!
//! A socket in repair mode is not usable for its owner (`send` fails with `EINVAL`), and nothing but another
//! `setsockopt(2)` takes it out again, not even the death of the one who put it in. So [`Repair`] is a guard: it
//! leaves the mode when dropped, and everything that is read happens in between, in microseconds. Who may be killed
//! meanwhile leaves the [`way_out`] to somebody else, in a [`Codicil`](crate::codicil).
//!
//! What the kernel does here is in `net/ipv4/tcp.c` (`do_tcp_setsockopt`, `tcp_sendmsg_locked`, `tcp_peek_sndq`,
//! `tcp_repair_options_est`) and `net/ipv4/tcp_output.c` (`tcp_connect`, `tcp_write_xmit`).

use crate::codicil::Setting;
use crate::sockopt::{get, get_int, set, set_int};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};

const REPAIR_ON: i32 = 1;
/// Leaves without a window probe (Linux 4.19): nothing is to be sent, and the links may be down.
const REPAIR_OFF_NO_WP: i32 = -1;

/// `linux/tcp.h`; TCP option kinds as in the header.
const TCPOPT_MSS: u32 = 2;
const TCPOPT_WINDOW: u32 = 3;
const TCPOPT_SACK_PERM: u32 = 4;
const TCPOPT_TIMESTAMP: u32 = 8;

/// Bits of `tcpi_options`.
const TCPI_OPT_TIMESTAMPS: u8 = 1;
const TCPI_OPT_SACK: u8 = 2;
const TCPI_OPT_WSCALE: u8 = 4;

/// One `send` into the receive queue becomes one skb; larger ones need high-order pages.
const RECEIVE_CHUNK: usize = 32 << 10;

/// Which queue of a socket in repair mode the next calls are about (`TCP_REPAIR_QUEUE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// None; sending fails.
    None = 0,
    /// Received bytes that have not been read.
    Receive = 1,
    /// Written bytes that have not been acknowledged.
    Send = 2,
}

/// `struct tcp_repair_window`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairWindow {
    /// Sequence number of the segment that last updated the send window.
    pub snd_wl1: u32,
    /// Send window, counted from the first unacknowledged byte.
    pub snd_wnd: u32,
    /// Largest window that the peer ever offered.
    pub max_window: u32,
    /// Receive window last offered, counted from `rcv_wup`.
    pub rcv_wnd: u32,
    /// Next expected byte when it was offered.
    pub rcv_wup: u32,
}

/// What both sides agreed on in the handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// Largest segment that the peer takes.
    pub mss: u16,
    /// Send and receive window scale.
    pub window_scale: Option<(u8, u8)>,
    /// SACK permitted.
    pub sack: bool,
    /// Timestamps in use.
    pub timestamps: bool,
}

/// What `TCP_INFO` tells about a socket, as far as a migration needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    /// Kernel state number: `TCP_ESTABLISHED` = 1 …
    pub state: u8,
    /// SACK permitted.
    pub sack: bool,
    /// Timestamps in use.
    pub timestamps: bool,
    /// Send and receive window scale.
    pub window_scale: Option<(u8, u8)>,
    /// Retransmission timeout, in microseconds.
    pub rto_us: u32,
    /// Smoothed round-trip time in microseconds; 0 before the first sample.
    pub rtt_us: u32,
    /// Segments in flight; for a listener the length of its accept queue.
    pub unacked: u32,
    /// Segments SACKed; for a listener its backlog.
    pub sacked: u32,
    /// Path MTU.
    pub pmtu: u32,
    /// Congestion window in segments.
    pub snd_cwnd: u32,
    /// MSS that this side advertised.
    pub advmss: u32,
    /// Segments ever retransmitted.
    pub total_retrans: u32,
}

impl TcpInfo {
    /// Reads it (`TCP_INFO`).
    ///
    /// # Errors
    /// The kernel's; `EINVAL` if it returns less than the fields here.
    pub fn of(socket: BorrowedFd<'_>) -> nix::Result<Self> {
        // The structure grows from kernel to kernel.
        let mut raw = [0; offset_of!(libc::tcp_info, tcpi_total_retrans) + size_of::<u32>()];
        if get(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut raw)? < raw.len() {
            return Err(Errno::EINVAL);
        }
        let word = |at: usize| u32::from_ne_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let options = raw[offset_of!(libc::tcp_info, tcpi_options)];
        // A bit-field of two nibbles: send scale in the low one.
        let scale = raw[offset_of!(libc::tcp_info, tcpi_snd_rcv_wscale)];
        Ok(Self {
            state: raw[offset_of!(libc::tcp_info, tcpi_state)],
            sack: options & TCPI_OPT_SACK != 0,
            timestamps: options & TCPI_OPT_TIMESTAMPS != 0,
            window_scale: (options & TCPI_OPT_WSCALE != 0).then_some((scale & 0xf, scale >> 4)),
            rto_us: word(offset_of!(libc::tcp_info, tcpi_rto)),
            rtt_us: word(offset_of!(libc::tcp_info, tcpi_rtt)),
            unacked: word(offset_of!(libc::tcp_info, tcpi_unacked)),
            sacked: word(offset_of!(libc::tcp_info, tcpi_sacked)),
            pmtu: word(offset_of!(libc::tcp_info, tcpi_pmtu)),
            snd_cwnd: word(offset_of!(libc::tcp_info, tcpi_snd_cwnd)),
            advmss: word(offset_of!(libc::tcp_info, tcpi_advmss)),
            total_retrans: word(offset_of!(libc::tcp_info, tcpi_total_retrans)),
        })
    }
}

/// What takes a socket out of repair mode and makes it as it is now; also if it is in repair mode now.
///
/// The mode forces address reuse for `bind(2)` and forgets `SO_REUSEADDR` when it is left.
///
/// # Errors
/// The kernel's.
pub fn way_out(socket: BorrowedFd<'_>) -> nix::Result<[Setting; 2]> {
    // In the mode the option reads as SK_FORCE_REUSE: then somebody has been here before and died.
    get_int(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR).map(|reuse| way_out_to(reuse.min(1)))
}

fn way_out_to(reuse_address: i32) -> [Setting; 2] {
    [
        Setting { level: libc::IPPROTO_TCP, name: libc::TCP_REPAIR, value: REPAIR_OFF_NO_WP },
        Setting { level: libc::SOL_SOCKET, name: libc::SO_REUSEADDR, value: reuse_address },
    ]
}

/// A socket in repair mode; leaves the mode, without sending anything, when dropped.
#[derive(Debug)]
pub struct Repair<'a> {
    socket: BorrowedFd<'a>,
    way_out: [Setting; 2],
}

impl<'a> Repair<'a> {
    /// Puts a socket that does not listen into repair mode.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN` in the user namespace that owns the socket's network namespace, or if it listens.
    pub fn enter(socket: BorrowedFd<'a>) -> nix::Result<Self> {
        Self::enter_knowing(socket, way_out(socket)?)
    }

    /// The same with the [`way_out`] of the socket.
    ///
    /// # Errors
    /// As [`enter`](Self::enter).
    pub fn enter_knowing(socket: BorrowedFd<'a>, way_out: [Setting; 2]) -> nix::Result<Self> {
        set_int(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, REPAIR_ON)?;
        Ok(Self { socket, way_out })
    }

    /// Takes over a socket that [`stay`](Self::stay) left in repair mode; leaving it sets `SO_REUSEADDR` as told.
    pub fn resume(socket: BorrowedFd<'a>, reuse_address: bool) -> Self {
        Self { socket, way_out: way_out_to(reuse_address.into()) }
    }

    /// Leaves the socket in repair mode: closing it then sends neither FIN nor RST.
    pub fn stay(self) {
        std::mem::forget(self);
    }

    /// Leaves repair mode.
    ///
    /// # Errors
    /// The kernel's.
    pub fn leave(self) -> nix::Result<()> {
        let result = self.off();
        std::mem::forget(self);
        result
    }

    fn off(&self) -> nix::Result<()> {
        self.way_out.iter().try_for_each(|setting| setting.apply(self.socket))
    }

    /// Chooses the queue that the next calls are about.
    ///
    /// While the send queue is chosen, an acknowledgement that arrives makes the kernel count unsent segments as sent
    /// without sending them (`tcp_write_xmit`): choose another one soon.
    ///
    /// # Errors
    /// The kernel's.
    pub fn select(&self, queue: Queue) -> nix::Result<()> {
        set_int(self.socket, libc::IPPROTO_TCP, libc::TCP_REPAIR_QUEUE, queue as i32)
    }

    /// Sequence number after the last byte (or FIN) of the chosen queue.
    ///
    /// # Errors
    /// `EINVAL` if no queue is chosen.
    pub fn sequence(&self) -> nix::Result<u32> {
        get_int(self.socket, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ).map(|seq| seq as u32)
    }

    /// Sets the first sequence number of the chosen queue, before the socket is connected.
    ///
    /// # Errors
    /// `EPERM` once it is connected, `EINVAL` if no queue is chosen.
    pub fn set_sequence(&self, sequence: u32) -> nix::Result<()> {
        set_int(self.socket, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ, sequence as i32)
    }

    /// Reads up to `len` bytes of the chosen queue, from its beginning, and leaves them there.
    ///
    /// # Errors
    /// The kernel's; an empty queue is no error.
    pub fn peek(&self, len: usize) -> nix::Result<Vec<u8>> {
        if len == 0 {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; len];
        match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            Ok(len) => bytes.truncate(len),
            Err(Errno::EAGAIN) => bytes.clear(),
            Err(errno) => return Err(errno),
        }
        Ok(bytes)
    }

    /// Puts bytes into the receive queue, which must be chosen, as if they had arrived.
    ///
    /// # Errors
    /// `ENOMEM` if the socket's receive buffer is too small.
    pub fn fill_receive_queue(&self, bytes: &[u8]) -> nix::Result<()> {
        for mut chunk in bytes.chunks(RECEIVE_CHUNK) {
            while !chunk.is_empty() {
                let taken = send(self.socket.as_raw_fd(), chunk, MsgFlags::MSG_DONTWAIT)?;
                chunk = &chunk[taken..];
            }
        }
        Ok(())
    }

    /// Largest segment that the peer takes; in repair mode `TCP_MAXSEG` is what the handshake said.
    ///
    /// # Errors
    /// The kernel's.
    pub fn mss(&self) -> nix::Result<u32> {
        get_int(self.socket, libc::IPPROTO_TCP, libc::TCP_MAXSEG).map(|mss| mss as u32)
    }

    /// Sets what the handshake would have negotiated, on a socket that is connected and has not sent anything.
    ///
    /// # Errors
    /// `EFBIG` for a window scale above 14, `EPERM` once bytes were sent.
    pub fn set_negotiated(&self, negotiated: Negotiated) -> nix::Result<()> {
        // struct tcp_repair_opt: code and value, 32 bits each.
        let mut raw = Vec::with_capacity(32);
        let mut option = |code: u32, value: u32| {
            raw.extend_from_slice(&code.to_ne_bytes());
            raw.extend_from_slice(&value.to_ne_bytes());
        };
        option(TCPOPT_MSS, negotiated.mss.into());
        if let Some((send, receive)) = negotiated.window_scale {
            option(TCPOPT_WINDOW, u32::from(send) | u32::from(receive) << 16);
        }
        if negotiated.sack {
            option(TCPOPT_SACK_PERM, 0);
        }
        if negotiated.timestamps {
            option(TCPOPT_TIMESTAMP, 0);
        }
        set(self.socket, libc::IPPROTO_TCP, libc::TCP_REPAIR_OPTIONS, &raw)
    }

    /// Send and receive windows (`TCP_REPAIR_WINDOW`, Linux 4.8).
    ///
    /// # Errors
    /// The kernel's.
    pub fn window(&self) -> nix::Result<RepairWindow> {
        let mut raw = [0; 20];
        if get(self.socket, libc::IPPROTO_TCP, libc::TCP_REPAIR_WINDOW, &mut raw)? != raw.len() {
            return Err(Errno::EINVAL);
        }
        let word = |at: usize| u32::from_ne_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        Ok(RepairWindow {
            snd_wl1: word(0),
            snd_wnd: word(4),
            max_window: word(8),
            rcv_wnd: word(12),
            rcv_wup: word(16),
        })
    }

    /// Sets the windows; after the queues, because the kernel compares with the receive queue's end.
    ///
    /// # Errors
    /// `EINVAL` if `max_window < snd_wnd`, or the sequence numbers lie beyond what was received.
    pub fn set_window(&self, window: RepairWindow) -> nix::Result<()> {
        let words = [window.snd_wl1, window.snd_wnd, window.max_window, window.rcv_wnd, window.rcv_wup];
        let raw: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        set(self.socket, libc::IPPROTO_TCP, libc::TCP_REPAIR_WINDOW, &raw)
    }

    /// The timestamp that the socket would send now; bit 0 says that it counts microseconds (Linux 6.7).
    ///
    /// # Errors
    /// The kernel's.
    pub fn timestamp(&self) -> nix::Result<u32> {
        get_int(self.socket, libc::IPPROTO_TCP, libc::TCP_TIMESTAMP).map(|value| value as u32)
    }

    /// Makes the socket's timestamps continue from this value.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_timestamp(&self, timestamp: u32) -> nix::Result<()> {
        set_int(self.socket, libc::IPPROTO_TCP, libc::TCP_TIMESTAMP, timestamp as i32)
    }
}

impl Drop for Repair<'_> {
    fn drop(&mut self) {
        // A socket that cannot be taken out of the mode has no other owner who could be told.
        let _ = self.off();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        (TcpStream::connect(listener.local_addr().unwrap()).unwrap(), listener.accept().unwrap().0)
    }

    #[test]
    fn a_connection_is_read_and_goes_on_as_before() {
        let (mut a, mut b) = pair();
        a.write_all(b"unread").unwrap();
        let reuse = || get_int(b.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap();
        assert_eq!(reuse(), 1, "accepted sockets have it from the standard library's listener");
        {
            let repair = Repair::enter(b.as_fd()).unwrap();
            repair.select(Queue::Receive).unwrap();
            assert_eq!(repair.peek(100).unwrap(), b"unread");
            let end = repair.sequence().unwrap();
            assert_eq!(repair.window().unwrap().snd_wl1, end.wrapping_sub(6));
            repair.select(Queue::Send).unwrap();
            assert_eq!(repair.peek(100).unwrap(), b"");
            repair.select(Queue::None).unwrap();
            assert_eq!(nix::sys::socket::send(b.as_raw_fd(), b"x", MsgFlags::empty()), Err(Errno::EINVAL));
        }
        assert_eq!(reuse(), 1);
        let mut buffer = [0; 6];
        b.read_exact(&mut buffer).unwrap();
        b.write_all(b"answer").unwrap();
        a.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"answer");
    }

    #[test]
    fn a_socket_left_in_repair_mode_closes_without_a_word() {
        let (a, b) = pair();
        Repair::enter(b.as_fd()).unwrap().stay();
        drop(b);
        assert_eq!(TcpInfo::of(a.as_fd()).unwrap().state, crate::sock_diag::state::ESTABLISHED);
        // Nor does this end leave a FIN for somebody who has the port next.
        Repair::enter(a.as_fd()).unwrap().stay();
    }

    #[test]
    fn a_listener_has_no_repair_mode() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(Repair::enter(listener.as_fd()).unwrap_err(), Errno::EPERM);
    }
}
