//! Makes the container's TCP and unix-domain sockets: the mirror image of [`crate::capture::sockets`].
//!
//! # A connection without a handshake, on a link that is down
//!
//! A socket in repair mode connects without sending anything, but `connect(2)` still wants a route and a local address.
//! With the links down there is neither, so `route` lends it a route through loopback, and `IP_TRANSPARENT` an address.
//! When the links are up the kernel finds out by itself that the route is gone, and looks again.
//!
//! # Everything is sent again at once
//!
//! The obvious way to restore a send queue is to write it in repair mode: the kernel then takes it as sent. But a restored
//! connection knows no round-trip time, and `tcp_init_metrics` gives it a retransmission timeout of 3 s; if those bytes
//! were lost with the source's link, or their acknowledgement was, nothing would move for that long.
//!
//! So the connection starts at the first unacknowledged byte, and [`RestoredSockets::go_live`] sends the whole queue as
//! if it were new. The peer drops what it has and acknowledges all. For that to work everything the source had sent must
//! fit into the congestion window and the send window at once, because the kernel ignores an acknowledgement of bytes
//! that it has not sent yet: the peer's answer to a part would be lost, and with it everything. The window is
//! therefore at least what the source had sent, and the route's `initcwnd` gives the congestion window.
//!
//! And it starts one byte earlier than that, at a byte that the peer has acknowledged: every connection, even an idle
//! one, sends at least this byte, as a keep-alive probe would. The peer drops it and answers at once, which gives the
//! connection a round-trip time, and both sides the other's window and position, whatever was lost on the way.
//! `LiveConnections::attend` repeats it for those that get no answer.
//!
//! # FINs
//!
//! A FIN that was received comes again as a packet that pclive itself sends to the socket through loopback
//! (`inject`); one that was sent is sent again by `shutdown(2)`, after the data.

mod inject;
mod live;
mod route;
mod tcp;
#[cfg(test)]
mod tests;
mod unix;

use crate::capture::sockets::options::{self, Family, Known, When};
use inject::Injector;
use live::{LiveConnections, Waiting};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use pclive_sys::namespace::{NamespaceError, run_in_netns};
use pclive_sys::sockopt;
use pclive_wire::manifest::{
    Description, DescriptionId, DescriptionKind, OptionValue, SocketOption, TcpConnection, TcpSocket,
    TcpState,
};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A call failed.
    #[error("{call} for {socket}")]
    Call {
        /// Call or option.
        call: &'static str,
        /// Which socket.
        socket: String,
        /// Cause.
        source: Errno,
    },
    /// The manifest has an option that pclive does not set, or a value that it cannot have.
    #[error("option {name} of level {level} with {len} bytes for {socket}")]
    Option {
        /// Which socket.
        socket: String,
        /// Option level.
        level: i32,
        /// Option name.
        name: i32,
        /// Length of the value.
        len: usize,
    },
    /// The manifest contradicts itself.
    #[error("{socket}: {contradiction}")]
    Manifest {
        /// Which socket.
        socket: String,
        /// What does not fit.
        contradiction: &'static str,
    },
    /// The temporary route or the loopback link.
    #[error("{call} in the container's network namespace")]
    Network {
        /// Request.
        call: &'static str,
        /// Cause.
        source: Errno,
    },
    /// The network namespace cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
}

/// A socket of the manifest, as messages name it.
struct Name<'a>(&'a dyn std::fmt::Display);

impl Name<'_> {
    fn call<T>(&self, call: &'static str, result: nix::Result<T>) -> Result<T, RestoreError> {
        result.map_err(|source| RestoreError::Call { call, socket: self.0.to_string(), source })
    }

    fn contradiction(&self, contradiction: &'static str) -> RestoreError {
        RestoreError::Manifest { socket: self.0.to_string(), contradiction }
    }
}

