//! From a connection that stands in repair mode to one that runs.

use super::inject::{ACK, FIN, Injector, PUSH, Segment};
use super::{Buffers, Differing, Name, RestoreError};
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};
use pclive_sys::sock_diag::state;
use pclive_sys::sockopt;
use pclive_sys::tcp::{Repair, TcpInfo};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Sent first on every connection; its number is one that the peer has acknowledged, so nobody ever reads it.
pub(super) const PROBE: u8 = 0;

/// What is left to do for a connection when it goes live.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) label: String,
    /// The probe byte, and what the source had sent.
    pub(super) sent: Vec<u8>,
    /// What it had not.
    pub(super) unsent: Vec<u8>,
    pub(super) buffers: Buffers,
    pub(super) no_delay: bool,
    pub(super) options: Differing,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    /// Number of the probe byte.
    pub(super) first_sequence: u32,
    /// Number of the next byte from the peer.
    pub(super) receive_sequence: u32,
    /// Windows as in a header: the one that the peer offers, and the one that this side offers.
    pub(super) peer_window: u16,
    pub(super) own_window: u16,
    pub(super) segment_size: usize,
    pub(super) fin_received: bool,
    pub(super) shut_write: bool,
    pub(super) shut_read: bool,
}

pub(super) fn no_delay(fd: BorrowedFd<'_>, on: bool) -> nix::Result<()> {
    sockopt::set_int(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, on.into())
}

/// Whether others may have the port beside it.
pub(super) fn reuse_address(fd: BorrowedFd<'_>, on: bool, name: &Name<'_>) -> Result<(), RestoreError> {
    name.call("SO_REUSEADDR", sockopt::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, on.into()))
}

impl Waiting {
    /// First half of going live: out of repair mode, and what the source had sent goes out again.
    pub(super) fn resend(&self, fd: BorrowedFd<'_>, injector: &Injector) -> Result<(), RestoreError> {
        let name = Name(&self.label);
        if self.fin_received {
            name.call("send a FIN", injector.send(&self.fin()))?;
        }
        // With reuse until its options are set: should pclive be killed meanwhile, what the kernel is left with must not keep
        // the port from a container that is moved here next.
        name.call("TCP_REPAIR off", Repair::resume(fd, true).leave())?;
        // A segment of its own: its acknowledgement is a measurement even if the data after it was lost.
        send_record(fd, &[PROBE], &name)?;
        send_record(fd, &self.sent[1..], &name)
    }

    /// Second half: what the source had not sent, and everything that may change how bytes are sent.
    pub(super) fn settle(&self, fd: BorrowedFd<'_>) -> Result<(), RestoreError> {
        let name = Name(&self.label);
        if !self.unsent.is_empty() {
            send_record(fd, &self.unsent, &name)?;
        }
        if self.shut_write {
            name.call("shutdown", shutdown(fd.as_raw_fd(), Shutdown::Write))?;
        }
        if self.shut_read {
            name.call("shutdown", shutdown(fd.as_raw_fd(), Shutdown::Read))?;
        }
        self.buffers.settle(fd, &name)?;
        if name.call("SIOCOUTQNSD", sockopt::unsent_bytes(fd))? == 0 {
            self.restore_delay(fd)?;
        }
        reuse_address(fd, false, &name)?;
        for (known, value) in &self.options {
            name.call(known.label, sockopt::set(fd, known.level, known.name, value))?;
        }
        Ok(())
    }

    /// Turns Nagle's algorithm on again, unless the program had turned it off.
    ///
    /// Not before everything has been sent, which pacing may put off a little: the algorithm would hold back the last
    /// segment, because the small one with the probe byte is not acknowledged yet.
    fn restore_delay(&self, fd: BorrowedFd<'_>) -> Result<(), RestoreError> {
        if self.no_delay {
            return Ok(());
        }
        Name(&self.label).call("TCP_NODELAY", no_delay(fd, false))
    }

    /// The peer's FIN, as it would come now.
    fn fin(&self) -> Segment<'_> {
        Segment {
            from: self.remote,
            to: self.local,
            sequence: self.receive_sequence,
            acknowledgement: self.first_sequence,
            flags: FIN | ACK,
            window: self.peer_window,
            timestamp: None,
            payload: &[],
        }
    }

    /// The first segment that the socket has sent, or tried to.
    fn first_segment(&self, timestamp: Option<u32>) -> Segment<'_> {
        Segment {
            from: self.local,
            to: self.remote,
            sequence: self.first_sequence,
            acknowledgement: self.receive_sequence.wrapping_add(self.fin_received.into()),
            flags: PUSH | ACK,
            window: self.own_window,
            timestamp,
            payload: &self.sent[..self.sent.len().min(self.segment_size.max(1))],
        }
    }
}

