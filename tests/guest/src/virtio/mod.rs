//! virtio by hand: a NIC's registers on either transport, rings, and the bring-up of a NIC (virtio
//! 1.2, 4 and 5.1).

pub mod mmio;
pub mod net;
pub mod net_device;
pub mod pci;
pub mod ring;

/// The number of this kind of device (virtio 1.2, chapter 5).
const NETWORK_NIC: u32 = 1;
