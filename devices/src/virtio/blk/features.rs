//! The features of the block device.

use bitflags::bitflags;
use virtio_bindings::{virtio_blk, virtio_ring};

use crate::virtio::VIRTIO_F_VERSION_1;

bitflags! {
    /// The feature bits that the block device may offer (virtio 1.2, 5.2.3 and 6).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// The device shows how many bytes a piece of data may have.
        const SIZE_MAX = 1 << virtio_blk::VIRTIO_BLK_F_SIZE_MAX;
        /// The device shows how many pieces of data a request may have.
        const SEG_MAX = 1 << virtio_blk::VIRTIO_BLK_F_SEG_MAX;
        /// The disk cannot be written.
        const RO = 1 << virtio_blk::VIRTIO_BLK_F_RO;
        /// The device shows its logical block size.
        const BLK_SIZE = 1 << virtio_blk::VIRTIO_BLK_F_BLK_SIZE;
        /// The driver flushes the write cache.
        const FLUSH = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;
        /// The device shows its physical block size.
        const TOPOLOGY = 1 << virtio_blk::VIRTIO_BLK_F_TOPOLOGY;
        /// The driver switches the write cache on and off.
        const CONFIG_WCE = 1 << virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;
        /// There are several queues.
        const MQ = 1 << virtio_blk::VIRTIO_BLK_F_MQ;
        /// The driver says what it does not need any more.
        const DISCARD = 1 << virtio_blk::VIRTIO_BLK_F_DISCARD;
        /// The driver has ranges made zeros without sending them.
        const WRITE_ZEROES = 1 << virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES;
        /// A descriptor may point to a table of descriptors.
        const INDIRECT_DESC = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
        /// Notifications name the index at which they are wanted.
        const EVENT_IDX = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
        /// virtio 1.0 or later.
        const VERSION_1 = VIRTIO_F_VERSION_1;
    }
}

impl Features {
    /// What a disk with so many queues offers.
    pub fn offered(queues: u16, readonly: bool) -> Self {
        let mut features = Self::all();
        features.set(Self::MQ, queues > 1);
        features.set(Self::RO, readonly);
        if readonly {
            features -= Self::DISCARD | Self::WRITE_ZEROES;
        }
        features
    }

    /// Whether a driver that took these knows of the write cache, so that a write may complete
    /// before it is durable (virtio 1.2, 5.2.5.2). `wanted` is what a driver that can choose has
    /// chosen.
    pub fn writeback(self, wanted: bool) -> bool {
        match self.contains(Self::CONFIG_WCE) {
            true => wanted,
            false => self.contains(Self::FLUSH),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readonly_disk_offers_nothing_that_writes() {
        let offered = Features::offered(1, true);
        assert!(offered.contains(Features::RO | Features::FLUSH));
        assert!(!offered.intersects(Features::DISCARD | Features::WRITE_ZEROES | Features::MQ));
        assert!(Features::offered(2, false).contains(Features::MQ | Features::DISCARD));
    }

    #[test]
    fn driver_that_knows_no_write_cache_has_none() {
        for (features, wanted, writeback) in [
            (Features::empty(), true, false),
            (Features::FLUSH, false, true),
            (Features::FLUSH | Features::CONFIG_WCE, false, false),
            (Features::FLUSH | Features::CONFIG_WCE, true, true),
        ] {
            assert_eq!(features.writeback(wanted), writeback, "{features:?}");
        }
    }
}
