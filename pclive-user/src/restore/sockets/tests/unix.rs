//! Unix-domain sockets.

use super::*;
use nix::sys::socket::{MsgFlags, recv, send, socketpair};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixSocketAddr, UnixDatagram, UnixListener, UnixStream};

fn pair(lab: &Lab, kind: SockType) -> (OwnedFd, OwnedFd) {
    lab.in_host(|| socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap())
}

/// Closes one end of a pair, for all who have it: another test's child has a copy until it executes its program.
fn close(end: OwnedFd, other: &OwnedFd) {
    drop(end);
    while sockopt::poll_now(other.as_fd()).unwrap() & libc::POLLHUP == 0 {
        std::thread::yield_now();
    }
}

fn put(socket: &OwnedFd, message: &[u8]) {
    assert_eq!(send(socket.as_raw_fd(), message, MsgFlags::MSG_DONTWAIT).unwrap(), message.len());
}

fn get(socket: &OwnedFd) -> nix::Result<Vec<u8>> {
    let mut buffer = vec![0; 1 << 18];
    let len = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
    buffer.truncate(len);
    Ok(buffer)
}

fn moved<const N: usize>(lab: &mut Lab, sockets: [OwnedFd; N]) -> [OwnedFd; N] {
    lab.migrate(sockets.into()).try_into().unwrap()
}

#[test]
fn messages_in_both_directions_of_a_pair_keep_their_bounds_and_order() {
    let mut lab = Lab::new();
    for kind in [SockType::Datagram, SockType::SeqPacket] {
        let (a, b) = pair(&lab, kind);
        let long = vec![b'x'; 100_000];
        for message in [&b"one"[..], b"two", &long] {
            put(&a, message);
        }
        put(&b, b"back");
        let [a, b] = moved(&mut lab, [a, b]);
        assert_eq!(get(&a).unwrap(), b"back");
        assert_eq!(
            [get(&b).unwrap(), get(&b).unwrap(), get(&b).unwrap()],
            [b"one".to_vec(), b"two".to_vec(), long]
        );
        assert_eq!(get(&b).unwrap_err(), Errno::EAGAIN);
        put(&a, b"after");
        assert_eq!(get(&b).unwrap(), b"after");
    }
}

#[test]
fn a_full_stream_moves_again_and_again() {
    let mut lab = Lab::new();
    let (a, b) = pair(&lab, SockType::Stream);
    let mut written = Vec::new();
    while let Ok(len) = send(a.as_raw_fd(), &vec![written.len() as u8; 5000], MsgFlags::MSG_DONTWAIT) {
        written.extend(vec![written.len() as u8; len]);
    }
    let (mut a, mut b) = (a, b);
    for _ in 0..3 {
        [b, a] = moved(&mut lab, [b, a]);
    }
    drop(a);
    let mut read = Vec::new();
    UnixStream::from(b).read_to_end(&mut read).unwrap();
    assert!(read == written, "{} of {}", read.len(), written.len());
}

#[test]
fn closed_peers_and_half_closed_directions_stay_so() {
    let mut lab = Lab::new();
    let (a, gone) = pair(&lab, SockType::Stream);
    put(&gone, b"farewell");
    close(gone, &a);
    let (half, other) = pair(&lab, SockType::Stream);
    UnixStream::from(half.try_clone().unwrap()).shutdown(std::net::Shutdown::Write).unwrap();
    let [a, half, other] = moved(&mut lab, [a, half, other]);
    assert_eq!(get(&a).unwrap(), b"farewell");
    assert_eq!(get(&a).unwrap(), b"");
    assert_eq!(send(a.as_raw_fd(), b"x", MsgFlags::MSG_NOSIGNAL).unwrap_err(), Errno::EPIPE);
    assert_eq!(get(&other).unwrap(), b"");
    put(&other, b"still");
    assert_eq!(get(&half).unwrap(), b"still");
    assert_eq!(send(half.as_raw_fd(), b"x", MsgFlags::MSG_NOSIGNAL).unwrap_err(), Errno::EPIPE);
}

#[test]
fn abstract_names_listeners_and_what_they_accepted_move() {
    let mut lab = Lab::new();
    let name = UnixSocketAddr::from_abstract_name("pclive test").unwrap();
    let (listener, mut client, server) = lab.in_host(|| {
        let listener = UnixListener::bind_addr(&name).unwrap();
        let client = UnixStream::connect_addr(&name).unwrap();
        let server = listener.accept().unwrap().0;
        (listener, client, server)
    });
    client.write_all(b"hello").unwrap();
    let [client, listener, server] = moved(&mut lab, [client.into(), listener.into(), server.into()]);
    let listener = UnixListener::from(listener);
    lab.in_host(|| UnixStream::connect_addr(&name).unwrap());
    listener.accept().unwrap();
    drop(listener);
    // Now the server's name has no listener any more.
    let [server, client] = moved(&mut lab, [server, client]);
    assert_eq!(get(&server).unwrap(), b"hello");
    let (server, client) = (UnixStream::from(server), UnixStream::from(client));
    assert_eq!(server.local_addr().unwrap().as_abstract_name(), Some(&b"pclive test"[..]));
    assert_eq!(client.peer_addr().unwrap().as_abstract_name(), Some(&b"pclive test"[..]));
    assert!(client.local_addr().unwrap().is_unnamed());
}

#[test]
fn a_datagram_socket_finds_its_named_receiver() {
    let mut lab = Lab::new();
    let name = UnixSocketAddr::from_abstract_name("pclive receiver").unwrap();
    let (receiver, sender) = lab.in_host(|| {
        let receiver = UnixDatagram::bind_addr(&name).unwrap();
        let sender = UnixDatagram::unbound().unwrap();
        sender.connect_addr(&name).unwrap();
        (receiver, sender)
    });
    sockopt::set_int(receiver.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, 1).unwrap();
    let [sender, receiver] = moved(&mut lab, [sender.into(), receiver.into()]);
    put(&sender, b"found");
    assert_eq!(get(&receiver).unwrap(), b"found");
    assert_eq!(sockopt::get_int(receiver.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED).unwrap(), 1);
}

#[test]
fn descriptors_in_flight_and_strangers_are_noticed() {
    use nix::sys::socket::{ControlMessage, sendmsg};
    let lab = Lab::new();
    let (a, b) = pair(&lab, SockType::Stream);
    let message = [std::io::IoSlice::new(b"fd")];
    let descriptors = [a.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(a.as_raw_fd(), &message, &control, MsgFlags::empty(), None).unwrap();
    let mut capture = SocketCapture::begin(lab.tables(0), None).unwrap();
    let error = capture.capture(b.as_fd(), inode(&b), Access::Frozen).unwrap_err();
    assert!(matches!(error, SocketError::Transient { .. }), "{error}");
    // Only one end is the container's.
    let kind = capture.capture(a.as_fd(), inode(&a), Access::Survey).unwrap();
    let mut descriptions = [Description { flags: 2, owner: (0, 0, 0), kind }];
    let wrong = capture.finish(&mut descriptions, Access::Survey);
    assert!(
        matches!(wrong.as_slice(), [(at, SocketError::Unsupported { .. })] if *at == inode(&a)),
        "{wrong:?}"
    );
}
