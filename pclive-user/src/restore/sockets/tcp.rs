//! TCP sockets: listeners, closed ones, and connections.

use super::live::{PROBE, Waiting, no_delay, reuse_address};
use super::{Buffers, Defaults, Name, RestoreError, new_socket, set_options};
use crate::capture::sockets::options::{Family, When, find_int};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockType, SockaddrStorage, bind, connect as connect_call, listen,
    shutdown,
};
use pclive_sys::sockopt;
use pclive_sys::tcp::{Negotiated, Queue, Repair, RepairWindow};
use pclive_wire::manifest::{TcpConnection, TcpSocket, TcpState};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

fn family(socket: &TcpSocket) -> (AddressFamily, Family) {
    if socket.ipv6 { (AddressFamily::Inet6, Family::Tcp6) } else { (AddressFamily::Inet, Family::Tcp4) }
}

/// Makes a socket that is not connected.
pub(super) fn unconnected(socket: &TcpSocket, defaults: &mut Defaults) -> Result<OwnedFd, RestoreError> {
    let label = match (&socket.state, socket.local) {
        (TcpState::Listen { .. }, Some(local)) => format!("the TCP listener {local}"),
        (_, Some(local)) => format!("the TCP socket {local}"),
        (_, None) => "an unbound TCP socket".into(),
    };
    let name = Name(&label);
    let (address_family, family) = family(socket);
    let fd = new_socket(address_family, SockType::Stream, socket.owner, &name)?;
    defaults.learn(family, fd.as_fd(), &name)?;
    let options = defaults.differing(family, false, &socket.options, &name)?;
    set_options(fd.as_fd(), &options, When::Birth, &name)?;
    // A container that comes back finds connections of its earlier stay here in TIME_WAIT: they must not keep the port.
    reuse_address(fd.as_fd(), true, &name)?;
    if let Some(local) = socket.local {
        let transparent = Transparent::on(fd.as_fd(), &socket.options, &name)?;
        name.call("bind", bind(fd.as_raw_fd(), &SockaddrStorage::from(local)))?;
        transparent.off(&name)?;
    }
    Buffers::of(&socket.options).settle(fd.as_fd(), &name)?;
    set_options(fd.as_fd(), &options, When::Connected, &name)?;
    match &socket.state {
        TcpState::Listen { backlog } => {
            let backlog = i32::try_from(*backlog).ok().and_then(|backlog| Backlog::new(backlog).ok());
            name.call("listen", listen(&fd, backlog.unwrap_or(Backlog::MAXALLOWABLE)))?;
        }
        // The kernel marks the socket and then says that it is not connected (inet_shutdown).
        TcpState::Dead => match shutdown(fd.as_raw_fd(), Shutdown::Both) {
            Ok(()) | Err(Errno::ENOTCONN) => (),
            Err(errno) => return name.call("shutdown", Err(errno)),
        },
        TcpState::Closed | TcpState::Connected(_) => (),
    }
    reuse_address(fd.as_fd(), false, &name)?;
    set_options(fd.as_fd(), &options, When::Live, &name)?;
    Ok(fd)
}

/// `IP_TRANSPARENT` for a moment: lets a socket have a local address that its link, which is down, does not have yet.
struct Transparent<'a> {
    socket: BorrowedFd<'a>,
    wanted: i32,
}

impl<'a> Transparent<'a> {
    fn on(
        socket: BorrowedFd<'a>,
        options: &[pclive_wire::manifest::SocketOption],
        name: &Name<'_>,
    ) -> Result<Self, RestoreError> {
        let wanted = find_int(options, libc::IPPROTO_IP, libc::IP_TRANSPARENT).unwrap_or(0);
        let set = sockopt::set_int(socket, libc::IPPROTO_IP, libc::IP_TRANSPARENT, 1);
        name.call("IP_TRANSPARENT", set)?;
        Ok(Self { socket, wanted })
    }

    fn off(self, name: &Name<'_>) -> Result<(), RestoreError> {
        let set = sockopt::set_int(self.socket, libc::IPPROTO_IP, libc::IP_TRANSPARENT, self.wanted);
        name.call("IP_TRANSPARENT", set)
    }
}

