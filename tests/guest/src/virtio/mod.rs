//! virtio by hand: a card's registers on either transport, rings, and the bring-up of a NIC (virtio 1.2, 4 and 5.1).

pub mod card;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod ring;

/// The number of this kind of device (virtio 1.2, chapter 5).
const NETWORK_CARD: u32 = 1;
