//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2).

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde_json::{Value, json};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::transport::{Core, TransportInterrupt, set_high, set_low};
use super::{Interrupt, VirtioDevice};
use crate::bus::BusDevice;
use crate::irq::IrqLine;

/// Offset of QueueNotify, where the monitor registers the ioeventfds.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "mini", as bytes in memory.
const VENDOR: u32 = 0x696e_696d;

/// The register offsets of virtio 1.2, 4.2.2.
mod register {
    pub const MAGIC_VALUE: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = super::QUEUE_NOTIFY;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_LEN_LOW: u64 = 0xb0;
    pub const SHM_BASE_HIGH: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// The interrupt status register and the line that it belongs to.
#[derive(Debug)]
struct MmioInterrupt {
    line: IrqLine,
    /// The bits of InterruptStatus that the driver has not acknowledged yet.
    pending: AtomicU32,
    /// The kernel raises the line by itself and sets no bit for used buffers: the driver then finds
    /// it set whenever it looks.
    by_kernel: AtomicBool,
    /// DEVICE_NEEDS_RESET, as set by a device's own thread.
    needs_reset: AtomicBool,
}

impl MmioInterrupt {
    const USED_BUFFER: u32 = 1;
    const CONFIG_CHANGE: u32 = 2;

    fn raise(&self, bit: u32) {
        self.pending.fetch_or(bit, Ordering::SeqCst);
        self.line.raise();
    }

    /// The interrupt status register.
    fn status(&self) -> u32 {
        let used = if self.by_kernel.load(Ordering::SeqCst) {
            Self::USED_BUFFER
        } else {
            0
        };
        self.pending.load(Ordering::SeqCst) | used
    }
}

impl Interrupt for MmioInterrupt {
    fn queue(&self, _index: u16) {
        self.raise(Self::USED_BUFFER);
    }

    fn call_eventfd(&self, _index: u16) -> &EventFd {
        self.by_kernel.store(true, Ordering::SeqCst);
        self.line.eventfd()
    }

    fn config(&self) {
        self.raise(Self::CONFIG_CHANGE);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(Self::CONFIG_CHANGE);
    }
}

impl TransportInterrupt for MmioInterrupt {
    fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    fn save(&self) -> Value {
        json!((self.status(), self.is_broken()))
    }

    fn restore(&self, state: Value) -> serde_json::Result<()> {
        let (pending, needs_reset) = serde_json::from_value(state)?;
        self.pending.store(pending, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
        Ok(())
    }

    fn clear(&self) {
        self.pending.store(0, Ordering::SeqCst);
        self.by_kernel.store(false, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }
}

/// A virtio device with a window of virtio-mmio registers.
#[derive(Debug)]
pub struct MmioTransport {
    core: Core<MmioInterrupt>,
}

impl MmioTransport {
    /// Gives `device` registers and `line` to interrupt by.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        line: IrqLine,
    ) -> io::Result<Self> {
        let interrupt = MmioInterrupt {
            line,
            pending: AtomicU32::new(0),
            by_kernel: AtomicBool::new(false),
            needs_reset: AtomicBool::new(false),
        };
        Ok(Self {
            core: Core::new(device, memory, interrupt)?,
        })
    }

    /// The eventfd of each queue, to be signalled when its number is written to
    /// [`QUEUE_NOTIFY`].
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.core.kicks
    }

    /// The interrupt line, to be connected to the machine.
    pub fn irq(&self) -> &IrqLine {
        &self.core.interrupt.line
    }

    fn read_register(&self, offset: u64) -> u32 {
        let core = &self.core;
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => core.device.device_id(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => core.device_features(),
            register::QUEUE_SIZE_MAX => core.queue_size_max(core.queue_sel as usize).into(),
            register::QUEUE_READY => core
                .queues
                .get(core.queue_sel as usize)
                .map_or(0, |queue| queue.ready.into()),
            register::INTERRUPT_STATUS => core.interrupt.status(),
            register::STATUS => core.status().bits().into(),
            // No shared memory regions: length and base are all ones (4.2.2).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => core.device.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.core.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.core.driver_features_sel = value,
            register::DRIVER_FEATURES => self.core.set_driver_features(value),
            register::QUEUE_SEL => self.core.queue_sel = value,
            register::QUEUE_NOTIFY => self.core.notify(value as usize),
            register::INTERRUPT_ACK => {
                self.core
                    .interrupt
                    .pending
                    .fetch_and(!value, Ordering::SeqCst);
            }
            register::STATUS => {
                // A status has 8 bits, and only 0 is a reset.
                if let Ok(status) = u8::try_from(value) {
                    self.core.set_status(status);
                }
            }
            register::QUEUE_READY => self.core.set_queue_ready(value == 1),
            _ => self.set_queue(offset, value),
        }
    }

    fn set_queue(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.core.queue_in_setup() else {
            return;
        };
        match offset {
            // A size that does not fit 16 bits is as wrong as 0, and refused at activation.
            register::QUEUE_SIZE => queue.size = u16::try_from(value).unwrap_or(0),
            register::QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            register::QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut queue.available, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut queue.available, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut queue.used, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (
            offset.checked_sub(register::CONFIG),
            <&mut [u8; 4]>::try_from(&mut *data),
        ) {
            (Some(config), _) => self.core.device.read_config(config as usize, data),
            // Registers are 32 bits wide and read only as such (4.2.2.2).
            (None, Ok(word)) if offset.is_multiple_of(4) => {
                *word = self.read_register(offset).to_le_bytes();
            }
            _ => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset.checked_sub(register::CONFIG), data.try_into()) {
            (Some(config), _) => self.core.device.write_config(config as usize, data),
            (None, Ok(word)) if offset.is_multiple_of(4) => {
                self.write_register(offset, u32::from_le_bytes(word));
            }
            _ => {}
        }
    }

    fn pause(&mut self) {
        self.core.pause();
    }

    fn resume(&mut self) {
        self.core.resume();
    }

    fn save(&self) -> Value {
        self.core.save()
    }

    fn restore(&mut self, state: Value) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.core.restore(state)
    }
}

#[cfg(test)]
mod tests;
