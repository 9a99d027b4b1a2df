//! TCP sockets: listeners, connections in all states that have a descriptor, and closed ones.

use super::ahead::ReadAhead;
use super::options::{self, Family};
use super::{Connection, Provision, SocketError, Source};
use crate::capture::Access;
use nix::errno::Errno;
use nix::sys::socket::{SockaddrStorage, getpeername, getsockname};
use pclive_sys::sock_diag::state;
use pclive_sys::sockopt;
use pclive_sys::tcp::{Queue, Repair, RepairWindow, TcpInfo, way_out};
use pclive_wire::manifest::{TcpConnection, TcpSocket, TcpState};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;

/// How often the two ends of a connection are read before they are declared restless.
const PAIR_ATTEMPTS: usize = 16;

/// Captures one TCP socket, of which something may be known. Also says whether it was.
pub(super) fn capture(
    source: Source<'_>,
    ipv6: bool,
    known: Option<ReadAhead>,
    provision: &mut Provision,
) -> Result<(TcpSocket, bool), SocketError> {
    let info = source.call("TCP_INFO", TcpInfo::of(source.fd))?;
    let known = known.filter(|known| known.state == info.state);
    let was_known = known.is_some();
    if !was_known {
        refuse_extensions(source)?;
    }
    let local = source.call("getsockname", getsockname(source.fd.as_raw_fd()).and_then(to_std))?;
    let bound = local.port() != 0 || !local.ip().is_unspecified();
    let state = match info.state {
        state::LISTEN => listener(info)?,
        state::CLOSE => closed(source)?,
        state::SYN_SENT | state::SYN_RECV => {
            return Err(SocketError::transient(format!(
                "a TCP connection from {local} that is being opened"
            )));
        }
        _ => TcpState::Connected(Box::new(connection(source, provision)?)),
    };
    if is_link_local(local) {
        return Err(SocketError::unsupported(
            format!("a TCP socket with the link-local address {local}"),
            "have the program use an address that is not bound to one link",
        ));
    }
    let connected = matches!(state, TcpState::Connected(_));
    let options = match known {
        Some(known) => known.options_now(source, connected)?,
        None => source.options(Family::tcp(ipv6), connected, |_| true)?,
    };
    let socket = TcpSocket {
        ipv6,
        local: (bound && !matches!(state, TcpState::Dead)).then_some(local),
        state,
        owner: source.owner()?,
        options,
    };
    Ok((socket, was_known))
}

/// What only `setsockopt(2)` changes of a socket in `state`. Nothing of one that cannot be moved: the freeze finds that out.
pub(super) fn read_ahead(source: Source<'_>, ipv6: bool, state: u8) -> Option<ReadAhead> {
    let connected = !matches!(state, state::LISTEN | state::CLOSE);
    refuse_extensions(source).ok()?;
    let lasting = |option: &options::Known| !option.changes_by_itself();
    let options = source.options(Family::tcp(ipv6), connected, lasting).ok()?;
    Some(ReadAhead { ipv6, state, options })
}

/// What a socket can carry beyond TCP, and nobody can read out of it.
fn refuse_extensions(source: Source<'_>) -> Result<(), SocketError> {
    let mut ulp = [0; 16];
    match sockopt::get(source.fd, libc::IPPROTO_TCP, libc::TCP_ULP, &mut ulp) {
        Ok(0) | Err(Errno::ENOPROTOOPT) => (),
        Ok(len) => {
            let name = String::from_utf8_lossy(&ulp[..len]);
            let name = name.trim_end_matches('\0');
            return Err(SocketError::unsupported(
                format!("a TCP socket with the upper-layer protocol {name} in the kernel"),
                format!("turn off {name} in the kernel for this program"),
            ));
        }
        Err(errno) => return source.call("TCP_ULP", Err(errno)),
    }
    if source.call("SO_GET_FILTER", sockopt::has_filter(source.fd))? {
        return Err(SocketError::unsupported(
            "a TCP socket with a filter program",
            "have the program detach the filter",
        ));
    }
    Ok(())
}

/// On a listener `TCP_INFO` shows the accept queue's length and limit.
fn listener(info: TcpInfo) -> Result<TcpState, SocketError> {
    if info.unacked > 0 {
        let reason = format!("{} TCP connections that wait to be accepted", info.unacked);
        return Err(SocketError::transient(reason));
    }
    Ok(TcpState::Listen { backlog: info.sacked })
}

/// Never connected, or connected once: then it is shut down in both directions.
fn closed(source: Source<'_>) -> Result<TcpState, SocketError> {
    let events = source.call("poll", sockopt::poll_now(source.fd))?;
    if events & libc::POLLRDHUP == 0 {
        return Ok(TcpState::Closed);
    }
    let unread = source.call("SIOCINQ", sockopt::readable_bytes(source.fd))?;
    if source.access == Access::Frozen && (unread > 0 || events & libc::POLLERR != 0) {
        return Err(SocketError::transient(
            "a closed TCP connection with data or an error that was not read yet",
        ));
    }
    Ok(TcpState::Dead)
}

/// The remote address of a connection, and the rest of it if the container is frozen.
fn connection(source: Source<'_>, provision: &mut Provision) -> Result<TcpConnection, SocketError> {
    let remote = source.call("getpeername", getpeername(source.fd.as_raw_fd()).and_then(to_std))?;
    match source.access {
        Access::Survey => Ok(TcpConnection {
            remote,
            fin_received: false,
            fin_sent: false,
            read_shutdown: false,
            receive_sequence: 0,
            send_sequence: 0,
            receive_queue: Vec::new(),
            send_queue: Vec::new(),
            unsent: 0,
            window: [0; 5],
            mss: 0,
            advertised_mss: 0,
            path_mtu: 0,
            congestion_window: 0,
            window_scale: None,
            sack: false,
            timestamp: None,
        }),
        Access::Frozen => in_repair_mode(source, provision, |repair| read(source, repair, remote)),
    }
}

