//! TCP sockets in each state.

use super::*;
use pclive_sys::tcp::TcpInfo;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

/// Waits until the peer has answered a connection that went live.
fn answered(socket: impl AsFd, patience: Duration) -> TcpInfo {
    let start = Instant::now();
    loop {
        let info = TcpInfo::of(socket.as_fd()).unwrap();
        if info.rtt_us > 0 {
            return info;
        }
        assert!(start.elapsed() < patience, "{info:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn an_idle_connection_learns_its_round_trip_time_at_once() {
    let mut lab = Lab::new();
    let (mut client, server) = lab.connection(CONTAINER_V4);
    let before = TcpInfo::of(server.as_fd()).unwrap();
    // Whoever made the namespace may have left its loopback link down.
    ip(&["-n", &lab.name("1"), "link", "set", "lo", "down"]);
    let server = lab.migrate(vec![server.into()]).pop().unwrap();
    let after = answered(&server, Duration::from_millis(300));
    assert!(after.rto_us < 400_000, "{after:?}");
    let negotiated = |info: TcpInfo| (info.window_scale, info.sack, info.timestamps, info.pmtu, info.advmss);
    assert_eq!(negotiated(after), negotiated(before));
    assert_eq!(after.total_retrans, 0);
    let mut server = TcpStream::from(server);
    client.write_all(b"ping").unwrap();
    let mut buffer = [0; 4];
    server.read_exact(&mut buffer).unwrap();
    server.write_all(b"pong").unwrap();
    client.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"pong");
}

#[test]
fn a_link_that_loses_the_first_packets_costs_no_timeout() {
    for address in [CONTAINER_V4, CONTAINER_V6] {
        let mut lab = Lab::new();
        let (client, mut server) = lab.connection(address);
        // Nothing gets through from here on, so the answer must be sent again.
        for port in ["port0", "port1"] {
            ip(&["-n", &lab.name("c"), "link", "set", port, "nomaster"]);
        }
        server.write_all(b"an answer").unwrap();
        let server = lab.migrate(vec![server.into()]).pop().unwrap();
        // The kernel tries again after 1 s, and then after 3 s more.
        std::thread::sleep(Duration::from_millis(1200));
        ip(&["-n", &lab.name("c"), "link", "set", "port1", "master", "br0"]);
        answered(&server, Duration::from_millis(1500));
        drop(server);
        assert_eq!(read_all(&client), b"an answer");
        assert_eq!(lab.resets(), 0);
    }
}

/// Reads until the end of file.
fn read_all(stream: &TcpStream) -> Vec<u8> {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut bytes = Vec::new();
    { stream }.read_to_end(&mut bytes).unwrap();
    bytes
}

fn option(socket: impl AsFd, level: i32, name: i32) -> i32 {
    sockopt::get_int(socket.as_fd(), level, name).unwrap()
}

#[test]
fn a_listener_and_its_connections_move_with_their_options() {
    let mut lab = Lab::new();
    let listener = lab.in_host(|| {
        let listener = TcpListener::bind("[::]:7000").unwrap();
        sockopt::set_int(listener.as_fd(), libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 7).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(37).unwrap()).unwrap();
        listener
    });
    let defer = option(&listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT);
    // A client over IPv4: on the listener's side both addresses are v4-mapped.
    let mut client = lab.in_client(|| TcpStream::connect((CONTAINER_V4, 7000)).unwrap());
    client.write_all(b"hello").unwrap();
    let (server, from) = listener.accept().unwrap();
    assert!(from.is_ipv6());
    server.set_nodelay(true).unwrap();
    sockopt::set_int(server.as_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1).unwrap();
    sockopt::set_int(server.as_fd(), libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77).unwrap();
    sockopt::set_int(server.as_fd(), libc::IPPROTO_IP, libc::IP_TOS, 0x10).unwrap();
    sockopt::set(server.as_fd(), libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"cubic").unwrap();

    let moved = lab.migrate(vec![listener.into(), server.into()]);
    let [listener, server]: [OwnedFd; 2] = moved.try_into().unwrap();
    assert_eq!(TcpInfo::of(listener.as_fd()).unwrap().sacked, 37);
    assert_eq!(option(&listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT), defer);
    assert_eq!(option(&listener, libc::SOL_SOCKET, libc::SO_REUSEADDR), 1);
    assert_eq!(option(&server, libc::SOL_SOCKET, libc::SO_REUSEADDR), 1);
    assert_eq!(option(&server, libc::IPPROTO_TCP, libc::TCP_NODELAY), 1);
    assert_eq!(option(&server, libc::SOL_SOCKET, libc::SO_KEEPALIVE), 1);
    assert_eq!(option(&server, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE), 77);
    assert_eq!(option(&server, libc::IPPROTO_IP, libc::IP_TOS), 0x10);
    assert_eq!(option(&server, libc::IPPROTO_IP, libc::IP_TRANSPARENT), 0);
    assert_eq!(option(&server, libc::SOL_SOCKET, options::SO_BUF_LOCK), 0, "the kernel tunes the buffers");
    let mut congestion = [0; 16];
    let len = sockopt::get(server.as_fd(), libc::IPPROTO_TCP, libc::TCP_CONGESTION, &mut congestion).unwrap();
    assert_eq!(congestion[..len].split(|b| *b == 0).next(), Some(&b"cubic"[..]));

    let mut server = TcpStream::from(server);
    let mut buffer = [0; 5];
    server.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"hello");
    client.write_all(b"again").unwrap();
    server.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"again");
    let listener = TcpListener::from(listener);
    lab.in_client(|| TcpStream::connect((CONTAINER_V6, 7000)).unwrap());
    listener.accept().unwrap();
    // A program that restarts can bind the port again while the connections last.
    drop(listener);
    lab.in_host(|| TcpListener::bind("[::]:7000").unwrap());
    assert_eq!(lab.resets(), 0);
}

