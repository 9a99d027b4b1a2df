//! What a network namespace has on its links, as requests that bring it back.

use super::LinkError;
use super::announce::Mac;
use super::netlink::{Netlink, Request};
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags, RouteProtocol,
    RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use std::net::IpAddr;

/// `RTA_NH_ID` of `linux/rtnetlink.h` (Linux 5.3): the route uses a nexthop object.
const RTA_NH_ID: u16 = 30;

/// Ticks per second in times that the kernel reports (`USER_HZ`).
const USER_HZ: u32 = 100;

/// A link that is not `lo`.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub index: u32,
    pub name: String,
    pub up: bool,
    /// Its address, if it is Ethernet and resolves addresses.
    pub mac: Option<Mac>,
    /// Index of the link that it is bound to in another namespace, usually the host's: a veth's peer.
    pub peer: Option<u32>,
}

impl Link {
    /// A request that sets the link up or down.
    pub fn set(&self, up: bool) -> Request {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        message.header.change_mask = LinkFlags::Up;
        Request {
            what: format!("set link {} {}", self.name, if up { "up" } else { "down" }),
            message: RouteNetlinkMessage::SetLink(message),
            flags: 0,
            accepted: &[],
        }
    }
}

/// Whether the kernel has drawn every consequence from the link's having a carrier: if not, it drops what is sent
/// through it, and its bridge does. A link without a carrier has none to draw.
///
/// Asking for a single link, unlike listing them, also makes the kernel draw them (`rtnl_getlink` in
/// net/core/rtnetlink.c, Linux 6.8).
pub(super) fn is_settled(netlink: &mut Netlink, index: u32) -> Result<bool, LinkError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    let answer = netlink.get("look at a link", RouteNetlinkMessage::GetLink(message))?;
    let Some(RouteNetlinkMessage::NewLink(link)) = answer else { return Ok(true) };
    let flags = link.header.flags;
    Ok(flags.contains(LinkFlags::Running) || !flags.contains(LinkFlags::LowerUp))
}

/// Links, addresses and routes of a namespace.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub links: Vec<Link>,
    pub addresses: Vec<Address>,
    /// Add the routes that vanish when the links go down.
    pub routes: Vec<Request>,
}

/// An address of a link.
#[derive(Debug)]
pub(super) struct Address {
    pub link: u32,
    pub address: IpAddr,
    /// For IPv6 only: IPv4 addresses outlive their link's going down.
    pub renew: Option<Renewal>,
}

/// Removes an address that may be there and adds it.
#[derive(Debug)]
pub(super) struct Renewal {
    pub remove: Request,
    pub add: Request,
}

impl Snapshot {
    /// Reads the namespace that `netlink` belongs to.
    pub fn take(netlink: &mut Netlink) -> Result<Self, LinkError> {
        let links: Vec<Link> = netlink
            .dump("list links", RouteNetlinkMessage::GetLink(LinkMessage::default()))?
            .into_iter()
            .filter_map(link_of)
            .collect();
        let is_ours = |index| links.iter().any(|link| link.index == index);

        let addresses = netlink
            .dump("list addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default()))?
            .into_iter()
            .filter_map(address_of)
            .filter(|address| is_ours(address.link))
            .collect();

        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            for message in netlink.dump("list routes", RouteNetlinkMessage::GetRoute(request))? {
                let RouteNetlinkMessage::NewRoute(route) = message else { continue };
                if uses(&route, is_ours) && !is_automatic(&route) {
                    routes.push(route);
                }
            }
        }
        let routes = in_order(routes).into_iter().map(add_route).collect::<Result<_, _>>()?;
        Ok(Self { links, addresses, routes })
    }
}

fn link_of(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else { return None };
    let flags = message.header.flags;
    if flags.contains(LinkFlags::Loopback) {
        return None;
    }
    let resolves =
        message.header.link_layer_type == LinkLayerType::Ether && !flags.contains(LinkFlags::Noarp);
    let (mut name, mut mac, mut bound_to, mut is_elsewhere) = (String::new(), None, None, false);
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = text,
            LinkAttribute::Address(bytes) if resolves => mac = Mac::try_from(bytes).ok(),
            LinkAttribute::Link(index) => bound_to = Some(index),
            LinkAttribute::LinkNetNsId(_) => is_elsewhere = true,
            _ => (),
        }
    }
    Some(Link {
        index: message.header.index,
        name,
        up: flags.contains(LinkFlags::Up),
        mac,
        peer: bound_to.filter(|_| is_elsewhere),
    })
}

fn address_of(message: RouteNetlinkMessage) -> Option<Address> {
    let RouteNetlinkMessage::NewAddress(message) = message else { return None };
    let (mut own, mut peer) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => own = Some(*address),
            AddressAttribute::Address(address) => peer = Some(*address),
            _ => (),
        }
    }
    // IFA_ADDRESS is the peer's address if the link is point-to-point and has IFA_LOCAL too.
    let address = own.or(peer)?;
    let link = message.header.index;
    let renew = address
        .is_ipv6()
        .then(|| Renewal { remove: remove_address(&message, address), add: add_address(message, address) });
    Some(Address { link, address, renew })
}

