//! A virtio device on the PCI bus: where its structures are, and its MSI-X vectors (virtio 1.2,
//! 4.1; PCI Local Bus Specification 3.0, 6.8.2).

use alloc::vec::Vec;

use super::Kind;
use crate::memory::PAGE;
use crate::pci::{Function, SLOTS, at};
use crate::region::Region;

const VENDOR: u16 = 0x1af4;
/// The device id of a modern device is this and its virtio number.
const DEVICE_BASE: u16 = 0x1040;

/// Capabilities: of the vendor's own making, and MSI-X.
const VENDOR_SPECIFIC: u8 = 0x09;
const MSIX: u8 = 0x11;

/// The kinds of structures that a capability of the vendor's points to.
mod kind {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
    pub const WINDOW: u8 = 5;
}

/// Offsets in the common configuration.
pub mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const STATUS: u64 = 20;
    pub const CONFIG_GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
}

/// No interrupt for this event.
pub const NO_VECTOR: u16 = 0xffff;

/// The queues whose notification addresses are known: one pair.
const QUEUES: usize = 2;

/// A device on the bus. minivmm has all its structures in BAR 0, QEMU most of them in another.
#[derive(Clone, Copy, Debug)]
pub struct PciDevice {
    /// Its place on the bus.
    pub function: Function,
    /// The BAR that holds the common configuration and the notification addresses.
    pub bar: Region,
    /// The common configuration.
    pub common: Region,
    /// The notification addresses.
    pub notify: Region,
    /// How far they are apart.
    pub multiplier: u64,
    /// The ISR status.
    pub isr: Region,
    /// The device's own configuration.
    pub device: Region,
    /// The MSI-X vectors.
    pub msix: Msix,
    /// The capability that is a window into BAR 0.
    pub window: u64,
    notify_offsets: [u64; QUEUES],
}

impl PciDevice {
    /// The devices of this kind on the bus, by slot.
    pub fn all(kind: Kind) -> Vec<Self> {
        let id = (VENDOR, DEVICE_BASE + kind as u16);
        (0..SLOTS)
            .map(|slot| Function::new(slot, 0))
            .filter(|function| function.ids() == id)
            .filter_map(Self::at)
            .collect()
    }

    /// The device that is this function, unless it lacks a structure.
    fn at(function: Function) -> Option<Self> {
        let bars = bars(function);
        function.enable();
        let structure = |wanted: u8| Structure::find(function, &bars, wanted);
        let (common, notify) = (structure(kind::COMMON)?, structure(kind::NOTIFY)?);
        let mut device = Self {
            function,
            bar: bars[common.bar]?,
            common: common.region?,
            notify: notify.region?,
            multiplier: function.config.read::<u32>(notify.capability + 16).into(),
            isr: structure(kind::ISR)?.region?,
            device: structure(kind::DEVICE)?.region?,
            msix: Msix::find(function, &bars)?,
            window: structure(kind::WINDOW)?.capability,
            notify_offsets: [0; QUEUES],
        };
        for (queue, offset) in (0_u16..).zip(&mut device.notify_offsets) {
            device.common.write(common::QUEUE_SELECT, queue);
            *offset = u64::from(device.common.read::<u16>(common::QUEUE_NOTIFY_OFF));
        }
        Some(device)
    }

    /// Notifies the device of a queue; of one that it does not have, somewhere in the page of
    /// the addresses.
    pub fn notify(&self, queue: u32) {
        let known = self.notify_offsets.get(queue as usize);
        let offset = known.copied().unwrap_or(queue.into()) * self.multiplier;
        let start = self.notify.base - self.bar.base;
        self.bar.write(start + offset % PAGE as u64, queue as u16);
    }

    /// Has changes of the configuration and the first queue (of a NIC what is received) signalled by
    /// the first two vectors, which send this message, and the second queue by none.
    pub fn enable_messages(&self, (address, data): (u64, u32)) {
        for vector in 0..QUEUES as u64 {
            self.msix.set(vector, address, data);
            self.msix.mask(vector, false);
        }
        self.msix.control(Msix::ENABLE);
        self.common.write(common::CONFIG_VECTOR, 0_u16);
        for (queue, vector) in [(0, 1), (1, NO_VECTOR)] {
            self.set_queue_vector(queue, vector);
        }
    }

    /// Has the first queue's vector signal this one, too.
    pub fn share_vector(&self, queue: u16) {
        self.set_queue_vector(queue, 1);
    }