/// Sends bytes whose last segment nothing is added to (`MSG_EOR`, for TCP since Linux 4.7).
///
/// The source's last segment ended where the peer's window may end too. A longer one would not fit and not be sent at
/// all, and one that may still grow is held back (`tcp_tso_should_defer`) until an acknowledgement comes, which the kernel
/// would ignore, because it is of bytes that it has not sent.
fn send_record(fd: BorrowedFd<'_>, bytes: &[u8], name: &Name<'_>) -> Result<(), RestoreError> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_EOR;
        let sent = name.call("send", send(fd.as_raw_fd(), rest, flags))?;
        rest = &rest[sent..];
    }
    Ok(())
}

/// How long connections without an answer are attended to: the kernel has tried again itself by then.
const PATIENCE: Duration = Duration::from_secs(3);

/// Connections that have gone live and may not have heard from their peers yet.
#[derive(Debug)]
pub(super) struct LiveConnections {
    pub(super) connections: Vec<(OwnedFd, Waiting)>,
    pub(super) injector: Injector,
}

impl LiveConnections {
    /// [`attend`](Self::attend) on a thread of its own.
    pub(super) fn attend_in_background(self) {
        let attend = move || match self.attend(PATIENCE) {
            0 => (),
            silent => tracing::warn!("{silent} peers have not answered within {PATIENCE:?}"),
        };
        if let Err(error) = std::thread::Builder::new().name("attend".into()).spawn(attend) {
            tracing::warn!("connections are left to the kernel's own timeouts: {error}");
        }
    }

    /// Looks after the connections until each has had an answer, at most for `patience`; returns how many had none.
    ///
    /// A link that has just come up may lose the first packets: a switch port that does not forward yet, a neighbour that
    /// still knows the old host. A connection without any answer would try again after 1 to 3 s (it has no round-trip
    /// time), so its first segment is sent again from here, as the kernel would have made it, after 2 ms, 4 ms …
    /// The first answer gives the kernel what it needs to repair the rest by itself.
    ///
    /// A connection is let go as soon as it is answered: until then closing it would have no effect.
    fn attend(mut self, patience: Duration) -> usize {
        const TICK: Duration = Duration::from_millis(2);
        const LONGEST_PAUSE: Duration = Duration::from_millis(64);
        let start = Instant::now();
        let (mut pause, mut again) = (TICK, start + TICK);
        loop {
            self.let_go_of_done();
            if self.connections.is_empty() || start.elapsed() >= patience {
                return self.connections.len();
            }
            if Instant::now() >= again {
                self.send_again();
                pause = (pause * 2).min(LONGEST_PAUSE);
                again = Instant::now() + pause;
            }
            std::thread::sleep(TICK);
        }
    }

    fn send_again(&self) {
        for (fd, waiting) in &self.connections {
            // As with any packet, nobody knows whether it arrives; the next one follows.
            let _ = self.injector.send(&waiting.first_segment(timestamp(fd.as_fd())));
        }
    }

    fn let_go_of_done(&mut self) {
        self.connections.retain(|(fd, waiting)| {
            let done = is_done(fd.as_fd());
            if done && let Err(error) = waiting.restore_delay(fd.as_fd()) {
                tracing::warn!("{error}");
            }
            !done
        });
    }
}

/// The timestamp that the connection would send now, if it has timestamps.
fn timestamp(fd: BorrowedFd<'_>) -> Option<u32> {
    let in_use = TcpInfo::of(fd).is_ok_and(|info| info.timestamps);
    let value = sockopt::get_int(fd, libc::IPPROTO_TCP, libc::TCP_TIMESTAMP);
    value.ok().filter(|_| in_use).map(|value| value as u32)
}

/// Whether the peer has acknowledged the probe, or the connection is over, or has been captured and silenced here.
fn is_done(fd: BorrowedFd<'_>) -> bool {
    let moved_on = sockopt::get_int(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR) != Ok(0);
    moved_on || TcpInfo::of(fd).map_or(true, |info| info.rtt_us > 0 || info.state == state::CLOSE)
}
