//! The features of the network device, and what they mean to its backend.

use bitflags::bitflags;
use serde::{Deserialize, Serialize};
use virtio_bindings::{virtio_net, virtio_ring};

bitflags! {
    /// The feature bits that the network device may offer (virtio 1.2, 5.1.3 and 6).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// The device takes frames with a partial checksum.
        const CSUM = 1 << virtio_net::VIRTIO_NET_F_CSUM;
        /// The driver takes frames with a partial checksum.
        const GUEST_CSUM = 1 << virtio_net::VIRTIO_NET_F_GUEST_CSUM;
        /// The driver may change at run time what it takes.
        const CTRL_GUEST_OFFLOADS = 1 << virtio_net::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
        /// The device shows the MTU.
        const MTU = 1 << virtio_net::VIRTIO_NET_F_MTU;
        /// The device shows the MAC address.
        const MAC = 1 << virtio_net::VIRTIO_NET_F_MAC;
        /// The driver takes TCP/IPv4 segments larger than the MTU.
        const GUEST_TSO4 = 1 << virtio_net::VIRTIO_NET_F_GUEST_TSO4;
        /// The driver takes TCP/IPv6 segments larger than the MTU.
        const GUEST_TSO6 = 1 << virtio_net::VIRTIO_NET_F_GUEST_TSO6;
        /// The driver takes TCP segments with explicit congestion notification.
        const GUEST_ECN = 1 << virtio_net::VIRTIO_NET_F_GUEST_ECN;
        /// The driver takes UDP datagrams that are still to be fragmented.
        const GUEST_UFO = 1 << virtio_net::VIRTIO_NET_F_GUEST_UFO;
        /// The device takes TCP/IPv4 segments larger than the MTU.
        const HOST_TSO4 = 1 << virtio_net::VIRTIO_NET_F_HOST_TSO4;
        /// The device takes TCP/IPv6 segments larger than the MTU.
        const HOST_TSO6 = 1 << virtio_net::VIRTIO_NET_F_HOST_TSO6;
        /// The device takes TCP segments with explicit congestion notification.
        const HOST_ECN = 1 << virtio_net::VIRTIO_NET_F_HOST_ECN;
        /// The device takes UDP datagrams that are still to be fragmented.
        const HOST_UFO = 1 << virtio_net::VIRTIO_NET_F_HOST_UFO;
        /// A received frame may span several chains.
        const MRG_RXBUF = 1 << virtio_net::VIRTIO_NET_F_MRG_RXBUF;
        /// There is a control queue.
        const CTRL_VQ = 1 << virtio_net::VIRTIO_NET_F_CTRL_VQ;
        /// The driver says which frames it wants to receive.
        const CTRL_RX = 1 << virtio_net::VIRTIO_NET_F_CTRL_RX;
        /// The driver says which VLANs it wants to receive.
        const CTRL_VLAN = 1 << virtio_net::VIRTIO_NET_F_CTRL_VLAN;
        /// The driver announces itself to the network when it is asked to.
        const GUEST_ANNOUNCE = 1 << virtio_net::VIRTIO_NET_F_GUEST_ANNOUNCE;
        /// There are several queue pairs.
        const MQ = 1 << virtio_net::VIRTIO_NET_F_MQ;
        /// The driver asks before it changes its MAC address.
        const CTRL_MAC_ADDR = 1 << virtio_net::VIRTIO_NET_F_CTRL_MAC_ADDR;
        /// The driver takes UDP/IPv4 datagrams that are still to be segmented.
        const GUEST_USO4 = 1 << virtio_net::VIRTIO_NET_F_GUEST_USO4;
        /// The driver takes UDP/IPv6 datagrams that are still to be segmented.
        const GUEST_USO6 = 1 << virtio_net::VIRTIO_NET_F_GUEST_USO6;
        /// The device takes UDP datagrams that are still to be segmented.
        const HOST_USO = 1 << virtio_net::VIRTIO_NET_F_HOST_USO;
        /// The device shows the link's status.
        const STATUS = 1 << virtio_net::VIRTIO_NET_F_STATUS;
        /// A descriptor may point to a table of descriptors.
        const INDIRECT_DESC = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
        /// Both sides say at which index they want to be notified.
        const EVENT_IDX = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
    }
}

