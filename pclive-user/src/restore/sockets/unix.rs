//! Unix-domain sockets: first the listeners, then pairs, then the rest, then what waits in their queues.
//!
//! A socket that was accepted has its listener's name, which it cannot bind itself, so connections with a name are made
//! as the program made them: through the listener, or through one made for the purpose if the program has closed it.

use super::{Buffers, Defaults, Name, RestoreError, new_socket, room_for, set_options};
use crate::capture::sockets::options::{Family, When};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr, bind, connect, listen, send,
    shutdown, socketpair,
};
use pclive_sys::sockopt;
use pclive_wire::manifest::{DescriptionId, UnixPeer, UnixSocket};
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

const RCV_SHUTDOWN: u8 = 1;
const SEND_SHUTDOWN: u8 = 2;

/// Makes all unix sockets of a container.
pub(super) fn make_all(
    sockets: &[(DescriptionId, &UnixSocket)],
    defaults: &mut Defaults,
) -> Result<HashMap<DescriptionId, OwnedFd>, RestoreError> {
    let by_id: HashMap<u32, &UnixSocket> = sockets.iter().map(|(_, socket)| (socket.id, *socket)).collect();
    let mut maker = Maker { by_id, made: HashMap::new(), far_ends: HashMap::new() };
    for (_, socket) in sockets {
        if socket.backlog.is_some() {
            maker.listener(socket)?;
        }
    }
    for (_, socket) in sockets {
        maker.connected_or_single(socket)?;
    }
    for (_, socket) in sockets {
        maker.send_to_name(socket)?;
        maker.fill(socket)?;
    }
    let mut result = HashMap::new();
    // Only now: a far end that stands for a closed peer must outlive the messages it sends.
    maker.far_ends.clear();
    for (id, socket) in sockets {
        let label = label(socket);
        let name = Name(&label);
        let fd =
            maker.made.remove(&socket.id).ok_or_else(|| name.contradiction("its number is not its own"))?;
        finish(fd.as_fd(), socket, defaults, &name)?;
        result.insert(*id, fd);
    }
    Ok(result)
}

fn label(socket: &UnixSocket) -> String {
    format!("unix socket {}", socket.id)
}

fn socket_type(socket: &UnixSocket, name: &Name<'_>) -> Result<SockType, RestoreError> {
    match socket.socket_type {
        libc::SOCK_STREAM => Ok(SockType::Stream),
        libc::SOCK_DGRAM => Ok(SockType::Datagram),
        libc::SOCK_SEQPACKET => Ok(SockType::SeqPacket),
        _ => Err(name.contradiction("no such type of unix socket")),
    }
}

/// The abstract address after its NUL.
fn address(socket: &UnixSocket, name: &Name<'_>) -> Result<UnixAddr, RestoreError> {
    match socket.address.split_first() {
        Some((0, rest)) => name.call("abstract address", UnixAddr::new_abstract(rest)),
        _ => Err(name.contradiction("an address with a path")),
    }
}

fn new(socket: &UnixSocket, name: &Name<'_>) -> Result<OwnedFd, RestoreError> {
    new_socket(AddressFamily::Unix, socket_type(socket, name)?, socket.owner, name)
}

fn bind_if_named(fd: BorrowedFd<'_>, socket: &UnixSocket, name: &Name<'_>) -> Result<(), RestoreError> {
    if socket.address.is_empty() {
        return Ok(());
    }
    name.call("bind", bind(fd.as_raw_fd(), &address(socket, name)?))
}

struct Maker<'a> {
    by_id: HashMap<u32, &'a UnixSocket>,
    made: HashMap<u32, OwnedFd>,
    /// Other ends of sockets whose peer is closed.
    far_ends: HashMap<u32, OwnedFd>,
}