fn remove_address(message: &AddressMessage, address: IpAddr) -> Request {
    let mut removed = AddressMessage::default();
    removed.header = message.header.clone();
    removed.attributes = vec![AddressAttribute::Local(address)];
    Request {
        what: format!("remove address {address} from link {}", message.header.index),
        message: RouteNetlinkMessage::DelAddress(removed),
        flags: 0,
        // It went with the link, unless keep_addr_on_down is set or the link was down before.
        accepted: &[Errno::EADDRNOTAVAIL],
    }
}

/// A request that adds an IPv6 address which is usable at once.
///
/// Duplicate address detection would keep it tentative for a second and more. It is left out because the one other
/// host that ever had the address has its link down: the address moves, it is not chosen.
fn add_address(mut message: AddressMessage, address: IpAddr) -> Request {
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    message.attributes.retain(|attribute| match attribute {
        AddressAttribute::Flags(all) => {
            flags = *all;
            false
        }
        _ => true,
    });
    // The rest is the kernel's, and says how the address fares, not how it is set up.
    flags &= AddressFlags::Homeaddress | AddressFlags::Managetempaddr | AddressFlags::Noprefixroute;
    message.attributes.push(AddressAttribute::Flags(flags | AddressFlags::Nodad));
    message.header.flags = AddressHeaderFlags::empty();
    Request {
        what: format!("add address {address} to link {}", message.header.index),
        message: RouteNetlinkMessage::NewAddress(message),
        flags: NLM_F_CREATE,
        // The link-local address: the kernel has made it already.
        accepted: &[Errno::EEXIST],
    }
}

/// Whether a route leads out of one of the links.
fn uses(route: &RouteMessage, is_ours: impl Fn(u32) -> bool) -> bool {
    route.attributes.iter().any(|attribute| match attribute {
        RouteAttribute::Oif(index) => is_ours(*index),
        RouteAttribute::MultiPath(hops) => hops.iter().any(|hop| is_ours(hop.interface_index)),
        _ => false,
    })
}

/// Whether the kernel adds the route by itself, with the address or the link that it belongs to.
fn is_automatic(route: &RouteMessage) -> bool {
    let header = &route.header;
    let is_plain = matches!(header.kind, RouteType::Unicast | RouteType::Unspec);
    header.flags.contains(RouteFlags::Cloned) || (header.protocol == RouteProtocol::Kernel && !is_plain)
}

/// Routes such that a gateway is reachable before the route through it is added.
fn in_order(mut routes: Vec<RouteMessage>) -> Vec<RouteMessage> {
    let is_gateway = |attribute: &RouteAttribute| {
        matches!(
            attribute,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)
        )
    };
    // Stable: what the kernel lists first among equals must be added first.
    routes.sort_by_key(|route| route.attributes.iter().any(is_gateway));
    routes
}

fn add_route(mut route: RouteMessage) -> Result<Request, LinkError> {
    let what = format!("add {}", describe(&route));
    let has_nexthop_object = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Other(attribute) => netlink_packet_core::Nla::kind(attribute) == RTA_NH_ID,
        _ => false,
    };
    if route.attributes.iter().any(has_nexthop_object) {
        return Err(LinkError::NexthopObject { route: describe(&route) });
    }
    let mut expires = None;
    route.attributes.retain_mut(|attribute| match attribute {
        RouteAttribute::CacheInfo(info) => {
            expires = Some(info.expires / USER_HZ).filter(|&seconds| seconds > 0);
            false
        }
        RouteAttribute::MultiPath(hops) => {
            hops.iter_mut().for_each(|hop| hop.flags &= RouteNextHopFlags::Onlink);
            true
        }
        _ => true,
    });
    route.attributes.extend(expires.map(RouteAttribute::Expires));
    // Of the flags, the others are states (dead, link down, offloaded).
    route.header.flags &= RouteFlags::Onlink;
    Ok(Request {
        what,
        message: RouteNetlinkMessage::NewRoute(route),
        // Appended, so that of several routes to one destination the first stays the first.
        flags: NLM_F_CREATE | NLM_F_APPEND,
        // A route to a link's own network: the kernel has added it together with the address.
        accepted: &[Errno::EEXIST],
    })
}

/// A route for people.
fn describe(route: &RouteMessage) -> String {
    let RouteHeader { destination_prefix_length: prefix, table, .. } = route.header;
    let address = |wanted: fn(&RouteAttribute) -> Option<&RouteAddress>| {
        route.attributes.iter().find_map(wanted).map(|address| match address {
            RouteAddress::Inet(address) => address.to_string(),
            RouteAddress::Inet6(address) => address.to_string(),
            other => format!("{other:?}"),
        })
    };
    let destination = address(|attribute| match attribute {
        RouteAttribute::Destination(address) => Some(address),
        _ => None,
    });
    let gateway = address(|attribute| match attribute {
        RouteAttribute::Gateway(address) => Some(address),
        _ => None,
    });
    let destination = destination.map_or("default".into(), |address| format!("{address}/{prefix}"));
    let gateway = gateway.map(|address| format!(" via {address}")).unwrap_or_default();
    format!("route to {destination}{gateway} in table {table}")
}
