//! Open file descriptions and the references between them.

use super::{Fault, Item, Place, Result};
use crate::manifest::{
    Description, DescriptionId, DescriptionKind, EpollTarget, Manifest, TcpConnection, TcpSocket, TcpState,
    UnixPeer, UnixSocket,
};
use crate::units::NsPid;
use std::collections::{HashMap, HashSet};

/// `sizeof(sun_path)`.
const MAX_UNIX_ADDRESS: usize = 108;
/// `TCP_MAX_WSCALE` (RFC 7323).
const MAX_WINDOW_SCALE: u8 = 14;

/// What descriptions refer to, and what must exist once.
struct References {
    /// Descriptors of each process, with what they name.
    fds: HashMap<(NsPid, i32), DescriptionId>,
    /// Processes that hold a description.
    holders: HashSet<(NsPid, DescriptionId)>,
    /// Unix sockets by number.
    unix: HashSet<u32>,
}

pub(super) fn check_all(manifest: &Manifest) -> Result {
    let references = References::collect(manifest)?;
    let mut inodes_with_contents = HashSet::new();
    let mut pipes_with_contents = HashSet::new();
    for (id, description) in numbered(manifest) {
        let at = Place::Description(id);
        check(at, id, description, &references)?;
        match &description.kind {
            DescriptionKind::Unlinked { inode, contents, .. } if !contents.is_empty() => {
                at.ensure_unique(&mut inodes_with_contents, *inode, Item::Contents)?;
            }
            DescriptionKind::Pipe { pipe, contents, .. } if !contents.is_empty() => {
                at.ensure_unique(&mut pipes_with_contents, *pipe, Item::Contents)?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn numbered(manifest: &Manifest) -> impl Iterator<Item = (DescriptionId, &Description)> {
    (0..).map(DescriptionId).zip(&manifest.descriptions)
}

impl References {
    fn collect(manifest: &Manifest) -> Result<Self> {
        let mut unix = HashSet::new();
        for (id, description) in numbered(manifest) {
            if let DescriptionKind::Unix(socket) = &description.kind {
                Place::Description(id).ensure_unique(&mut unix, socket.id, Item::SocketPeer)?;
            }
        }
        let entries = manifest.processes.iter().flat_map(|process| {
            let fds = process.state.iter().flat_map(|state| &state.fds);
            fds.map(|entry| (process.pid, entry))
        });
        let fds: HashMap<_, _> = entries.map(|(pid, e)| ((pid, e.fd), e.description)).collect();
        let holders = fds.iter().map(|(&(pid, _), &description)| (pid, description)).collect();
        Ok(Self { fds, holders, unix })
    }
}

fn check(at: Place, id: DescriptionId, description: &Description, references: &References) -> Result {
    match &description.kind {
        DescriptionKind::Stdio { stream } => at.ensure(*stream <= 2, Fault::Range(Item::Stream)),
        DescriptionKind::Regular { path, offset, size } => {
            at.ensure_path(path, Item::FilePath)?;
            check_offsets(at, &[*offset, *size])
        }
        DescriptionKind::Unlinked { directory, offset, .. } => {
            at.ensure_path(directory, Item::FilePath)?;
            check_offsets(at, &[*offset])
        }
        DescriptionKind::Directory { path, offset } => {
            at.ensure_path(path, Item::FilePath)?;
            check_offsets(at, &[*offset])
        }
        DescriptionKind::Device { path, .. } => at.ensure_path(path, Item::FilePath),
        DescriptionKind::Pipe { capacity, contents, .. } => {
            at.ensure(contents.len() <= *capacity as usize, Fault::Range(Item::Capacity))
        }
        DescriptionKind::Epoll { targets } => check_epoll(at, id, targets, references),
        DescriptionKind::Eventfd { .. }
        | DescriptionKind::Timerfd { .. }
        | DescriptionKind::Signalfd { .. } => Ok(()),
        DescriptionKind::Unix(socket) => check_unix(at, socket, references),
        DescriptionKind::Tcp(socket) => check_tcp(at, socket),
    }
}

/// `loff_t` is signed.
fn check_offsets(at: Place, offsets: &[u64]) -> Result {
    at.ensure(offsets.iter().all(|o| i64::try_from(*o).is_ok()), Fault::Range(Item::FileOffset))
}

fn check_epoll(at: Place, id: DescriptionId, targets: &[EpollTarget], references: &References) -> Result {
    let mut seen = HashSet::new();
    for target in targets {
        let watched = references.fds.get(&(target.process, target.fd));
        let reachable = watched.is_some_and(|watched| *watched != id);
        let known = reachable && references.holders.contains(&(target.process, id));
        at.ensure(known, Fault::Dangling(Item::EpollTarget))?;
        at.ensure_unique(&mut seen, (target.process, target.fd), Item::EpollTarget)?;
    }
    Ok(())
}

fn check_unix(at: Place, socket: &UnixSocket, references: &References) -> Result {
    at.ensure(socket.address.len() <= MAX_UNIX_ADDRESS, Fault::Size(Item::SocketAddress))?;
    let types = [libc_types::SOCK_STREAM, libc_types::SOCK_DGRAM, libc_types::SOCK_SEQPACKET];
    at.ensure(types.contains(&socket.socket_type), Fault::Range(Item::SocketType))?;
    at.ensure(socket.shutdown <= 3, Fault::Range(Item::Shutdown))?;
    let peer = match socket.peer {
        UnixPeer::None | UnixPeer::Closed => true,
        UnixPeer::Socket(peer) => references.unix.contains(&peer),
    };
    at.ensure(peer, Fault::Dangling(Item::SocketPeer))?;
    Ok(())
}

/// Socket types of x86-64 (`linux/net.h`); this crate does without libc.
mod libc_types {
    pub const SOCK_STREAM: i32 = 1;
    pub const SOCK_DGRAM: i32 = 2;
    pub const SOCK_SEQPACKET: i32 = 5;
}

fn check_tcp(at: Place, socket: &TcpSocket) -> Result {
    let family = socket.local.is_none_or(|local| local.is_ipv6() == socket.ipv6);
    at.ensure(family, Fault::Family)?;
    match &socket.state {
        TcpState::Closed | TcpState::Dead => Ok(()),
        TcpState::Listen { .. } => at.ensure(socket.local.is_some(), Fault::Family),
        TcpState::Connected(connection) => {
            let family = socket.local.is_some() && connection.remote.is_ipv6() == socket.ipv6;
            at.ensure(family, Fault::Family)?;
            check_connection(at, connection)
        }
    }
}

fn check_connection(at: Place, connection: &TcpConnection) -> Result {
    at.ensure(connection.unsent as usize <= connection.send_queue.len(), Fault::Range(Item::Unsent))?;
    at.ensure((1..=65535).contains(&connection.mss), Fault::Range(Item::SegmentSize))?;
    let scale = connection.window_scale.is_none_or(|(a, b)| a.max(b) <= MAX_WINDOW_SCALE);
    at.ensure(scale, Fault::Range(Item::WindowScale))
}
