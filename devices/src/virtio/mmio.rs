//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde_json::{Value, json};
use virtio_bindings::virtio_mmio as register;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::transport::{Registers, Transport, TransportInterrupt, set_high, set_low};
use super::{Interrupt, VirtioDevice};
use crate::bus::{BoxError, check};
use crate::irq::IrqLine;

/// Offset of QueueNotify, where the monitor registers the ioeventfds.
pub const QUEUE_NOTIFY: u64 = register::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "mini", as bytes in memory.
const VENDOR: u32 = 0x696e_696d;

/// The interrupt status register and the line that it belongs to.
#[derive(Debug)]
pub struct MmioInterrupt {
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
    const USED_BUFFER: u32 = register::VIRTIO_MMIO_INT_VRING;
    const CONFIG_CHANGE: u32 = register::VIRTIO_MMIO_INT_CONFIG;

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
    fn is_broken(&self) -> &AtomicBool {
        &self.needs_reset
    }

    fn save(&self) -> Value {
        json!(self.status())
    }

    fn check(&self, state: &Value) -> Result<(), BoxError> {
        check::<u32>(state)
    }

    fn restore(&self, state: Value) -> serde_json::Result<()> {
        let pending = serde_json::from_value(state)?;
        self.pending.store(pending, Ordering::SeqCst);
        Ok(())
    }

    fn clear(&self) {
        self.pending.store(0, Ordering::SeqCst);
        self.by_kernel.store(false, Ordering::SeqCst);
    }
}

/// The registers of virtio 1.2, 4.2.2.
#[derive(Debug)]
pub struct Mmio;

/// A virtio device with a window of virtio-mmio registers. The queue whose number is written to
/// [`QUEUE_NOTIFY`] is notified.
pub type MmioTransport = Transport<Mmio>;

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
        Self::with_registers(Mmio, interrupt, device, memory)
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            register::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            register::VIRTIO_MMIO_VERSION => VERSION,
            register::VIRTIO_MMIO_DEVICE_ID => self.device.device_id(),
            register::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            register::VIRTIO_MMIO_DEVICE_FEATURES => self.device_features(),
            register::VIRTIO_MMIO_QUEUE_NUM_MAX => {
                self.queue_size_max(self.queue_sel as usize).into()
            }
            register::VIRTIO_MMIO_QUEUE_READY => self
                .queues
                .get(self.queue_sel as usize)
                .map_or(0, |queue| queue.ready.into()),
            register::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            register::VIRTIO_MMIO_STATUS => self.status().bits().into(),
            // No shared memory regions: length and base are all ones (4.2.2).
            register::VIRTIO_MMIO_SHM_LEN_LOW..=register::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            register::VIRTIO_MMIO_CONFIG_GENERATION => self.device.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            register::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES => self.set_driver_features(value),
            register::VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            register::VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value as usize),
            register::VIRTIO_MMIO_INTERRUPT_ACK => {
                self.interrupt.pending.fetch_and(!value, Ordering::SeqCst);
            }
            register::VIRTIO_MMIO_STATUS => {
                // A status has 8 bits, and only 0 is a reset.
                if let Ok(status) = u8::try_from(value) {
                    self.set_status(status);
                }
            }
            register::VIRTIO_MMIO_QUEUE_READY => self.set_queue_ready(value == 1),
            _ => self.set_queue(offset, value),
        }
    }

    fn set_queue(&mut self, offset: u32, value: u32) {
        let Some(queue) = self.queue_in_setup() else {
            return;
        };
        match offset {
            // A size that does not fit 16 bits is as wrong as 0, and refused at activation.
            register::VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            register::VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            register::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            register::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            register::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            register::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            register::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }
}

impl Registers for Mmio {
    type Interrupt = MmioInterrupt;

    fn read(transport: &mut MmioTransport, offset: u64, data: &mut [u8]) {
        match (
            offset.checked_sub(register::VIRTIO_MMIO_CONFIG.into()),
            <&mut [u8; 4]>::try_from(&mut *data),
        ) {
            (Some(config), _) => transport.device.read_config(config as usize, data),
            // Registers are 32 bits wide and read only as such (4.2.2.2).
            (None, Ok(word)) if offset.is_multiple_of(4) => {
                *word = transport.read_register(offset as u32).to_le_bytes();
            }
            _ => data.fill(0),
        }
    }

    fn write(transport: &mut MmioTransport, offset: u64, data: &[u8]) {
        match (
            offset.checked_sub(register::VIRTIO_MMIO_CONFIG.into()),
            data.try_into(),
        ) {
            (Some(config), _) => transport.device.write_config(config as usize, data),
            (None, Ok(word)) if offset.is_multiple_of(4) => {
                transport.write_register(offset as u32, u32::from_le_bytes(word));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