bitflags! {
    /// What a tap may leave to the reader of its frames (TUNSETOFFLOAD, linux/if_tun.h).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    pub struct Offloads: u32 {
        /// Checksums. Without it the kernel ignores the others.
        const CSUM = libc::TUN_F_CSUM;
        /// Segmentation of TCP/IPv4.
        const TSO4 = libc::TUN_F_TSO4;
        /// Segmentation of TCP/IPv6.
        const TSO6 = libc::TUN_F_TSO6;
        /// Segmentation of TCP with explicit congestion notification.
        const TSO_ECN = libc::TUN_F_TSO_ECN;
        /// Fragmentation of UDP.
        const UFO = libc::TUN_F_UFO;
        /// Segmentation of UDP. The kernel takes its two bits together or not at all.
        const USO = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    }
}

impl Offloads {
    /// The offloads that every kernel with a usable macvtap knows.
    pub const USUAL: Self = Self::CSUM
        .union(Self::TSO4)
        .union(Self::TSO6)
        .union(Self::TSO_ECN);

    /// The features that take each offload, of the driver's side and of the device's.
    const FEATURES: [(Self, Features, Features); 6] = [
        (
            Self::CSUM,
            Features::GUEST_CSUM.union(Features::CTRL_GUEST_OFFLOADS),
            Features::CSUM,
        ),
        (Self::TSO4, Features::GUEST_TSO4, Features::HOST_TSO4),
        (Self::TSO6, Features::GUEST_TSO6, Features::HOST_TSO6),
        (Self::TSO_ECN, Features::GUEST_ECN, Features::HOST_ECN),
        (Self::UFO, Features::GUEST_UFO, Features::HOST_UFO),
        (
            Self::USO,
            Features::GUEST_USO4.union(Features::GUEST_USO6),
            Features::HOST_USO,
        ),
    ];
}

impl Features {
    /// The features that CTRL_GUEST_OFFLOADS switches: each bit is at once its own in the command
    /// (virtio 1.2, 5.1.6.5.6.1).
    pub const GUEST_OFFLOADS: Self = Self::GUEST_CSUM
        .union(Self::GUEST_TSO4)
        .union(Self::GUEST_TSO6)
        .union(Self::GUEST_ECN)
        .union(Self::GUEST_UFO)
        .union(Self::GUEST_USO4)
        .union(Self::GUEST_USO6);

    /// Everything that a device with so many queue pairs can do over a backend that leaves `received`
    /// to the reader of frames, and to which `sent` may be left.
    pub fn offered(pairs: usize, received: Offloads, sent: Offloads) -> Self {
        let mut features = Self::all();
        features.set(Self::MQ, pairs > 1);
        for (offload, drivers, devices) in Offloads::FEATURES {
            if !received.contains(offload) {
                features -= drivers;
            }
            if !sent.contains(offload) {
                features -= devices;
            }
        }
        features
    }

    /// The offloads of the tap under a driver that took these features: what the *driver* does
    /// for frames that it receives. What the device does for frames that the driver sends needs no
    /// setting, since each frame's header says it.
    pub fn offloads(self) -> Offloads {
        // All guest segmentation features depend on GUEST_CSUM, and GUEST_ECN on one of TCP's
        // (virtio 1.2, 5.1.3.1); a driver that takes them without it gets none.
        if !self.contains(Self::GUEST_CSUM) {
            return Offloads::empty();
        }
        let tcp = self.intersects(Self::GUEST_TSO4 | Self::GUEST_TSO6);
        let mut offloads = Offloads::CSUM;
        offloads.set(Offloads::TSO4, self.contains(Self::GUEST_TSO4));
        offloads.set(Offloads::TSO6, self.contains(Self::GUEST_TSO6));
        offloads.set(Offloads::TSO_ECN, tcp && self.contains(Self::GUEST_ECN));
        offloads.set(Offloads::UFO, self.contains(Self::GUEST_UFO));
        let uso = Self::GUEST_USO4 | Self::GUEST_USO6;
        offloads.set(Offloads::USO, self.contains(uso));
        offloads
    }
}