#[test]
fn listeners_that_share_a_port_still_share_it() {
    use nix::sys::socket::{Backlog, SockaddrIn, bind, listen, setsockopt, sockopt as nix_options};
    let mut lab = Lab::new();
    let make = || {
        let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).unwrap();
        setsockopt(&fd, nix_options::ReusePort, &true).unwrap();
        nix::unistd::fchown(&fd, Some(1234.into()), None).unwrap();
        bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrIn::new(0, 0, 0, 0, 7001)).unwrap();
        listen(&fd, Backlog::new(5).unwrap()).unwrap();
        fd
    };
    let pair = lab.in_host(|| vec![make(), make()]);
    let moved = lab.migrate(pair);
    assert!(moved.iter().all(|fd| option(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT) == 1));
    // Another one of the same user joins; one of somebody else may not.
    lab.in_host(make);
    lab.in_client(|| TcpStream::connect((CONTAINER_V4, 7001)).unwrap());
}

#[test]
fn a_peers_fin_comes_again_after_the_data() {
    for address in [CONTAINER_V4, CONTAINER_V6] {
        let mut lab = Lab::new();
        let (mut client, server) = lab.connection(address);
        client.write_all(b"the last words").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let server = TcpStream::from(lab.migrate(vec![server.into()]).pop().unwrap());
        assert_eq!(read_all(&server), b"the last words");
        (&server).write_all(b"an answer").unwrap();
        drop(server);
        assert_eq!(read_all(&client), b"an answer");
        assert_eq!(lab.resets(), 0);
    }
}

