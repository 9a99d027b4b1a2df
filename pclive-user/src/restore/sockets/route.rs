//! A route for `connect(2)` while the container's links are down.
//!
//! It goes through loopback, is used for nothing but choosing a connection's first parameters, and has the lowest
//! preference that there is. Its metrics are how a restored connection gets its congestion window, path MTU and advertised
//! MSS (`tcp_init_transfer`, `tcp_connect_init`): there is no option for these.

use super::RestoreError;
use nix::errno::Errno;
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::SockProtocol;
use pclive_sys::netlink::Netlink;
use pclive_wire::manifest::TcpConnection;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::Emitable;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
    RouteType,
};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
/// Every network namespace's loopback link has it (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;
/// Of IPv4's and IPv6's routes to the same destination the one with the lowest number counts.
const LEAST_PREFERRED: u32 = 0x7fff_fff0;
/// `initcwnd` that a kernel takes without one (`TCP_INIT_CWND`).
const INITIAL_WINDOW: u32 = 10;
/// More than this in flight nobody has.
const LARGEST_WINDOW: u32 = 1 << 17;

/// What a connection takes from its route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Metrics {
    ipv6: bool,
    congestion_window: u32,
    path_mtu: u32,
    advertised_mss: u32,
}

impl Metrics {
    /// What the source's connection had; and room for all that it had sent.
    pub(super) fn of(connection: &TcpConnection) -> Self {
        let ipv6 = matches!(connection.remote.ip().to_canonical(), IpAddr::V6(_));
        let path_mtu = connection.path_mtu.clamp(if ipv6 { 1280 } else { 552 }, 65535);
        // Headers and options take at most 40 + 60 bytes.
        let segment = connection.mss.min(path_mtu).saturating_sub(100).max(64);
        let segments = connection.send_queue.len() as u32 / segment + INITIAL_WINDOW;
        let window = connection.congestion_window.clamp(INITIAL_WINDOW, LARGEST_WINDOW);
        // Powers of two, so that few sizes are in use: connections with equal metrics share one change of the route.
        let window = INITIAL_WINDOW.max(1 << window.ilog2());
        let needed = if segments == INITIAL_WINDOW { segments } else { segments.next_power_of_two() };
        Self {
            ipv6,
            congestion_window: window.max(needed.min(LARGEST_WINDOW)),
            path_mtu,
            advertised_mss: connection.advertised_mss.clamp(88, 65535 - 40),
        }
    }

    fn message(self) -> RouteMessage {
        let mut message = RouteMessage::default();
        let (family, anywhere) = if self.ipv6 {
            (AddressFamily::Inet6, RouteAddress::Inet6(Ipv6Addr::UNSPECIFIED))
        } else {
            (AddressFamily::Inet, RouteAddress::Inet(Ipv4Addr::UNSPECIFIED))
        };
        message.header.address_family = family;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.scope = if self.ipv6 { RouteScope::Universe } else { RouteScope::Link };
        message.header.kind = RouteType::Unicast;
        message.attributes = vec![
            RouteAttribute::Destination(anywhere),
            RouteAttribute::Oif(LOOPBACK),
            RouteAttribute::Priority(LEAST_PREFERRED),
            RouteAttribute::Metrics(vec![
                RouteMetric::Mtu(self.path_mtu),
                RouteMetric::Advmss(self.advertised_mss),
                RouteMetric::InitCwnd(self.congestion_window),
            ]),
        ];
        message
    }
}

/// The routes that are lent at the moment, one for each address family.
#[derive(Debug)]
pub(super) struct Borrowed {
    netlink: Netlink,
    ipv4: Option<Metrics>,
    ipv6: Option<Metrics>,
    /// Loopback was down before.
    loopback_raised: bool,
}

impl Borrowed {
    /// Prepares for lending, in the calling thread's network namespace.
    pub(super) fn new() -> Result<Self, RestoreError> {
        let error = |call| move |source| RestoreError::Network { call, source };
        let netlink = Netlink::open(SockProtocol::NetlinkRoute).map_err(error("socket NETLINK_ROUTE"))?;
        let mut new = Self { netlink, ipv4: None, ipv6: None, loopback_raised: false };
        if !loopback_is_up().map_err(error("getifaddrs"))? {
            new.set_loopback(true).map_err(error("set the loopback link up"))?;
            new.loopback_raised = true;
        }
        Ok(new)
    }

    /// Lends a connection its route.
    pub(super) fn lend(&mut self, metrics: Metrics) -> Result<(), RestoreError> {
        let current = if metrics.ipv6 { &mut self.ipv6 } else { &mut self.ipv4 };
        if *current == Some(metrics) {
            return Ok(());
        }
        let request = bytes(&metrics.message());
        self.netlink
            .request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &request)
            .map_err(|source| RestoreError::Network { call: "RTM_NEWROUTE", source })?;
        *current = Some(metrics);
        Ok(())
    }

    /// Removes the routes.
    pub(super) fn give_back(mut self) -> Result<(), RestoreError> {
        self.remove()
    }

    fn remove(&mut self) -> Result<(), RestoreError> {
        let mut result = Ok(());
        for metrics in [self.ipv4.take(), self.ipv6.take()].into_iter().flatten() {
            // Without the metrics: the kernel rounds them, and would compare.
            let mut message = metrics.message();
            message.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::Metrics(_)));
            let request = bytes(&message);
            let removed = self.netlink.request(RTM_DELROUTE, 0, &request);
            result =
                result.and(removed.map_err(|source| RestoreError::Network { call: "RTM_DELROUTE", source }));
        }
        if std::mem::take(&mut self.loopback_raised) {
            let lowered = self.set_loopback(false);
            result = result.and(
                lowered
                    .map_err(|source| RestoreError::Network { call: "set the loopback link down", source }),
            );
        }
        result
    }

    fn set_loopback(&mut self, up: bool) -> nix::Result<()> {
        // struct ifinfomsg: family, pad, type, index, flags, mask of flags to change.
        let mut request = vec![0; 4];
        let flag = libc::IFF_UP as u32;
        for word in [LOOPBACK, if up { flag } else { 0 }, flag] {
            request.extend_from_slice(&word.to_ne_bytes());
        }
        self.netlink.request(RTM_NEWLINK, 0, &request)
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        // Something has failed already, and this namespace will be destroyed with the container.
        let _ = self.remove();
    }
}

fn bytes(message: &RouteMessage) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

fn loopback_is_up() -> Result<bool, Errno> {
    let mut links = nix::ifaddrs::getifaddrs()?;
    Ok(links.any(|link| link.flags.contains(InterfaceFlags::IFF_LOOPBACK | InterfaceFlags::IFF_UP)))
}