/// The sockets of one container, ready to be given to its processes.
#[derive(Debug)]
pub struct RestoredSockets {
    sockets: HashMap<DescriptionId, OwnedFd>,
    connections: Vec<(DescriptionId, Waiting)>,
    injector: Option<Injector>,
}

impl RestoredSockets {
    /// Makes all TCP and unix sockets among `descriptions`, in the container's network namespace.
    ///
    /// Nothing is sent. TCP connections are in repair mode, in which no process may use them, until
    /// [`go_live`](Self::go_live). Descriptor flags and file status flags are left to the caller.
    ///
    /// # Errors
    /// The first socket that cannot be made; the ones made so far are closed without a packet.
    pub fn restore(descriptions: &[Description], netns: BorrowedFd<'_>) -> Result<Self, RestoreError> {
        run_in_netns(netns, || Self::make_all(descriptions))?
    }

    fn make_all(descriptions: &[Description]) -> Result<Self, RestoreError> {
        let mut made = Self { sockets: HashMap::new(), connections: Vec::new(), injector: None };
        let mut connections = Vec::new();
        let mut unix = Vec::new();
        let mut defaults = Defaults::default();
        // Listeners come first: afterwards their ports have connections, which they would conflict with.
        for (index, description) in descriptions.iter().enumerate() {
            let id = DescriptionId(index as u32);
            match &description.kind {
                DescriptionKind::Tcp(socket) => match &socket.state {
                    TcpState::Connected(connection) => {
                        connections.push((id, socket.as_ref(), connection.as_ref()))
                    }
                    TcpState::Closed | TcpState::Dead | TcpState::Listen { .. } => {
                        made.sockets.insert(id, tcp::unconnected(socket, &mut defaults)?);
                    }
                },
                DescriptionKind::Unix(socket) => unix.push((id, socket.as_ref())),
                _ => (),
            }
        }
        made.make_connections(connections, &mut defaults)?;
        made.sockets.extend(unix::make_all(&unix, &mut defaults)?);
        Ok(made)
    }

    fn make_connections(
        &mut self,
        mut connections: Vec<Connection<'_>>,
        defaults: &mut Defaults,
    ) -> Result<(), RestoreError> {
        if connections.is_empty() {
            return Ok(());
        }
        let injector = Injector::open();
        self.injector =
            Some(injector.map_err(|source| RestoreError::Network { call: "socket SOCK_RAW", source })?);
        for ipv6 in [false, true] {
            if let Some((_, socket, _)) = connections.iter().find(|(_, socket, _)| socket.ipv6 == ipv6) {
                tcp::learn_defaults(socket, defaults)?;
            }
        }
        let metrics = |(_, _, connection): &Connection<'_>| route::Metrics::of(connection);
        // Those that take the same route one after another, so that it seldom changes.
        connections.sort_by_key(metrics);
        let mut routes = route::Borrowed::new()?;
        for group in connections.chunk_by(|a, b| metrics(a) == metrics(b)) {
            routes.lend(metrics(&group[0]))?;
            let connect =
                |(_, socket, connection): &Connection<'_>| tcp::connect(socket, connection, defaults);
            for ((id, ..), made) in group.iter().zip(side_by_side(group, connect)) {
                let (fd, waiting) = made?;
                self.sockets.insert(*id, fd);
                self.connections.push((*id, waiting));
            }
        }
        routes.give_back()
    }