#[test]
fn a_fin_that_was_sent_is_sent_again() {
    // With the client's acknowledgement (FIN_WAIT2), and without (FIN_WAIT1): its window is full.
    for bytes in [10, 8 << 20] {
        let mut lab = Lab::new();
        let (mut client, mut server) = lab.connection(CONTAINER_V4);
        server.set_nonblocking(true).unwrap();
        let message: Vec<u8> = (0..bytes).map(|at: u32| (at / 7) as u8).collect();
        let mut written = 0;
        while written < message.len() {
            match server.write(&message[written..]) {
                Ok(len) => written += len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        server.shutdown(Shutdown::Write).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let server = TcpStream::from(lab.migrate(vec![server.into()]).pop().unwrap());
        assert!(read_all(&client) == message[..written]);
        client.write_all(b"thanks").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        server.set_nonblocking(false).unwrap();
        assert_eq!(read_all(&server), b"thanks");
        assert_eq!(lab.resets(), 0);
    }
}

#[test]
fn a_connection_that_has_ended_still_gives_end_of_file() {
    let mut lab = Lab::new();
    let (client, mut server) = lab.connection(CONTAINER_V4);
    server.shutdown(Shutdown::Write).unwrap();
    drop(client);
    assert_eq!(server.read(&mut [0; 8]).unwrap(), 0);
    std::thread::sleep(Duration::from_millis(50));
    let mut server = TcpStream::from(lab.migrate(vec![server.into()]).pop().unwrap());
    assert_eq!(server.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(server.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn a_pair_inside_the_container_moves_in_full_flow() {
    let mut lab = Lab::new();
    for _ in 0..5 {
        let (mut writer, reader) = lab.in_host(|| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            (TcpStream::connect(listener.local_addr().unwrap()).unwrap(), listener.accept().unwrap().0)
        });
        writer.set_nonblocking(true).unwrap();
        let message: Vec<u8> = (0..6 << 20).map(|at: u32| (at / 11) as u8).collect();
        // Until both queues are full, and then some reading, so that bytes are on their way at the moment.
        let mut written = 0;
        let mut read = vec![0; 1 << 20];
        while let Ok(len) = writer.write(&message[written..]) {
            written += len;
        }
        (&reader).read_exact(&mut read).unwrap();
        let moved = lab.migrate(vec![reader.into(), writer.into()]);
        let [reader, writer]: [OwnedFd; 2] = moved.try_into().unwrap();
        drop(writer);
        read.extend(read_all(&TcpStream::from(reader)));
        assert!(read == message[..written], "{} of {written}", read.len());
    }
}

#[test]
fn a_silenced_connection_is_closed_without_a_packet() {
    let lab = Lab::new();
    let (mut client, mut server) = lab.connection(CONTAINER_V4);
    client.write_all(b"unread, which makes close send a RST").unwrap();
    server.write_all(b"sent").unwrap();
    let sockets = vec![OwnedFd::from(server)];
    let mut capture = SocketCapture::begin(lab.tables(0), None).unwrap();
    capture_all(&mut capture, &sockets);
    capture.silence().unwrap();
    drop((sockets, capture));
    std::thread::sleep(Duration::from_millis(50));
    client.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert_eq!(client.read(&mut [0; 4]).unwrap(), 4);
    assert_eq!(client.read(&mut [0; 4]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(lab.resets(), 0);
}

#[test]
fn a_capture_that_comes_to_nothing_leaves_the_connection_as_it_was() {
    let lab = Lab::new();
    let (mut client, mut server) = lab.connection(CONTAINER_V4);
    client.write_all(b"question").unwrap();
    for _ in 0..100 {
        let mut capture = SocketCapture::begin(lab.tables(0), None).unwrap();
        let mut captured = capture_all(&mut capture, &[server.try_clone().unwrap().into()]);
        assert!(capture.finish(&mut captured, Access::Frozen).is_empty());
    }
    assert_eq!(option(&server, libc::SOL_SOCKET, libc::SO_REUSEADDR), 1);
    let mut buffer = [0; 8];
    server.read_exact(&mut buffer).unwrap();
    server.write_all(b"answer").unwrap();
    client.read_exact(&mut buffer[..6]).unwrap();
    assert_eq!(&buffer[..6], b"answer");
    assert_eq!(lab.resets(), 0);
}

#[test]
fn what_passes_and_what_cannot_be_moved_are_told_apart() {
    let lab = Lab::new();
    let listener = lab.in_host(|| TcpListener::bind((CONTAINER_V4, 7002)).unwrap());
    let _waiting = lab.in_client(|| TcpStream::connect((CONTAINER_V4, 7002)).unwrap());
    let udp = lab.in_host(|| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
    let foreign = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut capture = SocketCapture::begin(lab.tables(0), None).unwrap();
    let mut error =
        |socket: BorrowedFd<'_>, access| capture.capture(socket, inode(socket), access).unwrap_err();
    assert!(matches!(error(listener.as_fd(), Access::Frozen), SocketError::Transient { .. }));
    let SocketError::Unsupported { reason, .. } = error(udp.as_fd(), Access::Survey) else { panic!() };
    assert!(reason.contains("UDP"));
    let SocketError::Unsupported { reason, .. } = error(foreign.as_fd(), Access::Survey) else { panic!() };
    assert!(reason.contains("another network namespace"));
}

#[test]
fn a_closed_connection_with_something_left_to_deliver_is_waited_for() {
    let lab = Lab::new();
    // On a busy machine the kernel has been seen to have given the closed connection up by the time that the sockets are
    // listed: then there is nothing to tell, and another one is tried.
    let told = (0..5).any(|_| {
        let (_client, mut server) = lab.connection(CONTAINER_V4);
        lab.down(0);
        server.write_all(b"cannot arrive").unwrap();
        drop(server);
        let mut capture = SocketCapture::begin(lab.tables(0), None).unwrap();
        let wrong = capture.finish(&mut [], Access::Frozen);
        lab.up(0);
        matches!(wrong.as_slice(), [(0, SocketError::Transient { .. })])
    });
    assert!(told);
}

#[test]
fn options_that_nobody_asked_for_are_refused() {
    let lab = Lab::new();
    let value = OptionValue::new(&[0; 16]).unwrap();
    let attach_filter = SocketOption { level: libc::SOL_SOCKET, name: libc::SO_ATTACH_FILTER, value };
    let too_long = SocketOption { level: libc::IPPROTO_TCP, name: libc::TCP_NODELAY, value };
    for option in [attach_filter, too_long] {
        let options = vec![option];
        let socket = TcpSocket { ipv6: false, local: None, state: TcpState::Closed, owner: 0, options };
        let kind = DescriptionKind::Tcp(Box::new(socket));
        let descriptions = [Description { flags: 2, owner: (0, 0, 0), kind }];
        let error = RestoredSockets::restore(&descriptions, lab.hosts[0].as_fd()).unwrap_err();
        assert!(matches!(error, RestoreError::Option { .. }), "{error}");
    }
}

/// The options of sockets, by level and name.
fn options_of(tables: &Arc<SocketTables>, sockets: &[OwnedFd]) -> Vec<Vec<SocketOption>> {
    let mut capture = SocketCapture::begin(tables.clone(), None).unwrap();
    let options = capture_all(&mut capture, sockets).into_iter().map(|description| {
        let DescriptionKind::Tcp(mut socket) = description.kind else { panic!("{description:?}") };
        socket.options.sort_by_key(|option| (option.level, option.name));
        socket.options
    });
    options.collect()
}

#[test]
fn options_read_ahead_are_those_that_are_read_later() {
    let lab = Lab::new();
    let listener = lab.in_host(|| TcpListener::bind((CONTAINER_V6, 0)).unwrap());
    let (_client, server) = lab.connection(CONTAINER_V4);
    server.set_nodelay(true).unwrap();
    server.set_ttl(17).unwrap();
    let sockets = [OwnedFd::from(listener), server.into()];
    let later = options_of(&lab.tables(0), &sockets);
    assert!(later.iter().all(|options| options.len() > 40));

    let ahead = |unchanged| {
        let tables = lab.tables(0);
        tables.watch_options(Box::new(Says { unchanged }));
        sockets.iter().for_each(|socket| tables.read_ahead(socket.as_fd(), inode(socket)));
        tables
    };
    let (trusted, doubted) = (ahead(true), ahead(false));
    assert_eq!(options_of(&trusted, &sockets), later);
    // What is known is not looked at again, and what has changed is.
    sockopt::set_int(sockets[1].as_fd(), libc::IPPROTO_IP, libc::IP_TTL, 18).unwrap();
    let now = options_of(&lab.tables(0), &sockets);
    assert_ne!(now, later);
    assert_eq!(options_of(&trusted, &sockets), later);
    assert_eq!(options_of(&doubted, &sockets), now);
}

/// Prints what a socket costs, for 16 and for 1000 connections, with and without options that are known.
#[test]
fn the_cost_of_a_socket_is_small() {
    for (count, known) in [(16, false), (16, true), (1000, false), (1000, true)] {
        let mut lab = Lab::new();
        let listener = lab.in_host(|| TcpListener::bind((CONTAINER_V4, 7003)).unwrap());
        let connect = |_| {
            let client = TcpStream::connect((CONTAINER_V4, 7003)).unwrap();
            (client, listener.accept().unwrap().0.into())
        };
        let (clients, servers): (Vec<TcpStream>, Vec<OwnedFd>) =
            lab.in_client(|| (0..count).map(connect).unzip());
        let tables = lab.tables(0);
        tables.watch_options(Box::new(Says { unchanged: known }));
        servers.iter().for_each(|socket| tables.read_ahead(socket.as_fd(), inode(socket)));
        let (moved, timing) = lab.migrate_timed(servers, tables);
        println!("{count} connections, known: {known}: {timing:?}");
        for (mut client, server) in clients.into_iter().zip(moved) {
            let mut server = TcpStream::from(server);
            client.write_all(b"?").unwrap();
            server.read_exact(&mut [0]).unwrap();
        }
    }
}
