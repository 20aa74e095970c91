//! Announces to the neighbours which NIC has an address now. Without it they would send to the old one until they ask
//! again, for a minute or so; and a deleted link receives nothing.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rustix::net::SendFlags;

use crate::listen::packet_socket;

type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
const ICMPV6: u8 = libc::IPPROTO_ICMPV6 as u8;

/// Announces that link `index` with address `mac` has these addresses. Needs CAP_NET_RAW; without it nothing is lost
/// but time.
pub(super) fn announce(index: u32, mac: Mac, addresses: impl IntoIterator<Item = IpAddr>) {
    let all = || {
        let socket = packet_socket(index, 0, &[])?;
        for address in addresses {
            let frame = match address {
                IpAddr::V4(ip) => arp_announcement(mac, ip),
                IpAddr::V6(ip) => neighbour_advertisement(mac, ip),
            };
            rustix::net::send(&socket, &frame, SendFlags::empty())?;
        }
        io::Result::Ok(())
    };
    if let Err(error) = all() {
        log::debug!("cannot announce addresses to the neighbours: {error}");
    }
}

/// An ARP request for one's own address, which all neighbours take notice of (RFC 5227, 2.3).
fn arp_announcement(mac: Mac, ip: Ipv4Addr) -> Vec<u8> {
    // Ethernet header; hardware type Ethernet, protocol IPv4, their address lengths, request.
    let head: [u8; 10] = [0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1];
    let sender = [&mac[..], &ip.octets()].concat();
    let target = [&[0; 6][..], &ip.octets()].concat();
    let mut frame = [&BROADCAST[..], &mac, &head, &sender, &target].concat();
    frame.resize(60, 0);
    frame
}

/// An unsolicited neighbour advertisement, to all nodes on the link (RFC 4861, 4.4 and 7.2.6).
fn neighbour_advertisement(mac: Mac, ip: Ipv6Addr) -> Vec<u8> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // Type 136 with its checksum still 0 and the override flag; then the option "target link-layer address".
    let start = [136, 0, 0, 0, 0x20, 0, 0, 0];
    let mut message = [&start[..], &ip.octets(), &[2, 1], &mac].concat();
    let length = message.len() as u8;
    let pseudo_header = [0, 0, 0, length, 0, 0, 0, ICMPV6];
    let addresses = [ip.octets(), all_nodes.octets()].concat();
    let sum = checksum(&[&addresses[..], &pseudo_header, &message].concat());
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    // Ethernet header with the group's MAC address; IPv6 header with hop limit 255.
    let group = [0x33, 0x33, 0, 0, 0, 1];
    let ethernet_and_ip = [0x86, 0xdd, 0x60, 0, 0, 0, 0, length, ICMPV6, 255];
    let head = [&group[..], &mac, &ethernet_and_ip].concat();
    [&head[..], &ip.octets(), &all_nodes.octets(), &message].concat()
}

/// RFC 1071, of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks_exact(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 7];

    #[test]
    fn announcement_asks_for_the_own_address() {
        let frame = arp_announcement(MAC, Ipv4Addr::new(192, 0, 2, 5));
        assert_eq!(frame.len(), 60);
        assert_eq!(
            (&frame[..6], &frame[6..12], &frame[12..14]),
            (&BROADCAST[..], &MAC[..], &[8, 6][..])
        );
        assert_eq!(
            (&frame[22..28], &frame[28..32], &frame[38..42]),
            (&MAC[..], &[192, 0, 2, 5][..], &[192, 0, 2, 5][..])
        );
    }

    #[test]
    fn advertisement_has_a_right_checksum() {
        let frame = neighbour_advertisement(MAC, "2001:db8::5".parse().unwrap());
        assert_eq!(frame.len(), 14 + 40 + 32);
        // With the checksum in place, the sum over everything is zero.
        let pseudo = [&frame[22..54], &[0, 0, 0, 32, 0, 0, 0, 58]].concat();
        assert_eq!(checksum(&[&pseudo, &frame[54..]].concat()), 0);
    }
}