/// Puts the socket into repair mode for as long as `f` runs.
fn in_repair_mode<T>(
    source: Source<'_>,
    provision: &mut Provision,
    f: impl FnOnce(&Repair<'_>) -> Result<T, SocketError>,
) -> Result<T, SocketError> {
    let way_out = source.call("SO_REUSEADDR", way_out(source.fd))?;
    provision.during(source, &way_out, || {
        let repair = source.call("TCP_REPAIR", Repair::enter_knowing(source.fd, way_out))?;
        let result = f(&repair);
        source.call("TCP_REPAIR off", repair.leave())?;
        result
    })
}

/// Reads a connection in repair mode.
fn read(source: Source<'_>, repair: &Repair<'_>, remote: SocketAddr) -> Result<TcpConnection, SocketError> {
    let info = source.call("TCP_INFO", TcpInfo::of(source.fd))?;
    let (fin_received, fin_sent) = fins(info.state)?;
    let events = source.call("poll", sockopt::poll_now(source.fd))?;

    source.call("TCP_REPAIR_QUEUE", repair.select(Queue::Receive))?;
    let receive_end = source.call("TCP_QUEUE_SEQ", repair.sequence())?;
    let unread = source.call("SIOCINQ", sockopt::readable_bytes(source.fd))?;
    let receive_queue = source.call("recv MSG_PEEK", repair.peek(unread))?;
    let window = source.call("TCP_REPAIR_WINDOW", repair.window())?;
    let timestamp = info.timestamps.then(|| source.call("TCP_TIMESTAMP", repair.timestamp())).transpose()?;
    let mss = source.call("TCP_MAXSEG", repair.mss())?;

    source.call("TCP_REPAIR_QUEUE", repair.select(Queue::Send))?;
    let send_end = source.call("TCP_QUEUE_SEQ", repair.sequence())?;
    let unacknowledged = source.call("SIOCOUTQ", sockopt::unacknowledged_bytes(source.fd))?;
    let unsent = source.call("SIOCOUTQNSD", sockopt::unsent_bytes(source.fd))?;
    let send_queue = source.call("recv MSG_PEEK", repair.peek(unacknowledged))?;
    source.call("TCP_REPAIR_QUEUE", repair.select(Queue::None))?;

    // The kernel counts a FIN as the last byte of its queue; peeking does not show it.
    let fin_waits = usize::from(fin_sent && unacknowledged > 0);
    if receive_queue.len() != unread || send_queue.len() + fin_waits != unacknowledged {
        return Err(SocketError::transient(format!("the connection with {remote} moved while it was read")));
    }
    Ok(TcpConnection {
        remote,
        fin_received,
        fin_sent,
        read_shutdown: !fin_received && events & libc::POLLRDHUP != 0,
        receive_sequence: receive_end.wrapping_sub(fin_received.into()),
        send_sequence: send_end.wrapping_sub(fin_sent.into()),
        receive_queue,
        unsent: unsent.saturating_sub(fin_waits).min(send_queue.len()) as u32,
        send_queue,
        window: words(window),
        mss,
        advertised_mss: info.advmss,
        path_mtu: info.pmtu,
        congestion_window: info.snd_cwnd,
        window_scale: info.window_scale,
        sack: info.sack,
        timestamp,
    })
}

/// Which FINs a connection has received and sent.
fn fins(tcp_state: u8) -> Result<(bool, bool), SocketError> {
    match tcp_state {
        state::ESTABLISHED => Ok((false, false)),
        state::CLOSE_WAIT => Ok((true, false)),
        state::FIN_WAIT1 | state::FIN_WAIT2 => Ok((false, true)),
        state::LAST_ACK | state::CLOSING => Ok((true, true)),
        other => {
            Err(SocketError::transient(format!("a TCP connection that has just come into state {other}")))
        }
    }
}

fn words(window: RepairWindow) -> [u32; 5] {
    [window.snd_wl1, window.snd_wnd, window.max_window, window.rcv_wnd, window.rcv_wup]
}

/// Reads both ends of a connection so that both readings are true of one moment; see the module's documentation.
pub(super) fn capture_pair(
    first: &Connection,
    second: &Connection,
    provision: &mut Provision,
) -> Result<(TcpConnection, TcpConnection), SocketError> {
    for _ in 0..PAIR_ATTEMPTS {
        let first_reading = connection(first.source(), provision)?;
        let second_reading = connection(second.source(), provision)?;
        let again = connection(first.source(), provision)?;
        if extent(&first_reading) == extent(&again) {
            return Ok((first_reading, second_reading));
        }
    }
    Err(SocketError::transient(format!("bytes keep moving between {} and {}", first.local, first.remote)))
}

/// All that can move while both programs are stopped.
fn extent(connection: &TcpConnection) -> (u32, u32, usize, u32, bool) {
    let TcpConnection { receive_sequence, send_sequence, send_queue, unsent, fin_received, .. } = connection;
    (*receive_sequence, *send_sequence, send_queue.len(), *unsent, *fin_received)
}

/// A socket address as the standard library has it.
fn to_std(address: SockaddrStorage) -> nix::Result<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Ok(SocketAddrV4::from(*v4).into());
    }
    address.as_sockaddr_in6().map(|v6| SocketAddrV6::from(*v6).into()).ok_or(Errno::EAFNOSUPPORT)
}

/// Whether the address means something on one link only, by the number that the link has on this host.
fn is_link_local(address: SocketAddr) -> bool {
    matches!(address, SocketAddr::V6(v6) if v6.ip().is_unicast_link_local())
}