impl<'a> Maker<'a> {
    fn listener(&mut self, socket: &UnixSocket) -> Result<(), RestoreError> {
        let label = label(socket);
        let name = Name(&label);
        let fd = new(socket, &name)?;
        bind_if_named(fd.as_fd(), socket, &name)?;
        let backlog = socket.backlog.and_then(|backlog| i32::try_from(backlog).ok());
        let backlog = backlog.and_then(|backlog| Backlog::new(backlog).ok()).unwrap_or(Backlog::MAXALLOWABLE);
        name.call("listen", listen(&fd, backlog))?;
        self.made.insert(socket.id, fd);
        Ok(())
    }

    fn connected_or_single(&mut self, socket: &UnixSocket) -> Result<(), RestoreError> {
        if self.made.contains_key(&socket.id) {
            return Ok(());
        }
        let label = label(socket);
        let name = Name(&label);
        match self.mutual_peer(socket) {
            Some(peer) => {
                let (fd, peer_fd) = self.pair(socket, peer, &name)?;
                self.made.insert(socket.id, fd);
                self.made.insert(peer.id, peer_fd);
            }
            None if socket.peer == UnixPeer::Closed => {
                let gone = UnixSocket { address: Vec::new(), ..socket.clone() };
                let (fd, far_end) = self.pair(socket, &gone, &name)?;
                self.made.insert(socket.id, fd);
                self.far_ends.insert(socket.id, far_end);
            }
            None => {
                let fd = new(socket, &name)?;
                bind_if_named(fd.as_fd(), socket, &name)?;
                self.made.insert(socket.id, fd);
            }
        }
        Ok(())
    }

    /// The peer, if it is connected back. A socket connected to itself (datagrams) has none in this sense.
    fn mutual_peer(&self, socket: &UnixSocket) -> Option<&'a UnixSocket> {
        let UnixPeer::Socket(peer) = socket.peer else { return None };
        let peer = *self.by_id.get(&peer)?;
        let mutual = peer.id != socket.id
            && peer.peer == UnixPeer::Socket(socket.id)
            && peer.socket_type == socket.socket_type
            && !self.made.contains_key(&peer.id);
        mutual.then_some(peer)
    }

    /// Two connected sockets with the names that they have to have.
    fn pair(
        &self,
        a: &UnixSocket,
        b: &UnixSocket,
        name: &Name<'_>,
    ) -> Result<(OwnedFd, OwnedFd), RestoreError> {
        let datagrams = a.socket_type == libc::SOCK_DGRAM;
        if datagrams || (a.address.is_empty() && b.address.is_empty()) {
            let kind = socket_type(a, name)?;
            let made = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC);
            let (a_fd, b_fd) = name.call("socketpair", made)?;
            bind_if_named(a_fd.as_fd(), a, name)?;
            bind_if_named(b_fd.as_fd(), b, name)?;
            return Ok((a_fd, b_fd));
        }
        let accepted = |socket: &UnixSocket| self.listener_of(socket).is_some();
        if accepted(a) || (b.address.is_empty() && !accepted(b)) {
            let (b_fd, a_fd) = self.through_listener(b, a, name)?;
            return Ok((a_fd, b_fd));
        }
        self.through_listener(a, b, name)
    }

    /// The listener in the manifest that has the same name.
    fn listener_of(&self, socket: &UnixSocket) -> Option<&OwnedFd> {
        let named = !socket.address.is_empty();
        let same = |other: &&&UnixSocket| {
            other.backlog.is_some()
                && other.address == socket.address
                && other.socket_type == socket.socket_type
        };
        let listener = named.then(|| self.by_id.values().find(same)).flatten()?;
        self.made.get(&listener.id)
    }

    fn through_listener(
        &self,
        client: &UnixSocket,
        server: &UnixSocket,
        name: &Name<'_>,
    ) -> Result<(OwnedFd, OwnedFd), RestoreError> {
        let error = |source: std::io::Error| Errno::from_raw(source.raw_os_error().unwrap_or_default());
        let listener = match self.listener_of(server) {
            Some(listener) => name.call("dup", listener.try_clone().map_err(error))?,
            None => {
                let listener = new(server, name)?;
                bind_if_named(listener.as_fd(), server, name)?;
                name.call("listen", listen(&listener, Backlog::MAXALLOWABLE))?;
                listener
            }
        };
        let client_fd = new(client, name)?;
        bind_if_named(client_fd.as_fd(), client, name)?;
        name.call("connect", connect(client_fd.as_raw_fd(), &address(server, name)?))?;
        // The container's processes do not run, so the connection that comes first is this one.
        let (server_fd, _) = name.call("accept", UnixListener::from(listener).accept().map_err(error))?;
        Ok((client_fd, server_fd.into()))
    }

    /// A datagram socket that sends to a named one which is not connected back.
    fn send_to_name(&self, socket: &UnixSocket) -> Result<(), RestoreError> {
        let UnixPeer::Socket(peer) = socket.peer else { return Ok(()) };
        let label = label(socket);
        let name = Name(&label);
        let peer = self.by_id.get(&peer).ok_or_else(|| name.contradiction("its peer is missing"))?;
        if peer.peer == UnixPeer::Socket(socket.id) && peer.id != socket.id {
            return Ok(());
        }
        if socket.socket_type != libc::SOCK_DGRAM {
            return Err(name.contradiction("its peer is not connected to it"));
        }
        match self.made.get(&socket.id) {
            Some(fd) => name.call("connect", connect(fd.as_raw_fd(), &address(peer, &name)?)),
            None => Ok(()),
        }
    }

    /// Sends the socket what it had not read yet.
    fn fill(&self, socket: &UnixSocket) -> Result<(), RestoreError> {
        if socket.queue.is_empty() {
            return Ok(());
        }
        let label = label(socket);
        let name = Name(&label);
        let far_end = match socket.peer {
            UnixPeer::Closed => self.far_ends.get(&socket.id),
            UnixPeer::Socket(peer) => self.made.get(&peer),
            UnixPeer::None => None,
        };
        let far_end = far_end.ok_or_else(|| name.contradiction("messages, but nobody who sent them"))?;
        let bytes = socket.queue.iter().map(|message| message.len() + OVERHEAD).sum();
        let size =
            sockopt::set_int(far_end.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, room_for(bytes) / 2);
        name.call("SO_SNDBUFFORCE", size)?;
        for message in &socket.queue {
            send_whole(far_end.as_fd(), message, socket.socket_type == libc::SOCK_STREAM, &name)?;
        }
        Ok(())
    }
}

