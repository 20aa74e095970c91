//! The features of the network device, and what they mean to the tap behind it.

use bitflags::bitflags;
use virtio_bindings::{virtio_net, virtio_ring};

bitflags! {
    /// The feature bits that the network device may offer (virtio 1.2, 5.1.3 and 6).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// The device takes frames with a partial checksum.
        const CSUM = 1 << virtio_net::VIRTIO_NET_F_CSUM;
        /// The driver takes frames with a partial checksum.
        const GUEST_CSUM = 1 << virtio_net::VIRTIO_NET_F_GUEST_CSUM;
        /// The device tells the MTU.
        const MTU = 1 << virtio_net::VIRTIO_NET_F_MTU;
        /// The device tells the MAC address.
        const MAC = 1 << virtio_net::VIRTIO_NET_F_MAC;
        /// The driver takes TCP/IPv4 segments larger than the MTU.
        const GUEST_TSO4 = 1 << virtio_net::VIRTIO_NET_F_GUEST_TSO4;
        /// The driver takes TCP/IPv6 segments larger than the MTU.
        const GUEST_TSO6 = 1 << virtio_net::VIRTIO_NET_F_GUEST_TSO6;
        /// The device takes TCP/IPv4 segments larger than the MTU.
        const HOST_TSO4 = 1 << virtio_net::VIRTIO_NET_F_HOST_TSO4;
        /// The device takes TCP/IPv6 segments larger than the MTU.
        const HOST_TSO6 = 1 << virtio_net::VIRTIO_NET_F_HOST_TSO6;
        /// A received frame may span several chains.
        const MRG_RXBUF = 1 << virtio_net::VIRTIO_NET_F_MRG_RXBUF;
        /// There is a control queue.
        const CTRL_VQ = 1 << virtio_net::VIRTIO_NET_F_CTRL_VQ;
        /// There are several queue pairs.
        const MQ = 1 << virtio_net::VIRTIO_NET_F_MQ;
        /// The device tells the link's status.
        const STATUS = 1 << virtio_net::VIRTIO_NET_F_STATUS;
        /// A descriptor may point to a table of descriptors.
        const INDIRECT_DESC = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
        /// Both sides say at which index they want to be notified.
        const EVENT_IDX = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
    }
}

bitflags! {
    /// What a tap may leave to the reader of its frames (TUNSETOFFLOAD, linux/if_tun.h).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// Checksums. Without it the kernel ignores the others.
        const CSUM = 0x01;
        /// Segmentation of TCP/IPv4.
        const TSO4 = 0x02;
        /// Segmentation of TCP/IPv6.
        const TSO6 = 0x04;
    }
}

impl Features {
    /// The offloads of the tap under a driver that took these features: what the *driver* does
    /// for frames that it receives. What the device does for frames that the driver sends needs no
    /// setting, since each frame's header says it.
    pub fn offloads(self) -> Offloads {
        // The guest segmentation features depend on GUEST_CSUM (virtio 1.2, 5.1.3.1); a driver
        // that takes them without it gets none.
        if !self.contains(Features::GUEST_CSUM) {
            return Offloads::empty();
        }
        let mut offloads = Offloads::CSUM;
        offloads.set(Offloads::TSO4, self.contains(Features::GUEST_TSO4));
        offloads.set(Offloads::TSO6, self.contains(Features::GUEST_TSO6));
        offloads
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_follow_the_guest_features() {
        const CSUM: Features = Features::GUEST_CSUM;
        const TSO4: Features = Features::GUEST_TSO4;
        const TSO6: Features = Features::GUEST_TSO6;
        for (features, offloads) in [
            (Features::empty(), Offloads::empty()),
            (CSUM, Offloads::CSUM),
            (CSUM | TSO4, Offloads::CSUM | Offloads::TSO4),
            (CSUM | TSO6, Offloads::CSUM | Offloads::TSO6),
            (CSUM | TSO4 | TSO6, Offloads::all()),
            (TSO4 | TSO6, Offloads::empty()),
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
}
