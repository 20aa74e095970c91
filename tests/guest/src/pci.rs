//! The PCI bus: configuration space, by the enhanced mechanism and by ports (PCI Local Bus
//! Specification 3.0, 6.1 and
//! 3.2.2.3.2).

use core::sync::atomic::{AtomicU64, Ordering};

use crate::cpu;
use crate::region::Region;

/// Where minivmm has the configuration space of bus 0, as memory.
pub const ECAM: u64 = 0xe000_0000;
/// The vendor and device ids of QEMU's q35 chipset, which has it where a register of its own says.
const Q35: u32 = 0x29c0_8086;
const Q35_ECAM: u8 = 0x60;
/// How many devices fit on a bus.
pub const SLOTS: u8 = 32;
/// The size of a function's configuration space.
pub const CONFIG_SIZE: u64 = 4096;
/// The ports of the older mechanism: address and data.
pub const ADDRESS_PORT: u16 = 0xcf8;
/// See [`ADDRESS_PORT`].
pub const DATA_PORT: u16 = 0xcfc;

/// Offsets in configuration space.
pub mod at {
    pub const VENDOR: u64 = 0x00;
    pub const DEVICE: u64 = 0x02;
    pub const COMMAND: u64 = 0x04;
    pub const STATUS: u64 = 0x06;
    pub const REVISION: u64 = 0x08;
    /// The others follow.
    pub const BAR_0: u64 = 0x10;
    pub const CAPABILITIES: u64 = 0x34;
}

/// The command register: answer to the addresses of the BARs, and access memory and send messages.
pub const COMMAND_WORKING: u16 = 1 << 1 | 1 << 2;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// No more than fit.
const MAX_CAPABILITIES: usize = 48;

/// A function's place on bus 0, whether there is one or not.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    /// The device's number.
    pub slot: u8,
    /// Its configuration space.
    pub config: Region,
}

impl Function {
    /// Function `number` of the device with number `slot`.
    pub fn new(slot: u8, number: u8) -> Self {
        let index = u64::from(slot) * 8 + u64::from(number);
        let config = Region {
            base: ecam() + index * CONFIG_SIZE,
            size: CONFIG_SIZE,
        };
        Self { slot, config }
    }

    /// Its vendor and device ids; all ones where there is no function.
    pub fn ids(&self) -> (u16, u16) {
        (self.config.read(at::VENDOR), self.config.read(at::DEVICE))
    }

    /// Lets it answer to its BARs and access memory.
    pub fn enable(&self) {
        self.config.write(at::COMMAND, COMMAND_WORKING);
    }

    /// Its capabilities: what they are, and where.
    pub fn capabilities(&self) -> impl Iterator<Item = (u8, u64)> {
        let config = self.config;
        let link = move |offset: u64| {
            let next = u64::from(config.read::<u8>(offset) & !3);
            (next != 0).then_some(next)
        };
        let has_any = config.read::<u16>(at::STATUS) & STATUS_CAPABILITIES != 0;
        let first = has_any.then(|| link(at::CAPABILITIES)).flatten();
        core::iter::successors(first, move |offset| link(offset + 1))
            .take(MAX_CAPABILITIES)
            .map(move |offset| (config.read(offset), offset))
    }
}

/// Where this machine has the configuration space of bus 0.
pub fn ecam() -> u64 {
    static BASE: AtomicU64 = AtomicU64::new(0);
    let known = BASE.load(Ordering::Relaxed);
    if known != 0 {
        return known;
    }
    aim(0, 0, 0, 0);
    let base = match cpu::in32(DATA_PORT) {
        Q35 => {
            aim(0, 0, 0, Q35_ECAM);
            u64::from(cpu::in32(DATA_PORT) & 0xf000_0000)
        }
        _ => ECAM,
    };
    BASE.store(base, Ordering::Relaxed);
    base
}

/// Points the data port to a register, in the older mechanism.
pub fn aim(bus: u8, slot: u8, function: u8, register: u8) {
    const ENABLE: u32 = 1 << 31;
    let place = u32::from(bus) << 16 | u32::from(slot) << 11 | u32::from(function) << 8;
    cpu::out32(ADDRESS_PORT, ENABLE | place | u32::from(register & !3));
}
