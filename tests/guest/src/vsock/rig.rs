//! The socket device, driven by hand: packets in and out (virtio 1.2, 5.10).

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use crate::cpu;
use crate::memory::Shared;
use crate::options::Options;
use crate::virtio::Kind;
use crate::virtio::device::{VirtioDevice, go, negotiate, queue_size};
use crate::virtio::net::feature::{EVENT_IDX, VERSION_1};
use crate::virtio::ring::{Descriptor, Ring, WRITE};

pub const REQUEST: u16 = 1;
pub const RESPONSE: u16 = 2;
pub const RST: u16 = 3;
pub const SHUTDOWN: u16 = 4;
pub const RW: u16 = 5;
pub const CREDIT_UPDATE: u16 = 6;
pub const CREDIT_REQUEST: u16 = 7;

/// Flags of [`SHUTDOWN`].
pub const NO_SEND: u32 = 2;
pub const CLOSED: u32 = 3;

/// The host's CID, and the type of a stream.
pub const HOST: u64 = 2;
pub const STREAM: u16 = 1;

/// Bytes of a header.
pub const HEADER: usize = 44;
/// Buffers to receive and to send, and their bytes: as Linux has them.
const RX_BUFFERS: u16 = 128;
const RX_ROOM: usize = 4096;
const TX_BUFFERS: u16 = 32;
const TX_ROOM: usize = HEADER + MAX_DATA;
/// The most data of a packet.
pub const MAX_DATA: usize = 64 << 10;

/// What is of interest in a packet's header.
#[derive(Clone, Copy, Debug, Default)]
pub struct Packet {
    /// The guest's port.
    pub port: u32,
    /// The host's.
    pub host: u32,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

/// The device and its queues.
pub struct Rig {
    device: VirtioDevice,
    /// The guest's address.
    pub cid: u64,
    rx: Ring,
    rx_buffers: Shared,
    tx: Ring,
    tx_buffers: Shared,
    tx_free: Vec<u16>,
    event: Ring,
    event_buffer: Shared,
    /// The line by which it interrupts, if it may.
    line: Option<u32>,
}

impl Rig {
    /// Brings the device up.
    pub fn start(options: &Options) -> Result<Self, &'static str> {
        let device = VirtioDevice::find(Kind::Vsock, options.index)?;
        negotiate(device, VERSION_1 | EVENT_IDX)?;
        let ring = |queue, limit| -> Result<Ring, &'static str> {
            let ring = Ring::new(queue, queue_size(device, queue, limit)?);
            ring.enable(device);
            Ok(ring)
        };
        let mut rig = Self {
            device,
            cid: device.config(0),
            rx: ring(0, RX_BUFFERS)?,
            rx_buffers: Shared::new(usize::from(RX_BUFFERS) * RX_ROOM),
            tx: ring(1, TX_BUFFERS)?,
            tx_buffers: Shared::new(usize::from(TX_BUFFERS) * TX_ROOM),
            tx_free: (0..TX_BUFFERS).collect(),
            event: ring(2, 1)?,
            event_buffer: Shared::new(8),
            line: None,
        };
        go(device);
        for index in 0..rig.rx.size {
            let address = rig.rx_buffers.address() + u64::from(index) * RX_ROOM as u64;
            rig.rx
                .describe(index, Descriptor::new(address, RX_ROOM as u32, WRITE));
            rig.rx.offer(index);
        }
        device.notify(0);
        let address = rig.event_buffer.address();
        rig.event.offer_chain(&[Descriptor::new(address, 8, WRITE)]);
        device.notify(2);
        if options.interrupts {
            device.enable_interrupts();
            device.enable_queue_interrupts(2);
            rig.line = Some(device.line());
        }
        Ok(rig)
    }

    /// With interrupts: halts until a packet or an event comes, unless there is one.
    pub fn sleep(&mut self) {
        let Some(line) = self.line else { return };
        let seen = cpu::interrupts(line);
        let rings = [&mut self.rx, &mut self.event];
        let is_idle = rings.into_iter().all(|ring| {
            ring.set_used_event(ring.taken());
            fence(Ordering::SeqCst);
            !ring.has_used()
        });
        if is_idle {
            cpu::halt_unless_interrupted(line, seen);
        }
    }

    /// The next packet, whose data go to `data`.
    pub fn receive(&mut self, data: &mut Vec<u8>) -> Option<Packet> {
        let (head, len) = self.rx.take()?;
        let at = usize::from(head) * RX_ROOM;
        let word = |offset| self.rx_buffers.read::<u32>(at + offset);
        let packet = Packet {
            host: word(16),
            port: word(20),
            op: (word(28) >> 16) as u16,
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        };
        let length = (word(24) as usize).min((len as usize).saturating_sub(HEADER));
        data.resize(length, 0);
        self.rx_buffers.get(at + HEADER, data);
        self.rx.offer(head);
        if self.rx.wants_notification(1) {
            self.device.notify(0);
        }
        Some(packet)
    }

    /// Whether the device says that all connections are gone. Once each time.
    pub fn is_reset(&mut self) -> bool {
        let is_reset = self.event.take().is_some();
        if is_reset {
            self.event.offer(0);
            self.device.notify(2);
        }
        is_reset
    }

    /// Whether a packet can be sent now.
    pub fn can_send(&mut self) -> bool {
        while let Some((head, _)) = self.tx.take() {
            self.tx_free.push(head);
        }
        !self.tx_free.is_empty()
    }

    /// Sends a packet, with data that `fill` writes. Waits for room, which comes.
    pub fn send(&mut self, packet: Packet, data: &[u8]) {
        while !self.can_send() {
            core::hint::spin_loop();
        }
        let Some(head) = self.tx_free.pop() else {
            return;
        };
        let at = usize::from(head) * TX_ROOM;
        let mut header = vec![0; HEADER];
        header[0..8].copy_from_slice(&self.cid.to_le_bytes());
        header[8..16].copy_from_slice(&HOST.to_le_bytes());
        let kind = u32::from(STREAM) | u32::from(packet.op) << 16;
        let words = [
            packet.port,
            packet.host,
            data.len() as u32,
            kind,
            packet.flags,
            packet.buf_alloc,
            packet.fwd_cnt,
        ];
        for (to, word) in header[16..].chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        self.tx_buffers.put(at, &header);
        self.tx_buffers.put(at + HEADER, data);
        let address = self.tx_buffers.address() + at as u64;
        let length = (HEADER + data.len()) as u32;
        self.tx.describe(head, Descriptor::new(address, length, 0));
        self.tx.offer(head);
        if self.tx.wants_notification(1) {
            self.device.notify(1);
        }
    }
}