    /// The socket of a description; `None` if the description is something else.
    pub fn get(&self, id: DescriptionId) -> Option<BorrowedFd<'_>> {
        self.sockets.get(&id).map(AsFd::as_fd)
    }

    /// Lets the connections run: takes them out of repair mode and sends what waits.
    ///
    /// To be called after the commit, when the links are up and announced, and before the container's processes run and
    /// packets that were held are let through: a segment that comes earlier acknowledges bytes that this side has not
    /// sent yet, and is dropped. There is no way back, so a connection that fails does not stop the others.
    ///
    /// Returns the failures. A thread goes on attending to connections that get no answer.
    pub fn go_live(mut self) -> Vec<RestoreError> {
        let Some(injector) = self.injector else { return Vec::new() };
        let sockets = &mut self.sockets;
        let with_socket = |(id, waiting)| Some((sockets.remove(&id)?, waiting));
        let connections: Vec<_> = self.connections.into_iter().filter_map(with_socket).collect();
        let resend = |(fd, waiting): &(OwnedFd, Waiting)| waiting.resend(fd.as_fd(), &injector);
        let settle = |(fd, waiting): &(OwnedFd, Waiting)| waiting.settle(fd.as_fd());
        let mut done = side_by_side(&connections, resend);
        done.extend(side_by_side(&connections, settle));
        let failed = done.into_iter().filter_map(Result::err).collect();
        LiveConnections { connections, injector }.attend_in_background();
        failed
    }
}

/// A connection of the manifest.
type Connection<'a> = (DescriptionId, &'a TcpSocket, &'a TcpConnection);

/// Option values that new sockets have in this network namespace: for each family in the order of its table.
#[derive(Debug, Default)]
struct Defaults(HashMap<Family, Vec<Option<OptionValue>>>);

