//! What is special to a NIC, and its bring-up by hand (virtio 1.2, 5.1 and 3.1.1).

use super::device::VirtioDevice;
pub use super::device::{go, negotiate, queue_size};
use super::ring::Ring;

/// The receive and transmit queues of the first pair.
pub const RX: u16 = 0;
/// See [`RX`].
pub const TX: u16 = 1;

/// The size of the header before each frame.
pub const HEADER: usize = 12;

/// Feature bits.
pub mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const MQ: u64 = 1 << 22;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
    /// What a driver without offloads takes.
    pub const PLAIN: u64 = VERSION_1 | MAC | STATUS | MTU;
    /// What this guest can do with offloads.
    pub const OFFLOADS: u64 =
        PLAIN | CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6 | MRG_RXBUF;
}

/// The flag that asks for a checksum, in a [`Header`].
pub const NEEDS_CSUM: u8 = 1;
/// TCP over IPv4, in a [`Header`].
pub const GSO_TCPV4: u8 = 1;
/// TCP over IPv6, in a [`Header`].
pub const GSO_TCPV6: u8 = 4;

/// The header before each frame (virtio 1.2, 5.1.6).
#[derive(Clone, Copy, Debug, Default)]
pub struct Header {
    pub flags: u8,
    pub gso_type: u8,
    pub hdr_len: u16,
    pub gso_size: u16,
    pub csum_start: u16,
    pub csum_offset: u16,
    pub num_buffers: u16,
}

impl Header {
    /// As it lies in memory.
    pub fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        (bytes[0], bytes[1]) = (self.flags, self.gso_type);
        let words = [
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
            self.num_buffers,
        ];
        for (place, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// The parts of the configuration that are read here.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Its address.
    pub mac: [u8; 6],
    /// Bit 0: the link is up.
    pub status: u16,
    /// How many queue pairs there are.
    pub pairs: u16,
    /// The largest IP packet, where offered.
    pub mtu: u16,
}

impl Config {
    /// Reads it.
    pub fn read(nic: VirtioDevice) -> Self {
        Self {
            mac: core::array::from_fn(|n| nic.config(n as u64)),
            status: nic.config(6),
            pairs: nic.config(8),
            mtu: nic.config(10),
        }
    }
}

/// Brings the device up with two rings of at most `limit` descriptors each: receive, transmit.
pub fn bring_up(
    nic: VirtioDevice,
    wanted: u64,
    limit: u16,
) -> Result<(u64, Ring, Ring), &'static str> {
    let features = negotiate(nic, wanted)?;
    let rx = Ring::new(RX, queue_size(nic, RX, limit)?);
    let tx = Ring::new(TX, queue_size(nic, TX, limit)?);
    rx.enable(nic);
    tx.enable(nic);
    go(nic);
    Ok((features, rx, tx))
}
