//! Moves real sockets between two network namespaces, with a client in a third.

mod tcp;
mod traffic;
mod unix;

use super::*;
use crate::capture::Access;
use crate::capture::sockets::{OptionWatch, SocketCapture, SocketError, SocketTables};
use pclive_sys::sock_diag::SockDiag;
use std::collections::HashSet;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const CONTAINER_V4: &str = "10.99.0.2";
const CONTAINER_V6: &str = "fd99::2";
const CLIENT_MAC: &str = "02:00:00:00:99:01";

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
        // Four descriptors for each of a thousand connections, in a process that may have a limit of 1024.
        let (_, most) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, most, most).unwrap();
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
        ip(&["-n", &c, "link", "add", "br0", "address", CLIENT_MAC, "type", "bridge"]);
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
        // It has lost this one when it was set down.
        ip(&["-n", &name, "addr", "add", &format!("{CONTAINER_V6}/64"), "dev", "eth0", "nodad"]);
        // A question to a neighbour that is lost is repeated after a second.
        for address in ["10.99.0.1", "fd99::1"] {
            let neighbour = [address, "lladdr", CLIENT_MAC, "dev", "eth0", "nud", "reachable"];
            ip(&[&["-n", &name, "neigh", "replace"][..], &neighbour].concat());
        }
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

    /// The sockets of a host.
    fn tables(&self, host: usize) -> Arc<SocketTables> {
        Arc::new(SocketTables::open(self.hosts[host].as_fd()).unwrap())
    }

    /// Waits until a host has none of these connections any more, which must not come back before.
    ///
    /// A program that another test is starting has copies of all descriptors of this process until its `execve(2)`.
    fn await_gone(&self, host: usize, descriptions: &[Description]) {
        let ends = descriptions.iter().filter_map(|description| match &description.kind {
            DescriptionKind::Tcp(socket) => match &socket.state {
                TcpState::Connected(connection) => Some((socket.local?, connection.remote)),
                _ => None,
            },
            _ => None,
        });
        let ends: HashSet<_> = ends.collect();
        let left = || {
            let all = SockDiag::open().unwrap().tcp(u32::MAX).unwrap();
            all.into_iter().filter(|entry| ends.contains(&(entry.local, entry.remote))).collect::<Vec<_>>()
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        run_in_netns(self.hosts[host].as_fd(), || {
            while let Some(entry) = left().first() {
                assert!(Instant::now() < deadline, "still there: {entry:?}");
                std::thread::sleep(Duration::from_millis(1));
            }
        })
        .unwrap();
    }

    /// Moves the sockets to the other host and lets them live there.
    fn migrate(&mut self, sockets: Vec<OwnedFd>) -> Vec<OwnedFd> {
        let (restored, _) = self.migrate_timed(sockets, self.tables(self.current));
        restored
    }

    /// The same with tables that may know something of the sockets.
    fn migrate_timed(&mut self, sockets: Vec<OwnedFd>, tables: Arc<SocketTables>) -> (Vec<OwnedFd>, Timing) {
        self.down(self.current);
        let start = Instant::now();
        let mut capture = SocketCapture::begin(tables, None).unwrap();
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
        self.await_gone(self.current, &descriptions);
        self.current = other;
        self.up(other);
        let all = (0..descriptions.len() as u32).map(DescriptionId);
        let fds = all.map(|id| restored.get(id).unwrap().try_clone_to_owned().unwrap()).collect();
        let start = Instant::now();
        let failed = restored.go_live();
        assert!(failed.is_empty(), "{failed:?}");
        let live = start.elapsed();
        (fds, Timing { begin, capture: captured - begin, restore, silence, live })
    }
}

/// Says the same of every socket.
#[derive(Debug)]
struct Says {
    unchanged: bool,
}

impl OptionWatch for Says {
    fn watch(&mut self, _socket: BorrowedFd<'_>) {}

    fn is_unchanged(&self, _socket: BorrowedFd<'_>) -> bool {
        self.unchanged
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
