//! The NIC driven by hand: checksum and segmentation offload both ways, merged receive buffers,
//! event indexes.
//!
//! Receive buffers are small, so that a large frame arrives in many. A frame is sent as two
//! descriptors, header and data.

use alloc::vec::Vec;
use core::num::NonZeroUsize;

use smoltcp::phy::{Checksum, DeviceCapabilities, PacketMeta};

use crate::memory::Shared;
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::{
    Config, GSO_TCPV4, GSO_TCPV6, HEADER, Header, NEEDS_CSUM, bring_up, feature,
};
use crate::virtio::ring::{Descriptor, Ring, WRITE};

const QUEUE_SIZE: u16 = 256;
const RX_BUFFER: usize = 2048;
/// The largest frame to send: a full IP packet, and its Ethernet header.
const TX_BUFFER: usize = 65_536;
/// The largest IP packet that the stack shall leave to the device to cut.
const SEGMENTABLE: usize = 60_000;
/// How many frames may be on their way out. Each has two descriptors.
const TX_FRAMES: u16 = 32;
const ETHERNET: usize = 14;

/// The NIC with its rings and buffers. Descriptor n of the receive ring always is buffer n.
pub struct OwnNic {
    nic: VirtioDevice,
    config: Config,
    features: u64,
    rx: Ring,
    tx: Ring,
    rx_buffers: Shared,
    tx_buffers: Shared,
    tx_headers: Shared,
    tx_free: Vec<u16>,
}

impl OwnNic {
    /// Brings the device up and gives it buffers to receive into.
    pub fn start(nic: VirtioDevice) -> Result<Self, &'static str> {
        let (features, rx, tx) = bring_up(nic, feature::OFFLOADS | feature::EVENT_IDX, QUEUE_SIZE)?;
        if features & feature::OFFLOADS != feature::OFFLOADS {
            return Err("the device does not offer every offload");
        }
        let mut nic = Self {
            nic,
            config: Config::read(nic),
            features,
            rx_buffers: Shared::new(usize::from(rx.size) * RX_BUFFER),
            tx_buffers: Shared::new(usize::from(TX_FRAMES) * TX_BUFFER),
            tx_headers: Shared::new(usize::from(TX_FRAMES) * HEADER),
            tx_free: (0..TX_FRAMES.min(tx.size / 2)).collect(),
            rx,
            tx,
        };
        for index in 0..nic.rx.size {
            let address = nic.rx_buffers.address() + u64::from(index) * RX_BUFFER as u64;
            nic.rx
                .describe(index, Descriptor::new(address, RX_BUFFER as u32, WRITE));
            nic.rx.offer(index);
        }
        nic.nic.notify(nic.rx.queue);
        Ok(nic)
    }

    /// Its address.
    pub fn mac(&self) -> [u8; 6] {
        self.config.mac
    }

    /// What the device spares the stack.
    pub fn add_capabilities(&self, capabilities: &mut DeviceCapabilities) {
        capabilities.checksum.tcp = Checksum::None;
        // What is received may have a partial checksum; what is sent gets a full one.
        capabilities.checksum.udp = Checksum::Tx;
        capabilities.segmentation.tcpv4 = NonZeroUsize::new(SEGMENTABLE);
        // Not tcpv6: smoltcp 0.14 drops every IPv6 packet above the MTU, also those that are to be
        // cut by the device.
    }

    /// The next received frame, gathered from its buffers.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        let (head, length) = self.next_used()?;
        let buffers: u16 = self
            .rx_buffers
            .read(usize::from(head) * RX_BUFFER + HEADER - 2);
        let mut frame = Vec::with_capacity(usize::from(buffers) * RX_BUFFER);
        self.gather(&mut frame, head, HEADER, length);
        for _ in 1..buffers {
            // The device publishes all buffers of a frame together.
            let (head, length) = self.next_used()?;
            self.gather(&mut frame, head, 0, length);
        }
        self.kick_rx(buffers);
        Some(frame)
    }

    /// Whether frames are on their way out, as of the last [`OwnNic::can_send`].
    pub fn is_sending(&self) -> bool {
        self.tx_free.len() < usize::from(TX_FRAMES.min(self.tx.size / 2))
    }

    /// Whether a frame can be sent now.
    pub fn can_send(&mut self) -> bool {
        while let Some((head, _)) = self.tx.take() {
            self.tx_free.push(head / 2);
        }
        // It polls: ask for no interrupts.
        self.tx.set_used_event(self.tx.taken().wrapping_add(0x8000));
        !self.tx_free.is_empty()
    }

    /// Sends a frame that `fill` writes. It is lost when there is no room, see
    /// [`OwnNic::can_send`].
    pub fn send<R>(
        &mut self,
        length: usize,
        meta: PacketMeta,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let mut frame = alloc::vec![0; length];
        let result = fill(&mut frame);
        let Some(slot) = self.tx_free.pop() else {
            return result;
        };
        let header = offload_header(
            &mut frame,
            meta.segmentation_offload_size.map_or(0, |size| size.get()),
        );
        let (header_at, frame_at) = (usize::from(slot) * HEADER, usize::from(slot) * TX_BUFFER);
        self.tx_headers.put(header_at, &header.bytes());
        self.tx_buffers.put(frame_at, &frame);
        let header = Descriptor::new(
            self.tx_headers.address() + header_at as u64,
            HEADER as u32,
            0,
        );
        let data = Descriptor::new(
            self.tx_buffers.address() + frame_at as u64,
            length as u32,
            0,
        );
        let head = slot * 2;
        self.tx.describe(head, header.then(head + 1));
        self.tx.describe(head + 1, data);
        self.tx.offer(head);
        kick(self.nic, self.features, &self.tx, 1);
        result
    }

    fn next_used(&mut self) -> Option<(u16, usize)> {
        let (head, length) = self.rx.take()?;
        assert!(
            head < self.rx.size,
            "the device used descriptor {head}, which was never offered"
        );
        Some((head, (length as usize).min(RX_BUFFER)))
    }

    /// Appends a buffer from byte `start` on to the frame and offers it to the device again.
    fn gather(&mut self, frame: &mut Vec<u8>, head: u16, start: usize, length: usize) {
        let from = frame.len();
        frame.resize(from + length.saturating_sub(start), 0);
        self.rx_buffers
            .get(usize::from(head) * RX_BUFFER + start, &mut frame[from..]);
        self.rx.offer(head);
    }

    fn kick_rx(&mut self, offered: u16) {
        self.rx.set_used_event(self.rx.taken().wrapping_add(0x8000));
        kick(self.nic, self.features, &self.rx, offered);
    }
}

