//! A split virtqueue, bare: every field can be written, also wrongly (virtio 1.2, 2.7).

use core::sync::atomic::{Ordering, fence};

use super::device::VirtioDevice;
use crate::memory::{PAGE, Shared};

/// Descriptor flags.
pub const NEXT: u16 = 1;
/// The device writes this one.
pub const WRITE: u16 = 2;
/// It holds a table of descriptors.
pub const INDIRECT: u16 = 4;

/// The size of a descriptor in a table.
pub const DESCRIPTOR_SIZE: usize = 16;

/// One descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    /// The buffer's guest-physical address.
    pub address: u64,
    /// Its length in bytes.
    pub length: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The next one's index, with [`NEXT`].
    pub next: u16,
}

impl Descriptor {
    /// A buffer by itself.
    pub fn new(address: u64, length: u32, flags: u16) -> Self {
        Self {
            address,
            length,
            flags,
            next: 0,
        }
    }

    /// The same one, chained to another.
    pub fn then(self, next: u16) -> Self {
        Self {
            flags: self.flags | NEXT,
            next,
            ..self
        }
    }

    /// Writes it as entry `index` of a table.
    pub fn put(self, table: &mut Shared, index: u16) {
        let base = usize::from(index) * DESCRIPTOR_SIZE;
        table.write(base, self.address);
        table.write(base + 8, self.length);
        table.write(base + 12, self.flags);
        table.write(base + 14, self.next);
    }
}

/// The three areas of a queue, each on pages of its own, and how far both sides are.
#[derive(Debug)]
pub struct Ring {
    /// The queue's index in the device.
    pub queue: u16,
    /// How many descriptors it has.
    pub size: u16,
    /// The descriptor table.
    pub table: Shared,
    available: Shared,
    used: Shared,
    next_available: u16,
    next_used: u16,
}

impl Ring {
    /// A ring of `size` descriptors for a queue of the device.
    pub fn new(queue: u16, size: u16) -> Self {
        let entries = usize::from(size);
        Self {
            queue,
            size,
            table: Shared::new(entries * DESCRIPTOR_SIZE),
            available: Shared::new(entries * 2 + 6),
            used: Shared::new(entries * 8 + PAGE),
            next_available: 0,
            next_used: 0,
        }
    }

    /// The addresses of descriptor table, available ring and used ring.
    pub fn areas(&self) -> [u64; 3] {
        [
            self.table.address(),
            self.available.address(),
            self.used.address(),
        ]
    }

    /// Gives the device its address, and makes it ready.
    pub fn enable(&self, nic: VirtioDevice) {
        configure(nic, self.queue, self.size.into(), self.areas());
        nic.set_queue_ready(1);
    }

    /// Writes descriptor `index`.
    pub fn describe(&mut self, index: u16, descriptor: Descriptor) {
        descriptor.put(&mut self.table, index);
    }

    /// Makes the chain at `head` available. The device may not know until it is notified.
    pub fn offer(&mut self, head: u16) {
        let slot = self.next_available % self.size;
        self.available.write(4 + 2 * usize::from(slot), head);
        self.set_available(self.next_available.wrapping_add(1));
    }

    /// Makes a chain of these descriptors available, from descriptor 0 on.
    pub fn offer_chain(&mut self, chain: &[Descriptor]) {
        let last = chain.len() - 1;
        for (index, descriptor) in (0..).zip(chain) {
            let linked = match usize::from(index) < last {
                true => descriptor.then(index + 1),
                false => *descriptor,
            };
            self.describe(index, linked);
        }
        self.offer(0);
    }

    /// Sets the available index, to any value.
    pub fn set_available(&mut self, index: u16) {
        fence(Ordering::SeqCst);
        self.available.write(2, index);
        self.next_available = index;
        fence(Ordering::SeqCst);
    }

    /// Sets the used index at which the device shall interrupt, with EVENT_IDX.
    pub fn set_used_event(&mut self, index: u16) {
        self.available.write(4 + 2 * usize::from(self.size), index);
    }

    /// The available index at which the device wants to be notified, with EVENT_IDX.
    pub fn available_event(&self) -> u16 {
        self.used.read(4 + 8 * usize::from(self.size))
    }

    /// Whether the device wants to be notified of the last `offered` chains, with EVENT_IDX (virtio
    /// 1.2, 2.7.10).
    pub fn wants_notification(&self, offered: u16) -> bool {
        let since_event = self.next_available.wrapping_sub(self.available_event());
        since_event.wrapping_sub(1) < offered
    }

    /// Whether a used chain waits to be taken.
    pub fn has_used(&self) -> bool {
        self.used.read::<u16>(2) != self.next_used
    }

    /// Takes the next used chain: its head, and how much the device wrote.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        fence(Ordering::SeqCst);
        let entry = 4 + 8 * usize::from(self.next_used % self.size);
        self.next_used = self.next_used.wrapping_add(1);
        Some((
            self.used.read::<u32>(entry) as u16,
            self.used.read(entry + 4),
        ))
    }

    /// How many chains were ever taken back.
    pub fn taken(&self) -> u16 {
        self.next_used
    }
}

/// Describes a queue to the device, rightly or not, without making it ready.
pub fn configure(nic: VirtioDevice, queue: u16, size: u32, areas: [u64; 3]) {
    nic.select_queue(queue.into());
    nic.set_queue_size(size);
    nic.set_queue_areas(areas);
}