/// Learns what a new socket of the same family has.
pub(super) fn learn_defaults(socket: &TcpSocket, defaults: &mut Defaults) -> Result<(), RestoreError> {
    let (address_family, family) = family(socket);
    let name = Name(&"a new TCP socket");
    let fresh = new_socket(address_family, SockType::Stream, socket.owner, &name)?;
    defaults.learn(family, fresh.as_fd(), &name)
}

/// Makes a connection, which stays in repair mode. Its route has been lent, and the defaults of its family are known.
pub(super) fn connect(
    socket: &TcpSocket,
    connection: &TcpConnection,
    defaults: &Defaults,
) -> Result<(OwnedFd, Waiting), RestoreError> {
    let Some(local) = socket.local else {
        let label = format!("the TCP connection with {}", connection.remote);
        return Err(Name(&label).contradiction("connected, but without a local address"));
    };
    let label = format!("the TCP connection of {local} with {}", connection.remote);
    let name = Name(&label);
    if connection.unsent as usize > connection.send_queue.len() || connection.remote.is_ipv6() != socket.ipv6
    {
        return Err(name.contradiction("its parts do not fit each other"));
    }

    let (address_family, family) = family(socket);
    let fd = new_socket(address_family, SockType::Stream, socket.owner, &name)?;
    let options = defaults.differing(family, true, &socket.options, &name)?;
    set_options(fd.as_fd(), &options, When::Birth, &name)?;
    let buffers = Buffers::of(&socket.options);
    buffers.set(fd.as_fd(), 0, 0, &name)?;

    let repair = name.call("TCP_REPAIR", Repair::enter(fd.as_fd()))?;
    let transparent = Transparent::on(fd.as_fd(), &socket.options, &name)?;
    establish(&repair, fd.as_fd(), local, connection, &name)?;
    transparent.off(&name)?;
    buffers.set(fd.as_fd(), connection.send_queue.len() + 1, connection.receive_queue.len(), &name)?;
    fill(&repair, connection, &name)?;
    set_options(fd.as_fd(), &options, When::Connected, &name)?;
    // What is sent first must not wait for an acknowledgement of what was sent before it.
    name.call("TCP_NODELAY", no_delay(fd.as_fd(), true))?;
    repair.stay();

    let options = options.into_iter().filter(|(known, _)| known.when == When::Live).collect();
    let no_delay = find_int(&socket.options, libc::IPPROTO_TCP, libc::TCP_NODELAY).unwrap_or(0) != 0;
    Ok((fd, Waiting { buffers, options, no_delay, ..waiting(label, local, connection) }))
}

/// What the connection says about going live; options are the caller's to add.
fn waiting(label: String, local: SocketAddr, connection: &TcpConnection) -> Waiting {
    let queue = &connection.send_queue;
    let (sent, unsent) = queue.split_at(queue.len() - connection.unsent as usize);
    let scale = connection.window_scale.unwrap_or_default();
    let window = window(connection);
    Waiting {
        label,
        sent: [&[PROBE][..], sent].concat(),
        unsent: unsent.to_vec(),
        buffers: Buffers::default(),
        no_delay: false,
        options: Vec::new(),
        local,
        remote: connection.remote,
        first_sequence: first_sequence(connection),
        receive_sequence: connection.receive_sequence,
        peer_window: scaled(window.snd_wnd, scale.0),
        own_window: scaled(window.rcv_wnd, scale.1),
        segment_size: segment_size(connection),
        fin_received: connection.fin_received,
        shut_write: connection.fin_sent,
        shut_read: connection.read_shutdown,
    }
}

/// Number of the probe byte: the one before the first unacknowledged byte.
fn first_sequence(connection: &TcpConnection) -> u32 {
    connection.send_sequence.wrapping_sub(connection.send_queue.len() as u32 + 1)
}

/// `TCP_MIN_MSS` and `MAX_TCP_WINDOW` of `include/net/tcp.h`.
const SMALLEST_MAXSEG: u16 = 88;
const LARGEST_MAXSEG: u16 = 32767;

fn max_segment(fd: BorrowedFd<'_>, size: u16) -> nix::Result<()> {
    sockopt::set_int(fd, libc::IPPROTO_TCP, libc::TCP_MAXSEG, size.into())
}

