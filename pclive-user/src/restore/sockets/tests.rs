//! Moves real sockets between two network namespaces, with a client in a third.

use super::*;
use crate::capture::Access;
use crate::capture::sockets::SocketCapture;
use nix::sys::socket::{MsgFlags, recv, send};
use pclive_sys::tcp::TcpInfo;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const CONTAINER_V4: &str = "10.99.0.2";
const CONTAINER_V6: &str = "fd99::2";

/// Network namespaces of a client and two hosts. The hosts' links have the container's addresses; one is up.
struct Lab {
    prefix: String,
    client: OwnedFd,
    hosts: [OwnedFd; 2],
    /// The host that has the container.
    current: usize,
}

impl Lab {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let prefix = format!("pcl-sock-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let namespace = |name: &str| -> OwnedFd {
            let name = format!("{prefix}-{name}");
            ip(&["netns", "add", &name]);
            ip(&["-n", &name, "link", "set", "lo", "up"]);
            std::fs::File::open(format!("/run/netns/{name}")).unwrap().into()
        };
        let (client, hosts) = (namespace("c"), [namespace("0"), namespace("1")]);
        let lab = Self { prefix, client, hosts, current: 0 };
        let c = lab.name("c");
        ip(&["-n", &c, "link", "add", "br0", "type", "bridge"]);
        for address in ["10.99.0.1/24", "fd99::1/64"] {
            ip(&["-n", &c, "addr", "add", address, "dev", "br0", "nodad"]);
        }
        ip(&["-n", &c, "link", "set", "br0", "up"]);
        for host in 0..2 {
            let (port, other) = (format!("port{host}"), lab.name(&host.to_string()));
            ip(&["-n", &c, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &other]);
            ip(&["-n", &c, "link", "set", &port, "master", "br0", "up"]);
            ip(&["-n", &other, "link", "set", "eth0", "address", "02:00:00:00:99:02"]);
            ip(&["-n", &other, "addr", "add", &format!("{CONTAINER_V4}/24"), "dev", "eth0"]);
        }
        lab.up(0);
        lab
    }

    fn name(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    fn down(&self, host: usize) {
        ip(&["-n", &self.name(&host.to_string()), "link", "set", "eth0", "down"]);
    }

    fn up(&self, host: usize) {
        let name = self.name(&host.to_string());
        ip(&["-n", &name, "link", "set", "eth0", "up"]);
        // Setting the link down has removed it.
        ip(&["-n", &name, "addr", "add", &format!("{CONTAINER_V6}/64"), "dev", "eth0", "nodad"]);
    }

    fn in_client<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        run_in_netns(self.client.as_fd(), f).unwrap()
    }

    fn in_host<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        run_in_netns(self.hosts[self.current].as_fd(), f).unwrap()
    }

    /// A connection from the client to the container: client's end, container's end.
    fn connection(&self, address: &str) -> (TcpStream, TcpStream) {
        let listener = self.in_host(|| TcpListener::bind((address, 0)).unwrap());
        let to = listener.local_addr().unwrap();
        let target: SocketAddr = if to.ip().is_unspecified() {
            (CONTAINER_V4.parse::<std::net::IpAddr>().unwrap(), to.port()).into()
        } else {
            to
        };
        let client = self.in_client(|| TcpStream::connect(target).unwrap());
        (client, listener.accept().unwrap().0)
    }

    /// RSTs that any of the three has sent.
    fn resets(&self) -> u64 {
        let count = || {
            let text = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
            let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
            let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
            let at = names.split(' ').position(|name| name == "OutRsts").unwrap();
            values.split(' ').nth(at).unwrap().parse::<u64>().unwrap()
        };
        let [a, b] = [0, 1].map(|host| run_in_netns(self.hosts[host].as_fd(), count).unwrap());
        a + b + self.in_client(count)
    }

    /// Moves the sockets to the other host and lets them live there.
    fn migrate(&mut self, sockets: Vec<OwnedFd>) -> Vec<OwnedFd> {
        let (restored, _) = self.migrate_timed(sockets);
        restored
    }

    fn migrate_timed(&mut self, sockets: Vec<OwnedFd>) -> (Vec<OwnedFd>, Timing) {
        self.down(self.current);
        let start = Instant::now();
        let mut capture = SocketCapture::begin(self.hosts[self.current].as_fd()).unwrap();
        let begin = start.elapsed();
        let mut descriptions = capture_all(&mut capture, &sockets);
        let wrong = capture.finish(&mut descriptions, Access::Frozen);
        assert!(wrong.is_empty(), "{wrong:?}");
        let captured = start.elapsed();

        let other = 1 - self.current;
        let start = Instant::now();
        let restored = RestoredSockets::restore(&descriptions, self.hosts[other].as_fd()).unwrap();
        let restore = start.elapsed();
        let start = Instant::now();
        capture.silence().unwrap();
        let silence = start.elapsed();
        drop((capture, sockets));
        self.current = other;
        self.up(other);
        let all = (0..descriptions.len() as u32).map(DescriptionId);
        let fds = all.map(|id| restored.get(id).unwrap().try_clone_to_owned().unwrap()).collect();
        let start = Instant::now();
        let failed = restored.go_live();
        assert!(failed.is_empty(), "{failed:?}");
        (fds, Timing { begin, capture: captured - begin, restore, silence, live: start.elapsed() })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in ["c", "0", "1"] {
            let _ = Command::new("ip").args(["netns", "del", &self.name(name)]).status();
        }
    }
}

