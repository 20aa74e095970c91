//! The virtio-pci transport, without its legacy parts (virtio 1.2, 4.1).

mod interrupt;

use std::error::Error;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use self::interrupt::PciInterrupt;
use super::status::Status;
use super::transport::{self, Core, set_high, set_low};
use super::{Interrupt as _, VirtioDevice, read_at};
use crate::bus::BusDevice;
use crate::irq::IrqLine;
use crate::pci::{
    CapabilityId, ConfigSpace, Identity, MSIX_ENTRY_LEN, Msix, MsixEntry, MsixRoutes, PciFunction,
};

/// Bytes of BAR 0, which holds everything.
pub const BAR_LEN: u32 = 0x8000;
/// Each queue has a notification address of its own, this far from the one before.
pub const NOTIFY_STRIDE: u32 = 4;
/// Offset of queue 0's notification address in BAR 0.
pub const NOTIFY: u32 = 0x3000;

// The structures in BAR 0, a page each.
const COMMON: u32 = 0x0000;
const ISR: u32 = 0x1000;
const DEVICE: u32 = 0x2000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0x5000;
const PAGE: u32 = 0x1000;

const VENDOR: u16 = 0x1af4;
/// The device id of a modern device is this and its virtio number (4.1.2.1).
const DEVICE_BASE: u16 = 0x1040;

/// The kinds of structures that a capability points to (4.1.4).
mod cfg_type {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
    pub const PCI: u8 = 5;
}

/// Offsets in the common configuration structure (4.1.4.3).
mod common {
    pub const DEVICE_FEATURE_SELECT: usize = 0;
    pub const DEVICE_FEATURE: usize = 4;
    pub const DRIVER_FEATURE_SELECT: usize = 8;
    pub const DRIVER_FEATURE: usize = 12;
    pub const CONFIG_VECTOR: usize = 16;
    pub const NUM_QUEUES: usize = 18;
    pub const STATUS: usize = 20;
    pub const CONFIG_GENERATION: usize = 21;
    pub const QUEUE_SELECT: usize = 22;
    pub const QUEUE_SIZE: usize = 24;
    pub const QUEUE_VECTOR: usize = 26;
    pub const QUEUE_ENABLE: usize = 28;
    pub const QUEUE_NOTIFY_OFF: usize = 30;
    pub const QUEUE_DESC: usize = 32;
    pub const QUEUE_DRIVER: usize = 40;
    pub const QUEUE_DEVICE: usize = 48;
    pub const LEN: usize = 56;
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    core: transport::State,
    config: Value,
    msix: Vec<MsixEntry>,
    interrupt: interrupt::State,
    /// The features that the device and the driver select, and the queue.
    selected: (u32, u32, u16),
}

/// A virtio device as a PCI function. On the memory bus it is BAR 0.
///
/// It has no interrupt pin: without MSI-X a driver has to poll.
#[derive(Debug)]
pub struct PciTransport {
    core: Core<PciInterrupt>,
    config: ConfigSpace,
    msix: Msix,
    /// Where the window into BAR 0 stands in configuration space (4.1.4.9).
    window: usize,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    /// The log has told that the driver gets no interrupts.
    is_silence_told: bool,
}

impl PciTransport {
    /// The vectors that a device has: one for each queue, and one for its configuration.
    pub fn vectors(device: &dyn VirtioDevice) -> usize {
        device.queue_sizes().len() + 1
    }

