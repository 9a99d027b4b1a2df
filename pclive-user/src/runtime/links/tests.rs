use super::*;
use pclive_sys::namespace::run_in_netns;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A container's namespace and a neighbour's, whose links `eth0` are joined by a bridge in their host's namespace.
struct Lab {
    host: String,
    container: String,
    neighbour: String,
}

impl Lab {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let unique = format!("runtime-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let [host, container, neighbour] = ["h", "c", "n"].map(|role| format!("{unique}-{role}"));
        let lab = Self { host, container, neighbour };
        for name in [&lab.host, &lab.container, &lab.neighbour] {
            run(&["netns", "add", name]);
        }
        ip(&lab.host, "link add br0 type bridge");
        ip(&lab.host, "link set br0 up");
        for (port, name) in [("container", &lab.container), ("neighbour", &lab.neighbour)] {
            // Different indices, as in real life: a change of a link whose peer has its own index is noticed a second
            // late (`linkwatch_urgent_event` in net/core/link_watch.c).
            ip(&lab.host, &format!("link add {port} type veth peer name eth0 index 77 netns {name}"));
            ip(&lab.host, &format!("link set {port} up master br0"));
        }
        lab.inside("link set lo up");
        lab.outside("address add 192.0.2.1/24 dev eth0");
        lab.outside("address add 2001:db8::1/64 dev eth0 nodad");
        lab.outside("link set eth0 up");
        lab.inside("address add 192.0.2.7/24 dev eth0");
        lab
    }

    /// A container that is up, with addresses and routes of many kinds.
    fn furnished() -> Self {
        let lab = Self::new();
        for command in [
            "link set eth0 up",
            "address add 192.0.2.8/24 dev eth0",
            "address add 198.51.100.7/32 dev eth0",
            "address add 2001:db8::7/64 dev eth0",
            "address add 2001:db8::8/64 dev eth0 noprefixroute",
        ] {
            lab.inside(command);
        }
        // A tentative address is no source address.
        lab.settle();
        for command in [
            "route add default via 192.0.2.1 metric 50 src 192.0.2.8",
            "route add default via 192.0.2.2 metric 70 proto bird mtu 1400",
            "route add 169.254.1.1 dev eth0 scope link",
            "route add 10.1.0.0/16 via 169.254.1.1 table 100",
            "route add 10.2.0.0/16 via 192.0.2.9 dev eth0 onlink",
            "route add 10.3.0.0/16 nexthop via 192.0.2.1 weight 3 nexthop via 192.0.2.2",
            "route add blackhole 10.4.0.0/16",
            "-6 route add default via 2001:db8::1 metric 512 pref high",
            "-6 route add 2001:db8:1::/48 via 2001:db8::1 table 200 src 2001:db8::7",
            "-6 route add 2001:db8:2::/48 via fe80::1 dev eth0 expires 999",
        ] {
            lab.inside(command);
        }
        lab
    }