/// Notifies the device of the last `offered` chains if it wants to know.
fn kick(nic: VirtioDevice, features: u64, ring: &Ring, offered: u16) {
    if features & feature::EVENT_IDX == 0 || ring.wants_notification(offered) {
        nic.notify(ring.queue);
    }
}

/// The header for a frame, which gets the sum of TCP's pseudo-header when the device is to finish
/// its checksum.
fn offload_header(frame: &mut [u8], segment: u16) -> Header {
    let Some((ip, tcp, gso_type)) = tcp_packet(frame) else {
        return Header::default();
    };
    let tcp_length = frame.len() - tcp;
    let pseudo_sum = match gso_type {
        GSO_TCPV4 => sum(&frame[ip + 12..ip + 20]),
        _ => sum(&frame[ip + 8..ip + 40]),
    } + 6
        + tcp_length as u32;
    frame[tcp + 16..tcp + 18].copy_from_slice(&fold(pseudo_sum).to_be_bytes());
    let header_length = tcp + usize::from(frame[tcp + 12] >> 4) * 4;
    let cut = segment != 0 && frame.len() - header_length > usize::from(segment);
    Header {
        flags: NEEDS_CSUM,
        gso_type: if cut { gso_type } else { 0 },
        hdr_len: header_length as u16,
        gso_size: if cut { segment } else { 0 },
        csum_start: tcp as u16,
        csum_offset: 16,
        num_buffers: 0,
    }
}

/// Where IP and TCP begin in a frame that has both, and how it is to be cut.
fn tcp_packet(frame: &[u8]) -> Option<(usize, usize, u8)> {
    const TCP: u8 = 6;
    match (
        frame.get(12..14)?,
        frame.get(ETHERNET + 9)?,
        frame.get(ETHERNET + 6)?,
    ) {
        ([0x08, 0x00], &TCP, _) => Some((
            ETHERNET,
            ETHERNET + usize::from(frame[ETHERNET] & 15) * 4,
            GSO_TCPV4,
        )),
        ([0x86, 0xdd], _, &TCP) => Some((ETHERNET, ETHERNET + 40, GSO_TCPV6)),
        _ => None,
    }
}

fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
