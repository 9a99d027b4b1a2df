//! Connections under load.

use super::*;
use nix::sys::socket::{MsgFlags, recv, send};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread::JoinHandle;

/// The byte at a position of every stream in these tests.
fn pattern(position: u64) -> u8 {
    (position.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// One side of a connection: sends the pattern, and checks that the pattern comes.
#[derive(Debug, Default)]
struct End {
    sent: u64,
    received: Arc<AtomicU64>,
    failed: Option<String>,
}

impl End {
    /// Sends and receives what goes without waiting; says whether anything did.
    fn step(&mut self, socket: BorrowedFd<'_>, send_most: usize, receive_most: usize) -> bool {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let out: Vec<u8> = (self.sent..self.sent + send_most as u64).map(pattern).collect();
        let mut moved = false;
        match send(socket.as_raw_fd(), &out, flags) {
            Ok(sent) => {
                self.sent += sent as u64;
                moved |= sent > 0;
            }
            Err(Errno::EAGAIN) => (),
            Err(errno) => self.failed = Some(format!("send: {errno}")),
        }
        let mut buffer = vec![0; receive_most];
        match recv(socket.as_raw_fd(), &mut buffer, flags) {
            Ok(0) if receive_most > 0 => self.failed = Some("end of file".into()),
            Ok(len) => {
                let at = self.received.load(Ordering::Relaxed);
                let wrong = buffer[..len].iter().zip(at..).find(|(byte, at)| **byte != pattern(*at));
                if let Some((_, at)) = wrong {
                    self.failed = Some(format!("wrong byte at {at}"));
                }
                self.received.fetch_add(len as u64, Ordering::Relaxed);
                moved |= len > 0;
            }
            Err(Errno::EAGAIN) => (),
            Err(errno) => self.failed = Some(format!("recv: {errno}")),
        }
        moved && self.failed.is_none()
    }
}

/// A client that sends and receives until it is stopped.
struct Client {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    thread: JoinHandle<(TcpStream, End)>,
}

impl Client {
    fn start(stream: TcpStream, send_most: usize, receive_most: usize, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut end = End::default();
        let (received, stopped) = (end.received.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) && end.failed.is_none() {
                if !end.step(stream.as_fd(), send_most, receive_most) || !pause.is_zero() {
                    std::thread::sleep(pause.max(Duration::from_micros(100)));
                }
            }
            (stream, end)
        });
        Self { stop, received, thread }
    }

    fn stop(self) -> (TcpStream, End) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Lets the container's end run for a while.
fn run(end: &mut End, socket: &OwnedFd, time: Duration) {
    let until = Instant::now() + time;
    while Instant::now() < until {
        if !end.step(socket.as_fd(), 64 << 10, 64 << 10) {
            std::thread::sleep(Duration::from_micros(100));
        }
        assert_eq!(end.failed, None);
    }
}

/// Moves a connection with full traffic in both directions again and again; then lets both sides drain and compares.
fn heavy_traffic(address: &str, moves: usize, client_pause: Duration) {
    let mut lab = Lab::new();
    let (client, server) = lab.connection(address);
    let mut server: OwnedFd = server.into();
    let client = Client::start(client, 64 << 10, 64 << 10, client_pause);
    let mut end = End::default();
    let mut waits = Vec::new();
    for _ in 0..moves {
        run(&mut end, &server, Duration::from_millis(30));
        server = lab.migrate(vec![server]).pop().unwrap();
        let (before, live) = (client.received.load(Ordering::Relaxed), Instant::now());
        while client.received.load(Ordering::Relaxed) == before {
            assert!(live.elapsed() < Duration::from_secs(5), "nothing arrives");
            run(&mut end, &server, Duration::from_millis(1));
        }
        waits.push(live.elapsed());
    }
    run(&mut end, &server, Duration::from_millis(50));
    let (client, mut client_end) = client.stop();
    assert_eq!(client_end.failed, None);
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        end.step(server.as_fd(), 0, 1 << 20);
        client_end.step(client.as_fd(), 0, 1 << 20);
        assert_eq!((&end.failed, &client_end.failed), (&None, &None));
        let got = (end.received.load(Ordering::Relaxed), client_end.received.load(Ordering::Relaxed));
        if got == (client_end.sent, end.sent) {
            break;
        }
        assert!(Instant::now() < deadline, "{got:?} of {:?}", (client_end.sent, end.sent));
    }
    assert_eq!(lab.resets(), 0);
    waits.sort_unstable();
    println!("{address}: {moves} moves, {} + {} bytes, waits {waits:?}", end.sent, client_end.sent);
    // On a busy machine the client may get no CPU for longer than any timeout, now and then.
    let most = waits[moves * 9 / 10 - 1];
    assert!(most < Duration::from_millis(150), "{most:?}");
}

#[test]
fn heavy_traffic_over_ipv4_survives_many_moves() {
    heavy_traffic(CONTAINER_V4, 25, Duration::ZERO);
}

#[test]
fn heavy_traffic_over_ipv6_survives_many_moves() {
    heavy_traffic(CONTAINER_V6, 10, Duration::ZERO);
}

#[test]
fn a_slow_client_gets_every_byte() {
    heavy_traffic(CONTAINER_V4, 10, Duration::from_millis(2));
}
