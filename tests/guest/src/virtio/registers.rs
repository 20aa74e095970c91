//! A virtio-mmio window and its registers (virtio 1.2, 4.2.2).

use alloc::vec::Vec;

use crate::memory::{Word, read_at, write_at};

/// Where minivmm's windows are: the first, how many, and the size of one.
const FIRST: u64 = 0xd000_0000;
const WINDOWS: u64 = 18;
/// The size of a window, in bytes.
pub const WINDOW_SIZE: u64 = 0x1000;
/// The line of the IOAPIC that the first window's device uses; the others follow.
const FIRST_LINE: u32 = 6;

const MAGIC_VALUE: u32 = 0x7472_6976;
const NETWORK_CARD: u32 = 1;

/// Offsets of the registers.
pub mod at {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// Bits of the status register (virtio 1.2, 2.1).
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
}

/// One device's window.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Its physical address.
    pub base: u64,
    /// The line of the IOAPIC that its device raises.
    pub line: u32,
}

impl Window {
    /// The windows that hold a network card, by address.
    pub fn network_cards() -> Vec<Self> {
        (0..WINDOWS)
            .map(|n| Self {
                base: FIRST + n * WINDOW_SIZE,
                line: FIRST_LINE + n as u32,
            })
            .filter(|window| window.read::<u32>(at::MAGIC) == MAGIC_VALUE)
            .filter(|window| window.read::<u32>(at::DEVICE_ID) == NETWORK_CARD)
            .collect()
    }

    /// The network card with this index.
    pub fn network_card(index: usize) -> Result<Self, &'static str> {
        Self::network_cards()
            .get(index)
            .copied()
            .ok_or("there is no such NIC")
    }

    /// Reads a register of any width.
    pub fn read<T: Word>(&self, offset: u64) -> T {
        // SAFETY: all of the window is mapped, is no RAM, and reading is at most an experiment on the device.
        unsafe { read_at(self.inside::<T>(offset)) }
    }

    /// Writes a register of any width.
    pub fn write<T: Word>(&self, offset: u64, value: T) {
        // SAFETY: all of the window is mapped and no RAM. What the device then does to memory is up to the rings,
        // which lie in `Shared` memory, or, in the hostile mode, to the monitor's care.
        unsafe { write_at(self.inside::<T>(offset), value) };
    }

    /// Writes an address into the two halves of a register.
    pub fn write_address(&self, offset: u64, address: u64) {
        self.write(offset, address as u32);
        self.write(offset + 4, (address >> 32) as u32);
    }

    /// All 64 bits of the features that the device offers.
    pub fn offered(&self) -> u64 {
        self.write(at::DEVICE_FEATURES_SEL, 0_u32);
        let low: u32 = self.read(at::DEVICE_FEATURES);
        self.write(at::DEVICE_FEATURES_SEL, 1_u32);
        let high: u32 = self.read(at::DEVICE_FEATURES);
        u64::from(high) << 32 | u64::from(low)
    }

    /// Accepts features.
    pub fn accept(&self, features: u64) {
        self.write(at::DRIVER_FEATURES_SEL, 0_u32);
        self.write(at::DRIVER_FEATURES, features as u32);
        self.write(at::DRIVER_FEATURES_SEL, 1_u32);
        self.write(at::DRIVER_FEATURES, (features >> 32) as u32);
    }

    /// Writes the status register.
    pub fn set_status(&self, status: u32) {
        self.write(at::STATUS, status);
    }

    /// Resets the device.
    pub fn reset(&self) {
        self.set_status(0);
    }

    /// Tells the device to look at a queue.
    pub fn notify(&self, queue: u16) {
        self.write(at::QUEUE_NOTIFY, u32::from(queue));
    }

    fn inside<T>(&self, offset: u64) -> u64 {
        assert!(
            offset + size_of::<T>() as u64 <= WINDOW_SIZE,
            "{offset:#x} is outside of the window"
        );
        self.base + offset
    }
}