/// What a message takes beside its bytes, at most (`SKB_TRUESIZE`).
const OVERHEAD: usize = 1024;

fn send_whole(fd: BorrowedFd<'_>, message: &[u8], stream: bool, name: &Name<'_>) -> Result<(), RestoreError> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let mut rest = message;
    loop {
        let sent = name.call("send", send(fd.as_raw_fd(), rest, flags))?;
        rest = &rest[sent..];
        if !stream || rest.is_empty() {
            return Ok(());
        }
    }
}

/// Options and half-closed directions.
fn finish(
    fd: BorrowedFd<'_>,
    socket: &UnixSocket,
    defaults: &mut Defaults,
    name: &Name<'_>,
) -> Result<(), RestoreError> {
    for (bit, how) in [(RCV_SHUTDOWN, Shutdown::Read), (SEND_SHUTDOWN, Shutdown::Write)] {
        if socket.shutdown & bit != 0 {
            // The kernel refuses for a socket that is not connected, which it then need not be told.
            match shutdown(fd.as_raw_fd(), how) {
                Ok(()) | Err(Errno::ENOTCONN) => (),
                Err(errno) => return name.call("shutdown", Err(errno)),
            }
        }
    }
    defaults.learn(Family::Unix, fd, name)?;
    let options = defaults.differing(Family::Unix, true, &socket.options, name)?;
    Buffers::of(&socket.options).settle(fd, name)?;
    for when in [When::Birth, When::Connected, When::Live] {
        set_options(fd, &options, when, name)?;
    }
    Ok(())
}
