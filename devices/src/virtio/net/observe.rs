//! What a guest's own frames show of it: the addresses it uses, and whether it uses its MAC.
//!
//! A macvtap delivers to its guest what is sent to the MAC address of the macvtap. A guest that
//! sends from another one reaches all and gets no answer, which is hard to see from
//! inside. So each frame that a guest sends is looked at: its source address always, its content
//! only where a protocol says which address the sender has (ARP, IPv6 neighbour discovery, DHCP).

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::backend::HEADER_LEN;
use super::config::ConfigSpace;
use crate::virtio::iovec;

/// Addresses that are remembered for one guest, the latest. A guest can make up any number.
const MAX_ADDRESSES: usize = 16;
/// As much of a frame as has to be seen: Ethernet, IPv6 and ICMPv6 up to a neighbour's address,
/// or Ethernet, IPv4, UDP and DHCP up to the client's address.
const LOOK_LEN: usize = 14 + 40 + 24;

const ETHERNET_LEN: usize = 14;
/// Offset of the protocol in an IPv4 header.
const IPV4_PROTOCOL: usize = 9;
/// Offset of the next header's kind in an IPv6 header.
const IPV6_NEXT_HEADER: usize = 6;
/// As much of every frame as is looked at.
const HEAD_LEN: usize = ETHERNET_LEN + IPV4_PROTOCOL + 1;
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const DHCP_CLIENT_PORT: u16 = 68;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// Watches what one guest sends. Shared between the thread that sends and whoever asks.
#[derive(Debug)]
pub struct Observer {
    /// The name in logs.
    name: String,
    /// Has the NIC's MAC address.
    config: Arc<ConfigSpace>,
    wrong_source: AtomicU64,
    learnt: Mutex<Learnt>,
    changed: EventFd,
}

/// What the guest has said of itself.
#[derive(Debug, Default)]
struct Learnt {
    addresses: VecDeque<IpAddr>,
    /// The addresses were not read since the last one that was new. A guest can make up a new one
    /// with each frame, and readers are not to be kept busy.
    is_signalled: bool,
}

impl Observer {
    /// Watches the guest whose NIC this is.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn new(name: String, config: Arc<ConfigSpace>) -> io::Result<Self> {
        Ok(Self {
            name,
            config,
            wrong_source: AtomicU64::new(0),
            learnt: Mutex::default(),
            changed: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Signalled when the guest has a new address, once until [`Observer::addresses`] is asked, or
    /// sends from a wrong one.
    pub fn changed(&self) -> &EventFd {
        &self.changed
    }

    /// The addresses that the guest has said it has, the oldest first.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let mut learnt = self.learnt.lock().unwrap_or_else(PoisonError::into_inner);
        learnt.is_signalled = false;
        learnt.addresses.iter().copied().collect()
    }

    /// Frames sent from another MAC address than the guest's own.
    pub fn wrong_source(&self) -> u64 {
        self.wrong_source.load(Ordering::Relaxed)
    }

    /// Looks at a frame with its virtio-net header, as it lies in `iovecs`.
    ///
    /// # Safety
    ///
    /// Each iovec must describe memory that may be read for as long as the call lasts.
    pub unsafe fn look(&self, iovecs: &[libc::iovec]) {
        let mut head = [0; HEAD_LEN];
        // SAFETY: as for this function.
        let len = unsafe { iovec::gather(iovecs, HEADER_LEN, &mut head) };
        // Most frames are of no interest, and end here.
        if !self.may_tell(&head[..len]) {
            return;
        }
        let mut frame = [0; LOOK_LEN];
        // SAFETY: as for this function.
        let len = unsafe { iovec::gather(iovecs, HEADER_LEN, &mut frame) };
        self.learn_from(&frame[..len]);
    }

    /// Looks at a frame, or as much of it as matters, without a virtio-net header.
    pub fn see(&self, frame: &[u8]) {
        if self.may_tell(&frame[..frame.len().min(HEAD_LEN)]) {
            self.learn_from(frame);
        }
    }

    /// Counts a wrong source, and says whether the rest of the frame may name an address.
    fn may_tell(&self, head: &[u8]) -> bool {
        if head.len() < ETHERNET_LEN {
            return false;
        }
        if head[6..12] != self.config.mac() {
            self.count_wrong_source(&head[6..12]);
        }
        let byte = |at: usize| head.get(ETHERNET_LEN + at).copied();
        match u16::from_be_bytes([head[12], head[13]]) {
            ARP => true,
            IPV4 => byte(IPV4_PROTOCOL) == Some(UDP),
            IPV6 => byte(IPV6_NEXT_HEADER) == Some(ICMPV6),
            _ => false,
        }
    }

    fn learn_from(&self, frame: &[u8]) {
        let Some((head, packet)) = frame.split_at_checked(ETHERNET_LEN) else {
            return;
        };
        let protocol = u16::from_be_bytes([head[12], head[13]]);
        if let Some(address) = own_address(protocol, packet) {
            self.learn(address);
        }
    }

    fn count_wrong_source(&self, source: &[u8]) {
        let before = self.wrong_source.fetch_add(1, Ordering::Relaxed);
        // Signalled when the count is 1, 2, 4, …: often enough, and never a flood.
        if (before + 1).is_power_of_two() {
            let _ = self.changed.write(1);
        }
        if before == 0 {
            log::warn!(
                "{}: the guest sends from {}, but its NIC is {}: no answer will reach it. \
                 Let the guest use its NIC's address, or give the NIC that address with mac=; \
                 more than one address takes mode=passthru",
                self.name,
                Mac(source),
                Mac(&self.config.mac()),
            );
        }
    }

    fn learn(&self, address: IpAddr) {
        let mut learnt = self.learnt.lock().unwrap_or_else(PoisonError::into_inner);
        if learnt.addresses.contains(&address) {
            return;
        }
        if learnt.addresses.len() == MAX_ADDRESSES {
            learnt.addresses.pop_front();
        }
        learnt.addresses.push_back(address);
        if !std::mem::replace(&mut learnt.is_signalled, true) {
            let _ = self.changed.write(1);
        }
    }
}

/// A MAC address, as one writes it.
pub(super) struct Mac<'a>(pub &'a [u8]);

