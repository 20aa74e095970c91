//! Which frames lead to the host's loopback, where services listen that are not for the network.
//!
//! passt forwards what a frame carries by a socket to the same destination. To an address of the loopback, or to
//! none, which means the loopback too, no kernel sends a frame: only a hostile guest does.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Bytes of a frame that show its destination: Ethernet's header and the longer one of IP's, that of IPv6.
pub(super) const JUDGED: usize = ETHERNET + 40;

const ETHERNET: usize = 14;
// Ethernet types (IEEE 802). passt looks at the type right after the addresses alone: a frame with a VLAN's tag is
// of no type that it knows.
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];

/// Whether a frame, of which the first [`JUDGED`] bytes are here, has such a destination.
pub(super) fn is_to_loopback(frame: &[u8]) -> bool {
    let Some((ethernet, packet)) = frame.split_first_chunk::<ETHERNET>() else {
        return false;
    };
    match [ethernet[12], ethernet[13]] {
        IPV4 => address(packet, 16).is_some_and(|to| is_loopback_v4(to.into())),
        IPV6 => address(packet, 24).is_some_and(|to| is_loopback_v6(to.into())),
        _ => false,
    }
}

/// The address at this offset of a packet that is long enough.
fn address<const N: usize>(packet: &[u8], at: usize) -> Option<[u8; N]> {
    packet.get(at..)?.first_chunk().copied()
}

/// 127.0.0.0/8, and 0.0.0.0/8 (RFC 6890).
fn is_loopback_v4(to: Ipv4Addr) -> bool {
    to.is_loopback() || to.octets()[0] == 0
}

/// The same for IPv6, by which a socket reaches IPv4 too (RFC 4291, 2.5.5.2).
fn is_loopback_v6(to: Ipv6Addr) -> bool {
    to.is_loopback() || to.is_unspecified() || to.to_ipv4_mapped().is_some_and(is_loopback_v4)
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::IpAddr;

    use super::*;

    /// A frame of `len` bytes to this address, of UDP.
    pub fn frame_to(to: &str, len: usize) -> Vec<u8> {
        let mut frame = vec![0x11; len];
        let (kind, at, to) = match to.parse().unwrap() {
            IpAddr::V4(to) => (IPV4, 16, to.octets().to_vec()),
            IpAddr::V6(to) => (IPV6, 24, to.octets().to_vec()),
        };
        frame[12..ETHERNET].copy_from_slice(&kind);
        frame[ETHERNET + at..][..to.len()].copy_from_slice(&to);
        frame
    }

    #[test]
    fn addresses_of_the_loopback_are_known() {
        for to in [
            "127.0.0.1",
            "127.255.255.254",
            "0.0.0.0",
            "0.0.0.1",
            "::1",
            "::",
            "::ffff:127.0.0.1",
            "::ffff:0.0.0.0",
        ] {
            assert!(is_to_loopback(&frame_to(to, JUDGED)), "{to}");
        }
        for to in [
            "10.0.2.2",
            "126.255.255.255",
            "128.0.0.1",
            "169.254.169.254",
            "255.255.255.255",
            "224.0.0.251",
            "fe80::1",
            "ff02::1",
            "::2",
            "1::1",
            "::ffff:10.0.2.2",
        ] {
            assert!(!is_to_loopback(&frame_to(to, JUDGED)), "{to}");
        }
    }

    #[test]
    fn frames_without_an_address_are_not_judged() {
        let mut arp = frame_to("127.0.0.1", JUDGED);
        arp[13] = 0x06;
        assert!(!is_to_loopback(&arp));
        for to in ["127.0.0.1", "::1"] {
            let frame = frame_to(to, JUDGED);
            let end = if to.contains(':') {
                JUDGED
            } else {
                ETHERNET + 20
            };
            assert!(is_to_loopback(&frame[..end]));
            for len in 0..end {
                assert!(!is_to_loopback(&frame[..len]));
            }
        }
    }
}