    /// Waits until no address is tentative any more, and the link is seen to be up.
    fn settle(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.inside("-6 address show tentative").contains("inet6")
            || self.inside("link show eth0").contains("NO-CARRIER")
        {
            assert!(Instant::now() < deadline, "an address stays tentative or a link without carrier");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn netns(&self) -> OwnedFd {
        open_netns(&self.container)
    }

    /// The container's links, as its host opens them.
    fn links(&self) -> Links {
        self.links_with(None)
    }

    fn links_with(&self, freezer: Option<File>) -> Links {
        let netns = self.netns();
        run_in_netns(open_netns(&self.host).as_fd(), || Links::open(netns.as_fd(), freezer)).unwrap().unwrap()
    }

    fn inside(&self, command: &str) -> String {
        ip(&self.container, command)
    }

    fn outside(&self, command: &str) -> String {
        ip(&self.neighbour, command)
    }

    /// Everything about links, addresses and routes, without what changes by itself.
    fn everything(&self) -> Vec<String> {
        let shown = ["-4 address", "-6 address", "-4 route show table all", "-6 route show table all"];
        let mut lines =
            vec![self.inside("link show lo"), self.inside("-br link").replace("LOWERLAYERDOWN", "DOWN")];
        for what in shown {
            let text = self.inside(what);
            // An address added by pclive is shown as exempt from detection; times run.
            let is_constant =
                |word: &&str| *word != "nodad" && !(word.starts_with("99") && word.ends_with("sec"));
            let words =
                |line: &str| line.split_whitespace().filter(is_constant).collect::<Vec<_>>().join(" ");
            lines.extend(text.lines().map(words));
        }
        lines.sort();
        lines
    }

    /// Whether the neighbour's attempt to connect to `address` is answered, by a refusal, before it is repeated.
    fn answers(&self, address: &str) -> bool {
        let neighbour = open_netns(&self.neighbour);
        let address = (address.parse::<std::net::IpAddr>().unwrap(), 9).into();
        // TCP repeats a lost SYN after a second.
        let attempt = || std::net::TcpStream::connect_timeout(&address, Duration::from_millis(900));
        let refused = run_in_netns(neighbour.as_fd(), attempt).unwrap().unwrap_err();
        refused.kind() == io::ErrorKind::ConnectionRefused
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in [&self.container, &self.neighbour, &self.host] {
            run(&["netns", "del", name]);
        }
    }
}

fn open_netns(name: &str) -> OwnedFd {
    File::open(format!("/run/netns/{name}")).unwrap().into()
}

fn ip(netns: &str, command: &str) -> String {
    let mut line = vec!["-n", netns];
    line.extend(command.split(' '));
    run(&line)
}

fn run(line: &[&str]) -> String {
    let output = Command::new("ip").args(line).output().unwrap();
    assert!(output.status.success(), "ip {line:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_container_that_stays_has_everything_again() {
    let lab = Lab::furnished();
    let before = lab.everything();
    let mut links = lab.links();
    assert_eq!(lab.everything(), before);
    links.take_down().unwrap();
    links.take_down().unwrap();
    assert!(!lab.inside("route show table all").contains("default"));
    assert!(!lab.inside("-6 address").contains("2001:db8::7"));
    assert!(lab.inside("link show lo").contains("LOOPBACK,UP"));
    links.restore().unwrap();
    drop(links);
    lab.settle();
    assert_eq!(lab.everything(), before);

    // And a second time, with the same outcome.
    let mut links = lab.links();
    links.take_down().unwrap();
    links.restore().unwrap();
    lab.settle();
    assert_eq!(lab.everything(), before);
}

#[test]
fn what_was_added_since_the_links_were_opened_comes_back_too() {
    let lab = Lab::furnished();
    let mut links = lab.links();
    // Each is told by a group of its own, and goes when the link goes down.
    for addition in [
        "route add 10.9.0.0/16 via 192.0.2.1",
        "-6 route add 2001:db8:9::/48 via 2001:db8::1",
        "address add 2001:db8::9/64 dev eth0 nodad",
    ] {
        lab.inside(addition);
        let before = lab.everything();
        links.take_down().unwrap();
        assert_ne!(lab.everything(), before);
        links.restore().unwrap();
        lab.settle();
        assert_eq!(lab.everything(), before, "{addition}");
    }
}

#[test]
fn links_whose_pclive_ends_come_back_unless_they_are_to_stay_down() {
    let lab = Lab::furnished();
    let before = lab.everything();
    let setting = || std::fs::read_to_string("/proc/sys/net/ipv6/conf/eth0/accept_dad").unwrap();
    let setting = || run_in_netns(lab.netns().as_fd(), setting).unwrap();
    let mut freezer = tempfile::tempfile().unwrap();

    let mut links = lab.links_with(Some(freezer.try_clone().unwrap()));
    links.take_down().unwrap();
    // Nothing of this process's own may do it: as if it had been killed, only the will is ended.
    let Links { will, detection, netlink, .. } = links;
    detection.into_iter().for_each(std::mem::forget);
    assert_eq!(setting(), "0\n");
    drop(will);
    drop(netlink);
    lab.settle();
    assert_eq!((lab.everything(), setting().as_str()), (before, "1\n"));
    let mut thawed = String::new();
    std::io::Seek::rewind(&mut freezer).unwrap();
    std::io::Read::read_to_string(&mut freezer, &mut thawed).unwrap();
    assert_eq!(thawed, "0");

    let mut links = lab.links();
    links.take_down().unwrap();
    links.keep_down().unwrap();
    let down = lab.everything();
    drop(links);
    assert_eq!(lab.everything(), down);
    assert!(lab.inside("-br link show eth0").contains("DOWN"));
}

#[test]
fn addresses_work_the_moment_the_links_are_up() {
    let lab = Lab::furnished();
    let mut links = lab.links();
    assert!(lab.answers("192.0.2.7") && lab.answers("2001:db8::7"));
    links.take_down().unwrap();
    assert!(!lab.answers("192.0.2.7"));
    links.bring_up().unwrap();
    assert_eq!(lab.inside("-6 address show tentative"), "");
    assert!(lab.answers("2001:db8::7") && lab.answers("2001:db8::8") && lab.answers("192.0.2.7"));
    // The link-local address is the kernel's, and is not tentative either.
    assert!(lab.inside("-6 address show scope link").contains("fe80::"));
}

#[test]
fn a_link_that_was_prepared_but_down_comes_up_only_if_the_container_does() {
    let lab = Lab::new();
    lab.inside("address add 2001:db8::7/64 dev eth0");
    let before = lab.everything();
    let mut links = lab.links();
    links.take_down().unwrap();
    links.restore().unwrap();
    assert_eq!(lab.everything(), before);
    links.take_down().unwrap();
    links.bring_up().unwrap();
    assert_eq!(lab.inside("-6 address show tentative"), "");
    assert!(lab.answers("192.0.2.7") && lab.answers("2001:db8::7"));
    let setting = || std::fs::read_to_string("/proc/sys/net/ipv6/conf/eth0/accept_dad").unwrap();
    let is_up = || lab.inside("-br link show eth0").contains("UP");
    // As if pclive had been killed before the container was let go.
    drop(links);
    assert!(!is_up());
    assert_eq!(run_in_netns(lab.netns().as_fd(), setting).unwrap(), "1\n");

    let mut links = lab.links();
    links.take_down().unwrap();
    links.bring_up().unwrap();
    links.keep_up().unwrap();
    drop(links);
    assert!(is_up());
}

#[test]
fn neighbours_learn_where_the_addresses_are() {
    let lab = Lab::furnished();
    let addresses = ["192.0.2.7", "192.0.2.8", "2001:db8::7"];
    for address in addresses {
        lab.outside(&format!("neigh replace {address} lladdr 02:00:00:00:ba:ad dev eth0 nud stale"));
    }
    let mut links = lab.links();
    links.take_down().unwrap();
    links.bring_up().unwrap();
    links.announce().unwrap();
    let deadline = Instant::now() + Duration::from_secs(2);
    while addresses.iter().any(|address| lab.outside(&format!("neigh show {address}")).contains("ba:ad")) {
        assert!(Instant::now() < deadline, "{}", lab.outside("neigh"));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_first_packet_from_the_container_gets_through_its_hosts_bridge() {
    let lab = Lab::furnished();
    let listen = || std::net::TcpListener::bind("192.0.2.1:999").unwrap();
    let listener = run_in_netns(open_netns(&lab.neighbour).as_fd(), listen).unwrap();
    let mut links = lab.links();
    for _ in 0..5 {
        links.take_down().unwrap();
        // Until the host has noticed, so that it has something to notice again.
        while !ip(&lab.host, "link show container").contains("NO-CARRIER") {
            std::thread::sleep(Duration::from_millis(1));
        }
        let connect = || {
            links.bring_up().unwrap();
            // TCP repeats a lost SYN after a second.
            std::net::TcpStream::connect_timeout(&listener.local_addr().unwrap(), Duration::from_millis(900))
        };
        run_in_netns(lab.netns().as_fd(), connect).unwrap().unwrap();
        listener.accept().unwrap();
    }
}

#[test]
fn the_hosts_own_links_are_out_of_reach() {
    let own = File::open("/proc/self/ns/net").unwrap();
    assert!(matches!(Links::open(own.as_fd(), None).unwrap_err(), LinkError::OwnNamespace));
}

#[test]
fn a_route_that_could_not_be_restored_is_named_before_anything_is_touched() {
    let lab = Lab::furnished();
    lab.inside("nexthop add id 7 via 192.0.2.1 dev eth0");
    lab.inside("route add 10.9.0.0/16 nhid 7");
    let error = Links::open(lab.netns().as_fd(), None).unwrap_err().to_string();
    assert!(error.contains("10.9.0.0/16"), "{error}");
}

#[test]
fn a_refused_change_is_named_and_the_others_are_made() {
    let lab = Lab::furnished();
    let mut links = lab.links();
    links.take_down().unwrap();
    lab.inside("address del 192.0.2.8/24 dev eth0");
    let error = links.restore().unwrap_err();
    assert!(error.to_string().contains("add route to default via 192.0.2.1 in table 254"), "{error}");
    assert!(lab.inside("route").contains("10.2.0.0/16"));
}
