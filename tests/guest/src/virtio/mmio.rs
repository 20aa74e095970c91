//! A virtio-mmio window (virtio 1.2, 4.2.2).

use alloc::vec::Vec;

use super::Kind;
use crate::region::Region;

/// Where a machine has its windows.
struct Windows {
    first: u64,
    count: u64,
    size: u64,
    /// The line of the IOAPIC that the first window's device uses; the others follow.
    first_line: u32,
}

const MINIVMM: Windows = Windows {
    first: 0xd000_0000,
    count: 18,
    size: WINDOW_SIZE,
    first_line: 6,
};
/// QEMU's microvm without a second IOAPIC.
const MICROVM: Windows = Windows {
    first: 0xfeb0_0000,
    count: 8,
    size: 0x200,
    first_line: 5,
};
/// The size of minivmm's windows, in bytes.
pub const WINDOW_SIZE: u64 = 0x1000;

/// "virt", what a window begins with.
pub const MAGIC_VALUE: u32 = 0x7472_6976;

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

/// One device's window.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Its registers.
    pub registers: Region,
    /// The line of the IOAPIC that its device raises.
    pub line: u32,
}

impl Window {
    /// minivmm's windows that hold a device of this kind, by address.
    pub fn all(kind: Kind) -> Vec<Self> {
        MINIVMM.devices(kind)
    }

    /// The same for QEMU's microvm.
    pub fn all_of_microvm(kind: Kind) -> Vec<Self> {
        MICROVM.devices(kind)
    }
}

impl Windows {
    fn devices(&self, kind: Kind) -> Vec<Window> {
        (0..self.count)
            .map(|n| Window {
                registers: Region {
                    base: self.first + n * self.size,
                    size: self.size,
                },
                line: self.first_line + n as u32,
            })
            .filter(|window| window.registers.read::<u32>(at::MAGIC) == MAGIC_VALUE)
            .filter(|window| window.registers.read::<u32>(at::DEVICE_ID) == kind as u32)
            .collect()
    }
}
