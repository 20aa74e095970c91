//! virtio by hand: a device's registers on either transport, rings, and the bring-up of a device
//! (virtio 1.2, 3 to 5).

pub mod blk;
pub mod by_crate;
pub mod device;
pub mod fs;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod ring;

/// Kinds of devices, by number (virtio 1.2, chapter 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Net = 1,
    Block = 2,
    Entropy = 4,
    Balloon = 5,
    Vsock = 19,
    FileSystem = 26,
}
