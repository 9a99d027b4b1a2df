//! Telling the neighbours that an address is here now: gratuitous ARP and unsolicited neighbour advertisements.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A link-layer address.
pub(super) type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];

/// The Ethernet group of `ff02::1`, all nodes (RFC 2464, section 7).
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

const ICMPV6: u8 = 58;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// The frames that announce that `address` has `mac`.
///
/// For IPv4 both forms (RFC 5227, section 3): some systems update their caches only from requests, others only from
/// replies.
pub(super) fn frames(address: IpAddr, mac: Mac) -> Vec<Vec<u8>> {
    match address {
        IpAddr::V4(address) => vec![arp(1, address, mac), arp(2, address, mac)],
        IpAddr::V6(address) => vec![neighbour_advertisement(address, mac)],
    }
}

/// A gratuitous ARP packet (RFC 826): sender and target are the same address.
fn arp(operation: u16, address: Ipv4Addr, mac: Mac) -> Vec<u8> {
    let target_mac = if operation == 1 { [0; 6] } else { mac };
    let mut frame = ethernet(BROADCAST, mac, 0x0806);
    // Ethernet, IPv4, and the lengths of their addresses.
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend(target_mac);
    frame.extend(address.octets());
    frame
}

/// An unsolicited neighbour advertisement that overrides what is cached (RFC 4861, sections 4.4 and 7.2.6).
fn neighbour_advertisement(address: Ipv6Addr, mac: Mac) -> Vec<u8> {
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0];
    message.extend([0x20, 0, 0, 0]); // override
    message.extend(address.octets());
    message.extend([2, 1]); // option: target link-layer address, 8 bytes
    message.extend(mac);
    let checksum = icmpv6_checksum(address, ALL_NODES, &message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = ethernet(ALL_NODES_MAC, mac, 0x86dd);
    frame.extend([0x60, 0, 0, 0]); // version 6
    frame.extend((message.len() as u16).to_be_bytes());
    frame.extend([ICMPV6, 255]); // a hop limit below 255 would be refused as not from this link
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

fn ethernet(destination: Mac, source: Mac, protocol: u16) -> Vec<u8> {
    [&destination[..], &source, &protocol.to_be_bytes()].concat()
}

/// The Internet checksum over the pseudo-header of RFC 8200, section 8.1, and the message.
fn icmpv6_checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let length = (message.len() as u32).to_be_bytes();
    let pseudo = [&source.octets()[..], &destination.octets(), &length, &[0, 0, 0, ICMPV6]].concat();
    let words = pseudo.chunks(2).chain(message.chunks(2));
    let sum: u32 = words.map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 9];

    #[test]
    fn both_arp_forms_name_the_address_twice() {
        let frames = frames("192.0.2.7".parse().unwrap(), MAC);
        assert_eq!(frames.len(), 2);
        for (frame, operation) in frames.iter().zip([1, 2]) {
            assert_eq!(frame.len(), 42);
            assert_eq!((&frame[..6], &frame[6..12], &frame[12..14]), (&BROADCAST[..], &MAC[..], &[8, 6][..]));
            assert_eq!((frame[21], &frame[22..28]), (operation, &MAC[..]));
            assert_eq!((&frame[28..32], &frame[38..42]), (&[192, 0, 2, 7][..], &[192, 0, 2, 7][..]));
        }
    }

    #[test]
    fn an_advertisement_has_a_valid_checksum_and_the_override_flag() {
        let address: Ipv6Addr = "2001:db8::7".parse().unwrap();
        let frames = frames(address.into(), MAC);
        let message = &frames[0][14 + 40..];
        assert_eq!((message[0], message[4], &message[26..32]), (136, 0x20, &MAC[..]));
        // Over a message with a right checksum in it the sum is zero.
        assert_eq!(icmpv6_checksum(address, ALL_NODES, message), 0);
    }
}
