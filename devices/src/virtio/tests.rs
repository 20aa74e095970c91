//! The driver's side of a virtqueue, written into guest memory by hand.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;
use super::queue::{Queue, QueueConfig};

/// Descriptors in the queue.
pub const SIZE: u16 = 16;
/// Guest memory: two regions that touch, and a hole behind them.
pub const REGION: u64 = 0x8_0000;
/// The end of guest memory.
pub const END: u64 = 2 * REGION;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;

/// A descriptor as the driver lays it out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub fn new(address: u64, len: u32, flags: u16, next: u16) -> Self {
        Self {
            address,
            len,
            flags,
            next,
        }
    }
}

/// A buffer of a chain: address, length, flags.
pub type Buffer = (u64, u32, u16);

/// A queue as the driver sees it.
#[derive(Debug)]
pub struct Driver {
    pub memory: Arc<GuestMemoryMmap>,
    available: u16,
    seen: u16,
}

impl Driver {
    pub fn new() -> Self {
        let ranges = [
            (GuestAddress(0), REGION as usize),
            (GuestAddress(REGION), REGION as usize),
        ];
        Self::on(Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()))
    }

    /// A driver that has offered nothing, with its rings in this memory.
    pub fn on(memory: Arc<GuestMemoryMmap>) -> Self {
        Self {
            memory,
            available: 0,
            seen: 0,
        }
    }

    pub fn config() -> QueueConfig {
        QueueConfig {
            size: SIZE,
            ready: true,
            descriptors: DESCRIPTORS,
            available: AVAILABLE,
            used: USED,
        }
    }

    pub fn queue(&self, event_idx: bool) -> Queue {
        Queue::new(&Self::config(), SIZE, event_idx, Arc::clone(&self.memory)).unwrap()
    }

    pub fn write_descriptor_at(&self, table: u64, index: u16, descriptor: Descriptor) {
        let at = GuestAddress(table + 16 * u64::from(index));
        let Descriptor {
            address,
            len,
            flags,
            next,
        } = descriptor;
        let tail = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.memory.write_obj(address, at).unwrap();
        self.memory.write_obj(tail, GuestAddress(at.0 + 8)).unwrap();
    }

    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.write_descriptor_at(DESCRIPTORS, index, descriptor);
    }

    /// Makes the chain that begins at `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available(self.available);
    }

    /// Lays out `descriptors` from `head` on as one chain and makes it available.
    pub fn offer_chain(&mut self, head: u16, descriptors: &[Buffer]) {
        for (n, &(address, len, flags)) in (0u16..).zip(descriptors) {
            let last = usize::from(n) + 1 == descriptors.len();
            let flags = if last { flags } else { flags | NEXT };
            self.write_descriptor(head + n, Descriptor::new(address, len, flags, head + n + 1));
        }
        self.offer(head);
    }

    /// Lays out `descriptors` in a table of their own at `table`, and makes the chain available that
    /// `head` leads to.
    pub fn offer_indirect(&mut self, head: u16, table: u64, descriptors: &[Buffer]) {
        for (n, &(address, len, flags)) in (0u16..).zip(descriptors) {
            let last = usize::from(n) + 1 == descriptors.len();
            let flags = if last { flags } else { flags | NEXT };
            self.write_descriptor_at(table, n, Descriptor::new(address, len, flags, n + 1));
        }
        let len = 16 * descriptors.len() as u32;
        self.write_descriptor(head, Descriptor::new(table, len, INDIRECT, 0));
        self.offer(head);
    }

    pub fn set_available(&self, index: u16) {
        self.memory
            .write_obj(index, GuestAddress(AVAILABLE + 2))
            .unwrap();
    }

    pub fn set_available_flags(&self, flags: u16) {
        self.memory
            .write_obj(flags, GuestAddress(AVAILABLE))
            .unwrap();
    }

    /// Asks for an interrupt when the used index passes `index` (EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        let at = AVAILABLE + 4 + 2 * u64::from(SIZE);
        self.memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// Of which chain the device wants to be notified (EVENT_IDX).
    pub fn available_event(&self) -> u16 {
        let at = USED + 4 + 8 * u64::from(SIZE);
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub fn used_index(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    /// The chains that the device gave back since the last call: head and length.
    pub fn take_used(&mut self) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        while self.seen != self.used_index() {
            let slot = USED + 4 + 8 * u64::from(self.seen % SIZE);
            let element: u64 = self.memory.read_obj(GuestAddress(slot)).unwrap();
            used.push((element as u16, (element >> 32) as u32));
            self.seen = self.seen.wrapping_add(1);
        }
        used
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}

/// Counts what a device says to its driver.
#[derive(Debug, Default)]
pub struct Recorder {
    pub interrupts: AtomicU32,
    pub config_changes: AtomicU32,
    pub needs_reset: AtomicBool,
}

impl Interrupt for Recorder {
    fn queue(&self, _index: u16) {
        self.interrupts.fetch_add(1, Ordering::SeqCst);
    }

    fn call_eventfd(&self, _index: u16) -> &EventFd {
        unreachable!("no unit test hands queues to the kernel")
    }

    fn config(&self) {
        self.config_changes.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
    }
}
