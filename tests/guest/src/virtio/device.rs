//! A device, whichever transport it is reached by: the same registers at different places and of
//! different widths (virtio 1.2, 4.2.2 and 4.1.4).

use alloc::vec::Vec;

use super::Kind;
use super::mmio::{Window, at};
use super::pci::{PciDevice, common};
use crate::cpu;
use crate::memory::Word;
use crate::pci;

/// Bits of the device status (virtio 1.2, 2.1).
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
}

/// A device. What is written is as wide as virtio-mmio has it, and cut off where virtio-pci has less.
#[derive(Clone, Copy, Debug)]
pub enum VirtioDevice {
    /// In a virtio-mmio window.
    Mmio(Window),
    /// On the PCI bus.
    Pci(PciDevice),
}

impl VirtioDevice {
    /// All there are of a kind.
    pub fn all(kind: Kind) -> Vec<Self> {
        let windows = Window::all(kind).into_iter().map(Self::Mmio);
        let functions = PciDevice::all(kind).into_iter().map(Self::Pci);
        let devices: Vec<_> = windows.chain(functions).collect();
        if !devices.is_empty() {
            return devices;
        }
        let windows = Window::all_of_microvm(kind);
        windows.into_iter().map(Self::Mmio).collect()
    }

    /// The device of a kind with this index.
    pub fn find(kind: Kind, index: usize) -> Result<Self, &'static str> {
        Self::all(kind)
            .get(index)
            .copied()
            .ok_or("there is no such device")
    }

    /// The transport's name, and its version or revision.
    pub fn transport(&self) -> (&'static str, u32) {
        match self {
            Self::Mmio(window) => ("mmio", window.registers.read(at::VERSION)),
            Self::Pci(function) => {
                let revision: u8 = function.function.config.read(pci::at::REVISION);
                ("pci", revision.into())
            }
        }
    }

    /// The physical address of its registers.
    pub fn base(&self) -> u64 {
        match self {
            Self::Mmio(window) => window.registers.base,
            Self::Pci(function) => function.bar.base,
        }
    }

    /// The device status.
    pub fn status(&self) -> u32 {
        match self {
            Self::Mmio(window) => window.registers.read(at::STATUS),
            Self::Pci(function) => function.common.read::<u8>(common::STATUS).into(),
        }
    }

    /// Writes the device status.
    pub fn set_status(&self, status: u32) {
        match self {
            Self::Mmio(window) => window.registers.write(at::STATUS, status),
            Self::Pci(function) => function.common.write(common::STATUS, status as u8),
        }
    }

    /// Resets the device.
    pub fn reset(&self) {
        self.set_status(0);
    }

    /// 32 bits of the features that the device offers.
    pub fn offered_word(&self, select: u32) -> u32 {
        match self {
            Self::Mmio(window) => {
                window.registers.write(at::DEVICE_FEATURES_SEL, select);
                window.registers.read(at::DEVICE_FEATURES)
            }
            Self::Pci(function) => {
                function.common.write(common::DEVICE_FEATURE_SELECT, select);
                function.common.read(common::DEVICE_FEATURE)
            }
        }
    }

    /// All 64 bits of them.
    pub fn offered(&self) -> u64 {
        u64::from(self.offered_word(1)) << 32 | u64::from(self.offered_word(0))
    }

    /// Accepts 32 bits of features.
    pub fn accept_word(&self, select: u32, word: u32) {
        match self {
            Self::Mmio(window) => {
                window.registers.write(at::DRIVER_FEATURES_SEL, select);
                window.registers.write(at::DRIVER_FEATURES, word);
            }
            Self::Pci(function) => {
                function.common.write(common::DRIVER_FEATURE_SELECT, select);
                function.common.write(common::DRIVER_FEATURE, word);
            }
        }
    }

    /// Accepts features.
    pub fn accept(&self, features: u64) {
        self.accept_word(0, features as u32);
        self.accept_word(1, (features >> 32) as u32);
    }

    /// Chooses the queue that the following is about.
    pub fn select_queue(&self, queue: u32) {
        match self {
            Self::Mmio(window) => window.registers.write(at::QUEUE_SEL, queue),
            Self::Pci(function) => function.common.write(common::QUEUE_SELECT, queue as u16),
        }
    }

    /// The most descriptors that the queue can have; 0 where there is none.
    pub fn queue_size(&self) -> u32 {
        match self {
            Self::Mmio(window) => window.registers.read(at::QUEUE_NUM_MAX),
            Self::Pci(function) => function.common.read::<u16>(common::QUEUE_SIZE).into(),
        }
    }

    /// Says how many it has.
    pub fn set_queue_size(&self, size: u32) {
        match self {
            Self::Mmio(window) => window.registers.write(at::QUEUE_NUM, size),
            Self::Pci(function) => function.common.write(common::QUEUE_SIZE, size as u16),
        }
    }

    /// Says where descriptor table, available ring and used ring are.
    pub fn set_queue_areas(&self, areas: [u64; 3]) {
        let (registers, offsets) = match self {
            Self::Mmio(window) => (
                window.registers,
                [at::QUEUE_DESC, at::QUEUE_DRIVER, at::QUEUE_DEVICE],
            ),
            Self::Pci(function) => (
                function.common,
                [
                    common::QUEUE_DESC,
                    common::QUEUE_DRIVER,
                    common::QUEUE_DEVICE,
                ],
            ),
        };
        for (offset, area) in offsets.into_iter().zip(areas) {
            registers.write_address(offset, area);
        }
    }

    /// Whether the queue is ready.
    pub fn queue_ready(&self) -> u32 {
        match self {
            Self::Mmio(window) => window.registers.read(at::QUEUE_READY),
            Self::Pci(function) => function.common.read::<u16>(common::QUEUE_ENABLE).into(),
        }
    }

    /// Says that it is, or no longer is.
    pub fn set_queue_ready(&self, value: u32) {
        match self {
            Self::Mmio(window) => window.registers.write(at::QUEUE_READY, value),
            Self::Pci(function) => function.common.write(common::QUEUE_ENABLE, value as u16),
        }
    }

    /// Notifies the device of a queue.
    pub fn notify(&self, queue: u16) {
        self.notify_any(queue.into());
    }

    /// The same, of a queue that it need not have.
    pub fn notify_any(&self, queue: u32) {
        match self {
            Self::Mmio(window) => window.registers.write(at::QUEUE_NOTIFY, queue),
            Self::Pci(function) => function.notify(queue),
        }
    }

    /// What has happened: bit 0, buffers were used; bit 1, the configuration has changed. On PCI,
    /// reading clears it.
    pub fn interrupt_status(&self) -> u32 {
        match self {
            Self::Mmio(window) => window.registers.read(at::INTERRUPT_STATUS),
            Self::Pci(function) => function.isr.read::<u8>(0).into(),
        }
    }

    /// Waits until the interrupt status has this bit. What is used may show before that.
    pub fn wait_interrupt(&self, bit: u32) -> Result<(), &'static str> {
        let end = cpu::now() + cpu::PATIENCE;
        while self.interrupt_status() & bit == 0 {
            if cpu::now() > end {
                return Err("the interrupt status shows nothing");
            }
        }
        Ok(())
    }

    /// Says that it has been seen, where that needs saying.
    pub fn acknowledge(&self, bits: u32) {
        match self {
            Self::Mmio(window) => window.registers.write(at::INTERRUPT_ACK, bits),
            Self::Pci(function) => function.isr.write(0, bits as u8),
        }
    }

    /// Reads the device's own configuration.
    pub fn config<T: Word>(&self, offset: u64) -> T {
        match self {
            Self::Mmio(window) => window.registers.read(at::CONFIG + offset),
            Self::Pci(function) => function.device.read(offset),
        }
    }

    /// Writes it.
    pub fn set_config<T: Word>(&self, offset: u64, value: T) {
        match self {
            Self::Mmio(window) => window.registers.write(at::CONFIG + offset, value),
            Self::Pci(function) => function.device.write(offset, value),
        }
    }

    /// Changes whenever the configuration has changed.
    pub fn generation(&self) -> u32 {
        match self {
            Self::Mmio(window) => window.registers.read(at::CONFIG_GENERATION),
            Self::Pci(function) => function.common.read::<u8>(common::CONFIG_GENERATION).into(),
        }
    }

    /// The line that it interrupts by, as `cpu` counts them: of the IOAPIC, or the slot on the bus.
    pub fn line(&self) -> u32 {
        match self {
            Self::Mmio(window) => window.line,
            Self::Pci(function) => function.function.slot.into(),
        }
    }

    /// Lets the device, which is up, interrupt. A reset ends that on PCI.
    pub fn enable_interrupts(&self) {
        match self {
            Self::Mmio(window) => cpu::enable_line(window.line),
            Self::Pci(function) => {
                cpu::enable_interrupts();
                function.enable_messages(cpu::message(self.line()));
            }
        }
    }

    /// Has a queue beyond the second interrupt as well, after [`Self::enable_interrupts`].
    pub fn enable_queue_interrupts(&self, queue: u16) {
        match self {
            // All queues have the device's line.
            Self::Mmio(_) => {}
            Self::Pci(function) => function.share_vector(queue),
        }
    }
}

/// Resets the device and takes it up to FEATURES_OK with those of the `wanted` features that it
/// offers. Returns them.
pub fn negotiate(device: VirtioDevice, wanted: u64) -> Result<u64, &'static str> {
    device.reset();
    if device.status() != 0 {
        return Err("the status is not 0 after a reset");
    }
    device.set_status(status::ACKNOWLEDGE);
    device.set_status(status::ACKNOWLEDGE | status::DRIVER);
    let features = device.offered() & wanted;
    device.accept(features);
    device.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
    match device.status() & status::FEATURES_OK {
        0 => Err("FEATURES_OK does not stick"),
        _ => Ok(features),
    }
}

/// Says DRIVER_OK.
pub fn go(device: VirtioDevice) {
    device
        .set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK);
}

/// The size of a queue to use: what the device offers, at most `limit`.
pub fn queue_size(device: VirtioDevice, queue: u16, limit: u16) -> Result<u16, &'static str> {
    device.select_queue(queue.into());
    match device.queue_size() {
        0 => Err("the device has no such queue"),
        offered => Ok(u16::try_from(offered).unwrap_or(limit).min(limit)),
    }
}