    /// Makes `device` a function whose BAR 0 lies at `bar`, and whose vectors are `lines`, as many
    /// as [`PciTransport::vectors`] says, connected by `routes`.
    ///
    /// # Errors
    ///
    /// Fails when the process has no file descriptor left.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        bar: u32,
        lines: Vec<IrqLine>,
        routes: Box<dyn MsixRoutes>,
    ) -> io::Result<Self> {
        let id = device.device_id() as u16;
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + id,
            class: device.pci_class(),
            // 1 or higher: no legacy driver may take it (4.1.2.1).
            revision: 1,
            subsystem_vendor: VENDOR,
            subsystem: 0x40 + id,
        });
        config.set_bar_0(bar, BAR_LEN);
        let table_len = (lines.len() * MSIX_ENTRY_LEN) as u32;
        debug_assert!(table_len <= PAGE);
        let msix = Msix::new(&mut config, lines.len(), MSIX_TABLE, MSIX_PENDING, routes);
        let window = add_structures(&mut config, device.queue_sizes().len() as u32);
        let interrupt = PciInterrupt::new(lines, device.queue_sizes().len())?;
        Ok(Self {
            core: Core::new(device, memory, interrupt)?,
            config,
            msix,
            window,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            is_silence_told: false,
        })
    }

    /// The eventfd of each queue, to be signalled when the guest writes to its notification
    /// address: [`NOTIFY`] and [`NOTIFY_STRIDE`] times its number into BAR 0.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.core.kicks
    }

    /// The common configuration structure as it is now. The driver may read any part of it.
    fn common(&self) -> [u8; common::LEN] {
        let core = &self.core;
        let mut bytes = [0; common::LEN];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(
            common::DEVICE_FEATURE_SELECT,
            &self.device_feature_select.to_le_bytes(),
        );
        put(
            common::DEVICE_FEATURE,
            &core
                .device_features(self.device_feature_select)
                .to_le_bytes(),
        );
        put(
            common::DRIVER_FEATURE_SELECT,
            &self.driver_feature_select.to_le_bytes(),
        );
        put(
            common::DRIVER_FEATURE,
            &core
                .driver_features(self.driver_feature_select)
                .to_le_bytes(),
        );
        put(
            common::CONFIG_VECTOR,
            &core.interrupt.config_vector.get().to_le_bytes(),
        );
        put(
            common::NUM_QUEUES,
            &(core.queues.len() as u16).to_le_bytes(),
        );
        put(common::STATUS, &[core.status().bits()]);
        put(
            common::CONFIG_GENERATION,
            &[core.device.config_generation() as u8],
        );
        put(common::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        let index = usize::from(self.queue_select);
        if let (Some(queue), Some(vector)) = (
            core.queues.get(index),
            core.interrupt.queue_vectors.get(index),
        ) {
            put(common::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(common::QUEUE_VECTOR, &vector.get().to_le_bytes());
            put(common::QUEUE_ENABLE, &u16::from(queue.ready).to_le_bytes());
            put(common::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(common::QUEUE_DESC, &queue.descriptors.to_le_bytes());
            put(common::QUEUE_DRIVER, &queue.available.to_le_bytes());
            put(common::QUEUE_DEVICE, &queue.used.to_le_bytes());
        }
        bytes
    }

    /// Takes a write of a field's own width; a 64-bit field may also come in halves (4.1.3.1).
    fn write_common(&mut self, offset: usize, data: &[u8]) {
        match *data {
            [value] if offset == common::STATUS => self.set_status(value),
            [a, b] => self.write_common_16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_common_32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if offset.is_multiple_of(8) => {
                self.write_queue_address(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_queue_address(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8) {
        let was_reset = self.core.set_status(value);
        if was_reset {
            self.device_feature_select = 0;
            self.driver_feature_select = 0;
            self.queue_select = 0;
        }
        self.tell_of_silence();
    }

    /// Warns once of a driver that goes on without interrupts, or has given up as Linux does.
    fn tell_of_silence(&mut self) {
        let status = self.core.status();
        let what = match status.contains(Status::FAILED) {
            true => "gives it up",
            false if status.contains(Status::DRIVER_OK) => "starts it",
            false => return,
        };
        if self.is_silence_told || self.msix.is_enabled(&self.config) {
            return;
        }
        self.is_silence_told = true;
        log::warn!(
            "virtio device {}: the guest's driver {what} with MSI-X off, and on the PCI bus there are no other \
             interrupts (is pci=nomsi on the guest's command line?); virtio-mmio needs no MSI-X",
            self.core.device.device_id()
        );
    }

    fn write_common_16(&mut self, offset: usize, value: u16) {
        let index = usize::from(self.queue_select);
        let interrupt = &self.core.interrupt;
        match offset {
            common::CONFIG_VECTOR => interrupt.assign(&interrupt.config_vector, value),
            common::QUEUE_SELECT => self.queue_select = value,
            common::QUEUE_SIZE => {
                if let Some(queue) = self.core.queue_in_setup(index) {
                    queue.size = value;
                }
            }
            common::QUEUE_VECTOR => {
                if let Some(vector) = interrupt.queue_vectors.get(index) {
                    interrupt.assign(vector, value);
                    let line = interrupt.call_eventfd(self.queue_select);
                    self.core.device.interrupt_changed(self.queue_select, line);
                }
            }
            // Only a reset disables a queue here (4.1.4.3.2).
            common::QUEUE_ENABLE if value == 1 => self.core.set_queue_ready(index, true),
            _ => {}
        }
    }

    fn write_common_32(&mut self, offset: usize, value: u32) {
        match offset {
            common::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            common::DRIVER_FEATURE => {
                self.core
                    .set_driver_features(self.driver_feature_select, value);
            }
            _ => self.write_queue_address(offset, value),
        }
    }

    fn write_queue_address(&mut self, offset: usize, value: u32) {
        let index = usize::from(self.queue_select);
        let Some(queue) = self.core.queue_in_setup(index) else {
            return;
        };
        let half = if offset.is_multiple_of(8) {
            set_low
        } else {
            set_high
        };
        match offset & !7 {
            common::QUEUE_DESC => half(&mut queue.descriptors, value),
            common::QUEUE_DRIVER => half(&mut queue.available, value),
            common::QUEUE_DEVICE => half(&mut queue.used, value),
            _ => {}
        }
    }

    /// The window into BAR 0: which part of it the guest has chosen, if it makes sense.
    fn window_target(&self) -> Option<(u64, usize)> {
        let bar = self.config.dword(self.window + 4) as u8;
        let offset = self.config.dword(self.window + 8);
        let len = self.config.dword(self.window + 12);
        let valid = bar == 0 && matches!(len, 1 | 2 | 4) && offset < BAR_LEN;
        (valid && offset.is_multiple_of(len)).then_some((offset.into(), len as usize))
    }
}

/// Adds the capabilities that say where each structure is (4.1.4). Returns the offset of the
/// last, the window.
fn add_structures(config: &mut ConfigSpace, queues: u32) -> usize {
    let mut add = |kind: u8, offset: u32, len: u32, rest: &[u8]| {
        let cap_len = 16 + rest.len() as u8;
        let mut body = vec![cap_len, kind, 0, 0, 0, 0];
        body.extend(offset.to_le_bytes());
        body.extend(len.to_le_bytes());
        body.extend(rest);
        config.add_capability(CapabilityId::Vendor, &body)
    };
    add(cfg_type::COMMON, COMMON, common::LEN as u32, &[]);
    add(
        cfg_type::NOTIFY,
        NOTIFY,
        queues * NOTIFY_STRIDE,
        &NOTIFY_STRIDE.to_le_bytes(),
    );
    add(cfg_type::ISR, ISR, 1, &[]);
    add(cfg_type::DEVICE, DEVICE, PAGE, &[]);
    let window = add(cfg_type::PCI, 0, 0, &[0; 4]);
    // BAR, offset, length and data are the driver's to write.
    config.make_writable(window + 4, &[0xff]);
    config.make_writable(window + 8, &[0xff; 12]);
    window
}

/// Offset of the window's data in its capability.
const WINDOW_DATA: usize = 16;

impl PciFunction for PciTransport {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        if offset == self.window + WINDOW_DATA
            && let Some((target, len)) = self.window_target()
        {
            let mut value = [0; 4];
            BusDevice::read(self, target, &mut value[..len]);
            self.config.set(offset, &value);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let was_enabled = self.config.bus_master_enabled();
        self.config.write(offset, data);
        self.msix.update(&self.config);
        // Linux takes this right away from all functions before kexec: what lies where the rings were is then the next
        // kernel's, long before its driver resets the device.
        if was_enabled && !self.config.bus_master_enabled() {
            self.core.halt();
        }
        if offset == self.window + WINDOW_DATA
            && let Some((target, len)) = self.window_target()
            && let Some(data) = data.get(..len)
        {
            BusDevice::write(self, target, data);
        }
    }
}

impl BusDevice for PciTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let (structure, within) = split(offset);
        match structure {
            COMMON => read_at(&self.common(), within, data),
            DEVICE => self.core.device.read_config(within, data),
            MSIX_TABLE => self.msix.read_table(within, data),
            MSIX_PENDING => self
                .msix
                .read_pending(&self.core.interrupt.lines, within, data),
            ISR if within == 0 => read_at(&[self.core.interrupt.take_status()], 0, data),
            _ => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (structure, within) = split(offset);
        match structure {
            COMMON => self.write_common(within, data),
            DEVICE => self.core.device.write_config(within, data),
            NOTIFY => self.core.notify(within / NOTIFY_STRIDE as usize),
            MSIX_TABLE => self.msix.write_table(&self.config, within, data),
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
        json!(State {
            core: self.core.save(),
            config: self.config.save(),
            msix: self.msix.entries().to_vec(),
            interrupt: self.core.interrupt.save(),
            selected: (
                self.device_feature_select,
                self.driver_feature_select,
                self.queue_select,
            ),
        })
    }

    fn restore(&mut self, state: Value) -> Result<(), Box<dyn Error + Send + Sync>> {
        let state: State = serde_json::from_value(state)?;
        self.core.restore(state.core)?;
        self.config.restore(state.config)?;
        if !self.msix.restore(&self.config, &state.msix) {
            return Err("it has another number of MSI-X vectors".into());
        }
        // What waits goes out where it is unmasked, so after the routes.
        self.core.interrupt.restore(&state.interrupt);
        (
            self.device_feature_select,
            self.driver_feature_select,
            self.queue_select,
        ) = state.selected;
        Ok(())
    }
}

/// The structure that an offset in BAR 0 belongs to, and the offset in that.
fn split(offset: u64) -> (u32, usize) {
    let offset = offset as u32;
    (offset & !(PAGE - 1), (offset & (PAGE - 1)) as usize)
}

#[cfg(test)]
mod tests;
