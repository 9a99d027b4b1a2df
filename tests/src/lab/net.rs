//! The lab's wires.
//!
//! ```text
//!                                     client
//!                                       │ 10.77.0.9
//!   container ─ br0 ─ host ═══uplink═ switch ═uplink═══ host ─ br0 ─ container
//!   10.77.0.101       10.77.0.1                    10.77.0.2         10.77.0.101 (down)
//!                       ╚══════════interlink═══════════╝
//!                       10.78.0.1              10.78.0.2
//! ```
//! Everything that containers and clients use is one Ethernet: a container keeps its address and its MAC wherever it
//! runs, and a gratuitous ARP from its new host moves it in every bridge's table. The bridges run no spanning tree, so
//! a port forwards the moment its link is up. The interlink is for migrations that shall not share a link with
//! clients. Only the hosts' links (`═`) can be shaped, each in both directions.

use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::Result;

use super::netns::Netns;

/// The prefix length of the lab's subnets.
const PREFIX_LENGTH: u8 = 24;
/// What a shaped link may send at once. Less than a full GSO packet would make the shaper segment every packet.
const BURST_BYTES: u32 = 128 * 1024;
/// What the switch keeps for a link that is busy: 8 ms at 1 Gbit/s, like the shared buffer of a small switch.
const SWITCH_BUFFER_BYTES: u32 = 1024 * 1024;

/// Whether bridges ask iptables; there is no such setting where the kernel has not loaded that.
const BRIDGE_FILTER: &str = "net/bridge/bridge-nf-call-iptables";

/// The addresses behind the switch.
pub(super) const fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, last)
}

/// The address of host `number` on the link that joins the hosts.
pub(super) const fn interlink_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 78, 0, number)
}

/// A rate in bits per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BitRate(pub u64);

impl BitRate {
    /// The link that figures are given for.
    pub const GIGABIT: Self = Self(1_000_000_000);
}

/// Makes the switch in its namespace.
pub(super) fn make_switch(switch: &Netns) -> Result<()> {
    // A random lowest MAC among the ports would otherwise become the bridge's and change with them.
    // It forwards frames and filters nothing: where the machine's bridges ask iptables, each frame would cost the
    // processors that the clients and the server share much more.
    switch.ip("link add br0 type bridge stp_state 0 forward_delay 0\nlink set br0 up")?;
    match Path::new("/proc/sys").join(BRIDGE_FILTER).exists() {
        true => switch.sysctl(BRIDGE_FILTER, "0"),
        false => Ok(()),
    }
}

/// Connects `station` to the switch; its link is `uplink`, the switch's end is `port`.
fn connect(switch: &Netns, station: &Netns, port: &str) -> Result<()> {
    switch.ip(&format!(
        "link add {port} type veth peer name uplink netns {station}\n\
         link set {port} master br0\n\
         link set {port} up",
        station = station.name()
    ))?;
    station.ip("link set uplink up")
}

/// Connects the client: an address on its link.
pub(super) fn connect_client(switch: &Netns, client: &Netns, address: Ipv4Addr) -> Result<()> {
    connect(switch, client, "port0")?;
    client.ip(&format!("address add {address}/{PREFIX_LENGTH} dev uplink"))
}

/// Connects a host: its link and its containers' are ports of a bridge that has the host's address.
pub(super) fn connect_host(switch: &Netns, host: &Netns, port: &str, address: Ipv4Addr) -> Result<()> {
    make_switch(host)?;
    connect(switch, host, port)?;
    host.ip(&format!("link set uplink master br0\naddress add {address}/{PREFIX_LENGTH} dev br0"))
}

/// Gives a container's namespace its link `eth0`, attached to `host`, down and with its address.
pub(super) fn attach_container(host: &Netns, container: &Netns, number: u8, address: Ipv4Addr) -> Result<()> {
    host.ip(&format!(
        "link add c{number} type veth peer name eth0 address {mac} netns {container}\n\
         link set c{number} master br0\n\
         link set c{number} up",
        mac = container_mac(number),
        container = container.name()
    ))?;
    container.ip(&format!("address add {address}/{PREFIX_LENGTH} dev eth0"))
}

/// The MAC of a container: locally administered, the same on both hosts.
fn container_mac(number: u8) -> String {
    format!("02:70:63:6c:00:{number:02x}")
}

/// Joins the hosts by a link of their own.
pub(super) fn connect_hosts(source: &Netns, destination: &Netns) -> Result<()> {
    let peer = destination.name();
    source.ip(&format!("link add interlink type veth peer name interlink netns {peer}"))?;
    for (host, number) in [(source, 1), (destination, 2)] {
        let address = interlink_address(number);
        host.ip(&format!("address add {address}/{PREFIX_LENGTH} dev interlink\nlink set interlink up"))?;
    }
    Ok(())
}

/// Shapes a host's uplink in both directions, or takes the shapers away. The switch knows no priorities.
pub(super) fn shape_uplink(switch: &Netns, host: &Netns, port: &str, rate: Option<BitRate>) -> Result<()> {
    shape(host, "uplink", rate)?;
    match rate {
        Some(rate) => switch.tc(&format!("qdisc replace dev {port} root handle 1: {}", shaper(rate))),
        None => switch.tc(&format!("qdisc replace dev {port} root noqueue")),
    }
}

/// Shapes what a host sends on a link, or takes the shaper away.
///
/// It queues by priority (`pfifo_fast`, the queue of a network card by default): what is sent with `SO_PRIORITY` bulk
/// waits for the rest.
pub(super) fn shape(host: &Netns, link: &str, rate: Option<BitRate>) -> Result<()> {
    let Some(rate) = rate else { return host.tc(&format!("qdisc replace dev {link} root noqueue")) };
    host.tc(&format!(
        "qdisc replace dev {link} root handle 1: {}\n\
         qdisc replace dev {link} parent 1:1 handle 2: pfifo_fast",
        shaper(rate)
    ))
}

fn shaper(BitRate(rate): BitRate) -> String {
    format!("tbf rate {rate}bit burst {BURST_BYTES} limit {SWITCH_BUFFER_BYTES}")
}