impl std::fmt::Display for Mac<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (n, byte) in self.0.iter().enumerate() {
            let colon = if n == 0 { "" } else { ":" };
            write!(f, "{colon}{byte:02x}")?;
        }
        Ok(())
    }
}

/// The address that the sender of this packet says is its own.
fn own_address(protocol: u16, packet: &[u8]) -> Option<IpAddr> {
    let address = match protocol {
        ARP => IpAddr::V4(arp_sender(packet)?),
        IPV4 => IpAddr::V4(dhcp_client(packet)?),
        IPV6 => IpAddr::V6(neighbour(packet)?),
        _ => return None,
    };
    let none = address.is_unspecified() || address.is_multicast() || address.is_loopback();
    (!none).then_some(address)
}

fn bytes<const N: usize>(packet: &[u8], at: usize) -> Option<[u8; N]> {
    packet.get(at..at + N)?.try_into().ok()
}

/// The sender's protocol address of an ARP packet for IPv4 over Ethernet (RFC 826).
fn arp_sender(packet: &[u8]) -> Option<Ipv4Addr> {
    const ETHERNET_AND_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
    (packet.get(..6)? == ETHERNET_AND_IPV4).then_some(())?;
    bytes::<4>(packet, 14).map(Ipv4Addr::from)
}

/// The client address in a DHCP message (RFC 2131, `ciaddr`), which a client fills in once it has
/// one.
fn dhcp_client(packet: &[u8]) -> Option<Ipv4Addr> {
    const CIADDR: usize = 12;
    let header_len = usize::from(packet.first()? & 0xf) * 4;
    let from_client = *packet.get(IPV4_PROTOCOL)? == UDP
        && bytes::<2>(packet, header_len).map(u16::from_be_bytes) == Some(DHCP_CLIENT_PORT);
    from_client.then_some(())?;
    bytes::<4>(packet, header_len + 8 + CIADDR).map(Ipv4Addr::from)
}