#[derive(Debug)]
#[allow(dead_code)] // shown by Debug
struct Timing {
    begin: Duration,
    capture: Duration,
    restore: Duration,
    silence: Duration,
    live: Duration,
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn inode(socket: impl AsFd) -> u64 {
    nix::sys::stat::fstat(socket.as_fd()).unwrap().st_ino
}

fn capture_all(capture: &mut SocketCapture, sockets: &[OwnedFd]) -> Vec<Description> {
    let describe = |socket: &OwnedFd| {
        let kind = capture.capture(socket.as_fd(), inode(socket), Access::Frozen).unwrap();
        Description { flags: 2, owner: (0, 0, 0), kind }
    };
    sockets.iter().map(describe).collect()
}

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
    let mut worst = Duration::ZERO;
    for _ in 0..moves {
        run(&mut end, &server, Duration::from_millis(30));
        server = lab.migrate(vec![server]).pop().unwrap();
        let queued = sockopt::unacknowledged_bytes(server.as_fd()).unwrap();
        let (before, live) = (client.received.load(Ordering::Relaxed), Instant::now());
        while client.received.load(Ordering::Relaxed) == before {
            if live.elapsed() > Duration::from_millis(300) {
                println!("queued {queued} {before}");
                for n in ["c", &lab.current.to_string()] {
                    let o = Command::new("ip")
                        .args(["netns", "exec", &lab.name(n), "ss", "-tinoem"])
                        .output()
                        .unwrap();
                    println!("{n}: {}", String::from_utf8_lossy(&o.stdout));
                    let o = Command::new("ip")
                        .args(["netns", "exec", &lab.name(n), "nstat", "-s"])
                        .output()
                        .unwrap();
                    println!("{n}: {}", String::from_utf8_lossy(&o.stdout));
                }
                std::process::exit(1);
            }
            // What was in the queue reaches the client without the program's doing.
            if queued == 0 {
                run(&mut end, &server, Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        worst = worst.max(live.elapsed());
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
    println!("{address}: {moves} moves, {} + {} bytes, worst wait {worst:?}", end.sent, client_end.sent);
    assert!(worst < Duration::from_millis(150), "{worst:?}");
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

#[test]
fn an_idle_connection_learns_its_round_trip_time_at_once() {
    let mut lab = Lab::new();
    let (mut client, server) = lab.connection(CONTAINER_V4);
    let before = TcpInfo::of(server.as_fd()).unwrap();
    let server = lab.migrate(vec![server.into()]).pop().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let after = TcpInfo::of(server.as_fd()).unwrap();
    assert!(after.rtt_us > 0 && after.rto_us < 400_000, "{after:?}");
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