/// Options that are to be set.
type Differing = Vec<(&'static Known, OptionValue)>;

impl Defaults {
    /// Learns those of a family, if they are not known, from a `fresh` socket.
    fn learn(&mut self, family: Family, fresh: BorrowedFd<'_>, name: &Name<'_>) -> Result<(), RestoreError> {
        if let Entry::Vacant(entry) = self.0.entry(family) {
            let read = |known: &Known| name.call(known.label, known.get(fresh));
            entry.insert(options::table(family, false).map(read).collect::<Result<_, _>>()?);
        }
        Ok(())
    }

    /// The options that must be set, in the table's order: those that differ from what a new socket of a family that was
    /// learned has.
    fn differing(
        &self,
        family: Family,
        connected: bool,
        options: &[SocketOption],
        name: &Name<'_>,
    ) -> Result<Differing, RestoreError> {
        let mut wanted: Vec<&SocketOption> = options.iter().collect();
        wanted.sort_unstable_by_key(|option| (option.level, option.name));
        let find = |known: &Known| {
            wanted.binary_search_by_key(&(known.level, known.name), |option| (option.level, option.name)).ok()
        };
        let mut differing = Vec::new();
        let mut found = 0;
        for (known, default) in options::table(family, connected).zip(&self.0[&family]) {
            let Some(option) = find(known).map(|at| wanted[at]) else { continue };
            found += 1;
            if !known.takes(&option.value) {
                return Err(refused(option, name));
            }
            if *default != Some(option.value) {
                differing.push((known, option.value));
            }
        }
        let is_unknown = |option: &&SocketOption| {
            options::table(family, connected)
                .all(|known| (known.level, known.name) != (option.level, option.name))
        };
        // Or one of them has come twice.
        if found < options.len()
            && let Some(unknown) = options.iter().find(is_unknown)
        {
            return Err(refused(unknown, name));
        }
        Ok(differing)
    }
}

/// Does the same `work` with all `items`: with many of them on several threads, which are in the caller's network namespace.
fn side_by_side<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    /// So many connections take some 2 ms. For a thread to come to run beside another takes up to half a millisecond.
    const FEW: usize = 64;
    let most = items.len() / FEW;
    let threads =
        if most < 2 { 1 } else { std::thread::available_parallelism().map_or(1, usize::from).min(most) };
    if threads < 2 {
        return items.iter().map(work).collect();
    }
    let work = |part: &[T]| part.iter().map(&work).collect::<Vec<R>>();
    std::thread::scope(|scope| {
        let start = |part| (part, std::thread::Builder::new().spawn_scoped(scope, move || work(part)));
        let started: Vec<_> = items.chunks(items.len().div_ceil(threads)).map(start).collect();
        let finish = |(part, thread): (_, std::io::Result<std::thread::ScopedJoinHandle<'_, _>>)| match thread
        {
            Ok(thread) => thread.join().expect("no connection panics"),
            // Where there may be no more threads: this one.
            Err(_) => work(part),
        };
        started.into_iter().flat_map(finish).collect()
    })
}

fn refused(option: &SocketOption, name: &Name<'_>) -> RestoreError {
    let (level, len) = (option.level, option.value.len());
    RestoreError::Option { socket: name.0.to_string(), level, name: option.name, len }
}

/// Sets the options that are due.
fn set_options(
    socket: BorrowedFd<'_>,
    options: &[(&'static Known, OptionValue)],
    when: When,
    name: &Name<'_>,
) -> Result<(), RestoreError> {
    for (known, value) in options.iter().filter(|(known, _)| known.when == when) {
        name.call(known.label, sockopt::set(socket, known.level, known.name, value))?;
    }
    Ok(())
}

/// A new socket that belongs to `owner`: `SO_REUSEPORT` groups, among others, go by user.
fn new_socket(
    family: AddressFamily,
    socket_type: SockType,
    owner: u32,
    name: &Name<'_>,
) -> Result<OwnedFd, RestoreError> {
    let fd = name.call("socket", socket(family, socket_type, SockFlag::SOCK_CLOEXEC, None))?;
    if owner != nix::unistd::Uid::effective().as_raw() {
        name.call("fchown", nix::unistd::fchown(&fd, Some(owner.into()), None))?;
    }
    Ok(fd)
}

/// The sizes of a socket's buffers, which are made larger for as long as queues are filled.
#[derive(Clone, Copy, Debug, Default)]
struct Buffers {
    send: Option<i32>,
    receive: Option<i32>,
    lock: Option<i32>,
}

/// Truesize of queued bytes is at most about twice their number, and there is an overhead for each segment.
fn room_for(bytes: usize) -> i32 {
    const HEADROOM: usize = 64 << 10;
    i32::try_from(bytes.saturating_mul(2).saturating_add(HEADROOM)).unwrap_or(i32::MAX)
}

impl Buffers {
    fn of(options: &[SocketOption]) -> Self {
        let find = |name| options::find_int(options, libc::SOL_SOCKET, name);
        Self { send: find(libc::SO_SNDBUF), receive: find(libc::SO_RCVBUF), lock: find(options::SO_BUF_LOCK) }
    }

    /// Sets the sizes, at least large enough for so many bytes in the queues.
    fn set(
        self,
        socket: BorrowedFd<'_>,
        to_send: usize,
        received: usize,
        name: &Name<'_>,
    ) -> Result<(), RestoreError> {
        let sizes = [
            ("SO_SNDBUFFORCE", libc::SO_SNDBUFFORCE, self.send, to_send),
            ("SO_RCVBUFFORCE", libc::SO_RCVBUFFORCE, self.receive, received),
        ];
        for (call, option, size, queued) in sizes {
            let needed = if queued == 0 { 0 } else { room_for(queued) };
            let Some(size) = size.map(|size| size.max(needed)) else { continue };
            // The kernel doubles what is set, and shows the double (socket(7)).
            name.call(call, sockopt::set_int(socket, libc::SOL_SOCKET, option, size / 2))?;
        }
        Ok(())
    }

    /// Sets the sizes for good, and lets the kernel tune those that the program has not set itself (Linux 5.16).
    fn settle(self, socket: BorrowedFd<'_>, name: &Name<'_>) -> Result<(), RestoreError> {
        self.set(socket, 0, 0, name)?;
        match self.lock {
            Some(lock) => name
                .call("SO_BUF_LOCK", sockopt::set_int(socket, libc::SOL_SOCKET, options::SO_BUF_LOCK, lock)),
            None => Ok(()),
        }
    }
}