/// The address that a neighbour discovery message (RFC 4861) says is its sender's: the target of
/// an advertisement, the source of a solicitation, or, where that one is for duplicate address
/// detection and has no source yet (RFC 4862, 5.4.2), its target.
fn neighbour(packet: &[u8]) -> Option<Ipv6Addr> {
    const HEADER_LEN: usize = 40;
    (*packet.get(IPV6_NEXT_HEADER)? == ICMPV6).then_some(())?;
    let source = bytes::<16>(packet, 8).map(Ipv6Addr::from)?;
    let target = bytes::<16>(packet, HEADER_LEN + 8).map(Ipv6Addr::from);
    match *packet.get(HEADER_LEN)? {
        NEIGHBOUR_SOLICITATION if !source.is_unspecified() => Some(source),
        NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT => target,
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::NetConfig;
    use super::*;
    use crate::events::EventSink;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn observer() -> Observer {
        let config = NetConfig {
            mac: MAC,
            mtu: 1500,
        };
        Observer::new(
            "net0".into(),
            Arc::new(ConfigSpace::new(config, 1, EventSink::default())),
        )
        .unwrap()
    }

    fn ethernet(source: [u8; 6], protocol: u16, packet: &[u8]) -> Vec<u8> {
        let header = [0; HEADER_LEN];
        [
            &header[..],
            &[0xff; 6],
            &source,
            &protocol.to_be_bytes(),
            packet,
        ]
        .concat()
    }

    /// Looks at a frame that is cut into pieces of `piece` bytes.
    fn look(observer: &Observer, frame: &[u8], piece: usize) {
        let iovecs: Vec<_> = frame
            .chunks(piece)
            .map(|chunk| libc::iovec {
                iov_base: chunk.as_ptr().cast_mut().cast(),
                iov_len: chunk.len(),
            })
            .collect();
        // SAFETY: the iovecs describe parts of `frame`.
        unsafe { observer.look(&iovecs) };
    }

    fn arp(sender: [u8; 4]) -> Vec<u8> {
        [&[0, 1, 8, 0, 6, 4, 0, 1][..], &MAC, &sender, &[0; 10]].concat()
    }

    fn icmpv6(kind: u8, source: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 24, ICMPV6, 255];
        packet.extend(source.octets());
        packet.extend([0xff; 16]);
        packet.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
        packet.extend(target.octets());
        packet
    }

    fn dhcp(client: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, UDP, 0, 0];
        packet.extend([0; 8]);
        packet.extend([0, 68, 0, 67, 0, 0, 0, 0]);
        packet.extend([1, 1, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        packet.extend(client);
        packet
    }

    #[test]
    fn addresses_are_learnt_from_what_a_sender_says_of_itself() {
        let a: Ipv6Addr = "fe80::1".parse().unwrap();
        let b: Ipv6Addr = "fd00::2".parse().unwrap();
        let none = Ipv6Addr::UNSPECIFIED;
        let cases: [(u16, Vec<u8>, Option<&str>); 9] = [
            (ARP, arp([10, 0, 0, 5]), Some("10.0.0.5")),
            (ARP, arp([0; 4]), None),
            (ARP, arp([10, 0, 0, 5])[..16].to_vec(), None),
            (IPV4, dhcp([10, 0, 0, 6]), Some("10.0.0.6")),
            (IPV4, dhcp([0; 4]), None),
            (IPV6, icmpv6(NEIGHBOUR_SOLICITATION, a, b), Some("fe80::1")),
            (
                IPV6,
                icmpv6(NEIGHBOUR_SOLICITATION, none, b),
                Some("fd00::2"),
            ),
            (IPV6, icmpv6(NEIGHBOUR_ADVERTISEMENT, a, b), Some("fd00::2")),
            (IPV6, icmpv6(128, a, b), None),
        ];
        for (protocol, packet, expected) in cases {
            for piece in [1, 7, 12, 26, 1000] {
                let observer = observer();
                look(&observer, &ethernet(MAC, protocol, &packet), piece);
                let learnt: Vec<_> = observer.addresses().iter().map(IpAddr::to_string).collect();
                assert_eq!(
                    learnt,
                    Vec::from_iter(expected),
                    "{protocol:#x} in {piece}s"
                );
                assert_eq!(observer.changed().read().is_ok(), expected.is_some());
                assert_eq!(observer.wrong_source(), 0);
            }
        }
    }

    #[test]
    fn addresses_are_told_once_and_bounded() {
        let observer = observer();
        for _ in 0..3 {
            look(&observer, &ethernet(MAC, ARP, &arp([10, 0, 0, 5])), 100);
        }
        assert_eq!(observer.changed().read().unwrap(), 1);
        assert_eq!(observer.addresses().len(), 1);
        for n in 0..100 {
            look(&observer, &ethernet(MAC, ARP, &arp([10, 0, 1, n])), 100);
        }
        assert_eq!(observer.changed().read().unwrap(), 1, "until they are read");
        assert_eq!(observer.addresses().len(), MAX_ADDRESSES);
        look(&observer, &ethernet(MAC, ARP, &arp([10, 0, 2, 1])), 100);
        assert_eq!(observer.changed().read().unwrap(), 1);
        assert_eq!(
            observer.addresses().last(),
            Some(&IpAddr::from([10, 0, 2, 1]))
        );
    }

    #[test]
    fn frames_from_another_mac_are_counted() {
        let observer = observer();
        for frame in [ethernet([9; 6], 0x1234, &[]), ethernet(MAC, 0x1234, &[])] {
            look(&observer, &frame, 100);
        }
        look(&observer, &[0; HEADER_LEN + 13], 100);
        assert_eq!(observer.wrong_source(), 1);
    }

    proptest::proptest! {
        #[test]
        fn no_frame_is_too_odd(frame: Vec<u8>, piece in 1..100usize) {
            look(&observer(), &frame, piece);
        }
    }
}