    fn set_queue_vector(&self, queue: u16, vector: u16) {
        self.common.write(common::QUEUE_SELECT, queue);
        self.common.write(common::QUEUE_VECTOR, vector);
    }
}

/// Where each BAR is and how large: what stays 0 of ones written there. None where it is no memory
/// below 4 GiB.
type Bars = [Option<Region>; 6];

fn bars(function: Function) -> Bars {
    let mut bars = Bars::default();
    let mut number = 0;
    while number < bars.len() {
        let (region, registers) = bar(function.config, at::BAR_0 + 4 * number as u64);
        bars[number] = region;
        number += registers;
    }
    bars
}

/// The BAR in this register, and how many registers it takes.
fn bar(config: Region, register: u64) -> (Option<Region>, usize) {
    const IO: u32 = 1;
    const WIDE: u32 = 1 << 2;
    let low: u32 = config.read(register);
    let is_wide = low & (IO | WIDE) == WIDE;
    let high: u32 = if is_wide {
        config.read(register + 4)
    } else {
        0
    };
    let registers = 1 + usize::from(is_wide);
    if low & IO != 0 || low & !15 == 0 || high != 0 {
        return (None, registers);
    }
    config.write(register, u32::MAX);
    let mask: u32 = config.read(register);
    config.write(register, low);
    let region = Region {
        base: u64::from(low & !15),
        size: u64::from(!(mask & !15)) + 1,
    };
    ((mask != 0).then_some(region), registers)
}

/// A structure, by its capability.
struct Structure {
    capability: u64,
    /// The BAR that it is in.
    bar: usize,
    /// Where it is, if that is inside the BAR.
    region: Option<Region>,
}

impl Structure {
    fn find(function: Function, bars: &Bars, wanted: u8) -> Option<Self> {
        let config = function.config;
        let mut found = function
            .capabilities()
            .filter(|&(id, offset)| {
                id == VENDOR_SPECIFIC && config.read::<u8>(offset + 3) == wanted
            })
            .map(|(_, offset)| offset);
        let capability = found.next()?;
        let [offset, length] = [8, 12].map(|field| config.read::<u32>(capability + field));
        let bar = usize::from(config.read::<u8>(capability + 4));
        let whole = bars.get(bar).copied().flatten();
        Some(Self {
            capability,
            bar,
            region: whole.and_then(|bar| bar.part(offset.into(), length.into())),
        })
    }
}

/// The MSI-X capability, its table and its pending bits.
#[derive(Clone, Copy, Debug)]
pub struct Msix {
    config: Region,
    capability: u64,
    /// How many vectors there are.
    pub vectors: u16,
    /// The table.
    pub table: Region,
    /// The pending bits.
    pub pending: Region,
}

impl Msix {
    /// In the control register: on.
    pub const ENABLE: u16 = 1 << 15;
    /// In the control register: every vector is masked.
    pub const MASK_ALL: u16 = 1 << 14;
    /// The size of an entry of the table.
    pub const ENTRY: u64 = 16;

    fn find(function: Function, bars: &Bars) -> Option<Self> {
        let config = function.config;
        let mut found = function.capabilities().filter(|&(id, _)| id == MSIX);
        let (_, capability) = found.next()?;
        let vectors = (config.read::<u16>(capability + 2) & 0x7ff) + 1;
        // The low bits say which BAR.
        let part = |field: u64, size: u64| {
            let place: u32 = config.read(capability + field);
            let bar = bars.get((place & 7) as usize).copied().flatten();
            bar?.part(u64::from(place & !7), size)
        };
        Some(Self {
            config,
            capability,
            vectors,
            table: part(4, u64::from(vectors) * Self::ENTRY)?,
            pending: part(8, u64::from(vectors.div_ceil(64)) * 8)?,
        })
    }

    /// Writes the control register.
    pub fn control(&self, value: u16) {
        self.config.write(self.capability + 2, value);
    }

    /// Gives a vector its message.
    pub fn set(&self, vector: u64, address: u64, data: u32) {
        self.table.write_address(vector * Self::ENTRY, address);
        self.table.write(vector * Self::ENTRY + 8, data);
    }

    /// Masks a vector, or unmasks it.
    pub fn mask(&self, vector: u64, masked: bool) {
        self.table
            .write(vector * Self::ENTRY + 12, u32::from(masked));
    }

    /// Whether a masked vector is pending.
    pub fn is_pending(&self, vector: u64) -> bool {
        self.pending.read::<u64>(vector / 64 * 8) >> (vector % 64) & 1 != 0
    }
}