impl Offloads {
    /// The flags under which a received frame may reach a driver to which this is left, or `None`
    /// where it may not reach it at all (virtio 1.2, 5.1.6.4.1). `flags` and `gso_type` are those
    /// of its header.
    ///
    /// A tap says of any frame that its checksum has been checked. And what was queued for an
    /// earlier driver, or arrives while the tap's offloads change, may be left as that one took it.
    pub fn admit(self, flags: u8, gso_type: u8) -> Option<u8> {
        const NEEDS_CSUM: u8 = virtio_net::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
        const DATA_VALID: u8 = virtio_net::VIRTIO_NET_HDR_F_DATA_VALID as u8;
        const ECN: u8 = virtio_net::VIRTIO_NET_HDR_GSO_ECN as u8;
        let segments = match u32::from(gso_type & !ECN) {
            virtio_net::VIRTIO_NET_HDR_GSO_NONE => Self::empty(),
            virtio_net::VIRTIO_NET_HDR_GSO_TCPV4 => Self::TSO4,
            virtio_net::VIRTIO_NET_HDR_GSO_TCPV6 => Self::TSO6,
            virtio_net::VIRTIO_NET_HDR_GSO_UDP => Self::UFO,
            virtio_net::VIRTIO_NET_HDR_GSO_UDP_L4 => Self::USO,
            _ => return None,
        };
        let mut needed = segments;
        needed.set(Self::TSO_ECN, gso_type & ECN != 0);
        needed.set(Self::CSUM, flags & NEEDS_CSUM != 0 || gso_type != 0);
        let known = if self.contains(Self::CSUM) {
            NEEDS_CSUM | DATA_VALID
        } else {
            0
        };
        self.contains(needed).then_some(flags & known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_carries_what_was_negotiated_and_no_more() {
        const NONE: Features = Features::empty();
        const CSUM: Features = Features::GUEST_CSUM;
        const TSO4: Features = CSUM.union(Features::GUEST_TSO4);
        const TSO6: Features = CSUM.union(Features::GUEST_TSO6);
        const ECN: Features = Features::GUEST_ECN;
        const UFO: Features = CSUM.union(Features::GUEST_UFO);
        const USO4: Features = CSUM.union(Features::GUEST_USO4);
        const USO: Features = USO4.union(Features::GUEST_USO6);
        const ALL: Features = Features::all();
        // NEEDS_CSUM 1, DATA_VALID 2, RSC_INFO 4; TCPV4 1, UDP 3, TCPV6 4, UDP_L4 5, ECN 0x80.
        for (features, flags, gso_type, wanted) in [
            (NONE, 0, 0, Some(0)),
            (NONE, 1, 0, None),
            (NONE, 2, 0, Some(0)),
            (NONE, 3, 0, None),
            (NONE, 0xfc, 0, Some(0)),
            (NONE, 0, 1, None),
            (NONE, 0, 0x80, None),
            (ALL - CSUM, 2, 0, Some(0)),
            (ALL - CSUM, 1, 1, None),
            (CSUM, 0, 0, Some(0)),
            (CSUM, 1, 0, Some(1)),
            (CSUM, 2, 0, Some(2)),
            (CSUM, 7, 0, Some(3)),
            (CSUM, 1, 1, None),
            (CSUM, 1, 3, None),
            (CSUM, 1, 4, None),
            (CSUM, 1, 5, None),
            (TSO4, 1, 1, Some(1)),
            (TSO4, 1, 0x81, None),
            (TSO4, 1, 4, None),
            (TSO4 | ECN, 1, 0x81, Some(1)),
            (TSO6, 1, 4, Some(1)),
            (TSO6, 1, 1, None),
            (TSO6 | ECN, 3, 0x84, Some(3)),
            (CSUM | ECN, 1, 0x80, None),
            (UFO, 1, 3, Some(1)),
            (UFO, 1, 5, None),
            (USO, 1, 5, Some(1)),
            (USO, 1, 3, None),
            (USO4, 1, 5, None),
            (ALL, 1, 2, None),
            (ALL, 1, 6, None),
            (ALL, 1, 0x7f, None),
            (ALL, 0xff, 0x85, Some(3)),
        ] {
            let flags_then = features.offloads().admit(flags, gso_type);
            assert_eq!(flags_then, wanted, "{features:?} {flags:#x} {gso_type:#x}");
        }
    }

    #[test]
    fn offloads_follow_the_guest_features() {
        const CSUM: Features = Features::GUEST_CSUM;
        const TSO4: Features = Features::GUEST_TSO4;
        const TSO6: Features = Features::GUEST_TSO6;
        const ECN: Features = Features::GUEST_ECN;
        for (features, offloads) in [
            (Features::empty(), Offloads::empty()),
            (CSUM, Offloads::CSUM),
            (CSUM | TSO4, Offloads::CSUM | Offloads::TSO4),
            (CSUM | TSO6, Offloads::CSUM | Offloads::TSO6),
            (CSUM | TSO4 | TSO6 | ECN, Offloads::USUAL),
            (CSUM | ECN, Offloads::CSUM),
            (TSO4 | TSO6, Offloads::empty()),
            (CSUM | Features::GUEST_UFO, Offloads::CSUM | Offloads::UFO),
            (CSUM | Features::GUEST_USO4, Offloads::CSUM),
            (
                CSUM | Features::GUEST_USO4 | Features::GUEST_USO6,
                Offloads::CSUM | Offloads::USO,
            ),
            (Features::all() - CSUM, Offloads::empty()),
            (
                Features::CSUM | Features::HOST_TSO4 | Features::HOST_TSO6,
                Offloads::empty(),
            ),
            (Features::all(), Offloads::all()),
        ] {
            assert_eq!(features.offloads(), offloads, "{features:?}");
        }
    }

    #[test]
    fn features_that_the_backend_cannot_serve_are_not_offered() {
        let tap = |pairs, offloads| Features::offered(pairs, offloads, offloads);
        let all = tap(2, Offloads::all());
        assert_eq!(all, Features::all());
        assert_eq!(all - tap(1, Offloads::all()), Features::MQ);
        let usual = tap(2, Offloads::USUAL);
        assert!(usual.contains(Features::GUEST_ECN | Features::HOST_TSO6));
        assert!(!usual.intersects(Features::GUEST_UFO | Features::HOST_UFO | Features::HOST_USO));
        assert!(!usual.intersects(Features::GUEST_USO4 | Features::GUEST_USO6));
        // What is offered and taken is never more than what the tap can be set to.
        assert!(Offloads::USUAL.contains(usual.offloads()));
        // A stream's frames have whole checksums either way.
        let stream = Features::offered(1, Offloads::CSUM, Offloads::empty());
        assert_eq!(stream.offloads(), Offloads::CSUM);
        let needing = Features::CSUM | Features::HOST_TSO4 | Features::HOST_USO;
        assert!(!stream.intersects(needing | Features::GUEST_TSO4 | Features::MQ));
        let none = Features::offered(1, Offloads::empty(), Offloads::empty());
        assert!(!none.intersects(Features::GUEST_OFFLOADS | Features::CTRL_GUEST_OFFLOADS));
    }
}