/// From a new socket to an established connection with the right sequence numbers and options.
fn establish(
    repair: &Repair<'_>,
    fd: BorrowedFd<'_>,
    local: SocketAddr,
    connection: &TcpConnection,
    name: &Name<'_>,
) -> Result<(), RestoreError> {
    let unread = connection.receive_queue.len() as u32;
    name.call("TCP_REPAIR_QUEUE", repair.select(Queue::Send))?;
    name.call("TCP_QUEUE_SEQ", repair.set_sequence(first_sequence(connection)))?;
    name.call("TCP_REPAIR_QUEUE", repair.select(Queue::Receive))?;
    name.call("TCP_QUEUE_SEQ", repair.set_sequence(connection.receive_sequence.wrapping_sub(unread)))?;
    name.call("bind", bind(fd.as_raw_fd(), &SockaddrStorage::from(local)))?;
    let mss = u16::try_from(connection.mss).map_err(|_| name.contradiction("its MSS is too large"))?;
    // Connecting computes the size of segments from this, and nothing does it again while the path MTU stays the same.
    name.call("TCP_MAXSEG", max_segment(fd, mss.clamp(SMALLEST_MAXSEG, LARGEST_MAXSEG)))?;
    name.call("connect", connect_call(fd.as_raw_fd(), &SockaddrStorage::from(connection.remote)))?;
    name.call("TCP_MAXSEG", max_segment(fd, 0))?;
    let negotiated = Negotiated {
        mss,
        window_scale: connection.window_scale,
        sack: connection.sack,
        timestamps: connection.timestamp.is_some(),
    };
    name.call("TCP_REPAIR_OPTIONS", repair.set_negotiated(negotiated))?;
    match connection.timestamp {
        Some(timestamp) => name.call("TCP_TIMESTAMP", repair.set_timestamp(timestamp)),
        None => Ok(()),
    }
}

/// The receive queue and the windows.
fn fill(repair: &Repair<'_>, connection: &TcpConnection, name: &Name<'_>) -> Result<(), RestoreError> {
    name.call("TCP_REPAIR_QUEUE", repair.select(Queue::Receive))?;
    name.call("send to the receive queue", repair.fill_receive_queue(&connection.receive_queue))?;
    name.call("TCP_REPAIR_QUEUE", repair.select(Queue::None))?;
    name.call("TCP_REPAIR_WINDOW", repair.set_window(window(connection)))
}

/// The windows that make the kernel go on from where the source was.
fn window(connection: &TcpConnection) -> RepairWindow {
    let [_, snd_wnd, max_window, rcv_wnd, rcv_wup] = connection.window;
    let sent = connection.send_queue.len() as u32 - connection.unsent;
    // What was sent was once allowed, even if the peer has shrunk its window since. Counted from the probe byte; and a
    // last segment that fills the window to the brim is held back (tcp_tso_should_defer).
    let snd_wnd = snd_wnd.max(sent).saturating_add(2);
    // The right edge that was offered stays; counted from the next byte.
    let offered = rcv_wup.wrapping_add(rcv_wnd).wrapping_sub(connection.receive_sequence);
    let rcv_wnd = if offered > i32::MAX as u32 { 0 } else { offered };
    RepairWindow {
        // Older than anything that comes: the first segment of the peer updates the window.
        snd_wl1: connection.receive_sequence.wrapping_sub(1),
        snd_wnd,
        max_window: max_window.max(snd_wnd),
        rcv_wnd,
        rcv_wup: connection.receive_sequence,
    }
}

/// A window as a header has it. Rounded up: the one that the kernel takes from it must not become smaller.
fn scaled(window: u32, scale: u8) -> u16 {
    let scale = scale.min(14);
    let scaled = (u64::from(window) + (1 << scale) - 1) >> scale;
    scaled.min(u64::from(u16::MAX)) as u16
}

/// Bytes that certainly fit into one segment with all headers and options.
fn segment_size(connection: &TcpConnection) -> usize {
    const HEADERS: u32 = 100;
    connection.mss.min(connection.path_mtu).saturating_sub(HEADERS) as usize
}
