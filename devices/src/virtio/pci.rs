//! The virtio-pci transport, without its legacy parts (virtio 1.2, 4.1).

mod common;
mod interrupt;

use std::error::Error;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vm_memory::{ByteValued, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use self::interrupt::PciInterrupt;
use super::status::Status;
use super::transport::Core;
use super::{VirtioDevice, read_at};
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

#[derive(Debug, Serialize, Deserialize)]
struct State {
    core: Value,
    config: Value,
    msix: Vec<MsixEntry>,
}

/// A virtio device as a PCI function. On the memory bus it is BAR 0.
///
/// It has no interrupt pin: without MSI-X a driver has to poll.
#[derive(Debug)]
pub struct PciTransport {
    core: Core<PciInterrupt>,
    config: ConfigSpace,
    msix: Msix,
    /// Where the pci_cfg capability stands in configuration space, a window into BAR 0 (4.1.4.9).
    pci_cfg: usize,
    /// The log has that the driver gets no interrupts.
    has_warned: bool,
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
    /// Fails with EMFILE.
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
        let pci_cfg = add_structures(&mut config, device.queue_sizes().len() as u32);
        let interrupt = PciInterrupt::new(lines, device.queue_sizes().len())?;
        Ok(Self {
            core: Core::new(device, memory, interrupt)?,
            config,
            msix,
            pci_cfg,
            has_warned: false,
        })
    }

    /// The eventfd of each queue, to be signalled when the guest writes to its notification
    /// address: [`NOTIFY`] and [`NOTIFY_STRIDE`] times its number into BAR 0.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.core.kicks
    }

    /// Warns once of a driver that goes on without interrupts, or has given up as Linux does.
    fn warn_without_msix(&mut self) {
        let status = self.core.status();
        let what = match status.contains(Status::FAILED) {
            true => "gives it up",
            false if status.contains(Status::DRIVER_OK) => "starts it",
            false => return,
        };
        if self.has_warned || self.msix.is_enabled(&self.config) {
            return;
        }
        self.has_warned = true;
        log::warn!(
            "virtio device {}: the guest's driver {what} with MSI-X off, and on the PCI bus there \
             are no other interrupts (is pci=nomsi on the guest's command line?); virtio-mmio \
             needs no MSI-X",
            self.core.device.device_id()
        );
    }

    /// Which part of BAR 0 the guest has chosen in the pci_cfg capability, if it is valid.
    fn pci_cfg_target(&self) -> Option<(u64, usize)> {
        let bar = self.config.dword(self.pci_cfg + 4) as u8;
        let offset = self.config.dword(self.pci_cfg + 8);
        let len = self.config.dword(self.pci_cfg + 12);
        let valid = bar == 0 && matches!(len, 1 | 2 | 4) && offset < BAR_LEN;
        (valid && offset.is_multiple_of(len)).then_some((offset.into(), len as usize))
    }
}

/// Adds the capabilities that say where each structure is (4.1.4). Returns the offset of the
/// last, pci_cfg.
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
    let pci_cfg = add(cfg_type::PCI, 0, 0, &[0; 4]);
    // BAR, offset, length and data are the driver's to write.
    config.make_writable(pci_cfg + 4, &[0xff]);
    config.make_writable(pci_cfg + 8, &[0xff; 12]);
    pci_cfg
}

/// Offset of the data in the pci_cfg capability.
const PCI_CFG_DATA: usize = 16;

impl PciFunction for PciTransport {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        if offset == self.pci_cfg + PCI_CFG_DATA
            && let Some((target, len)) = self.pci_cfg_target()
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
        // Linux takes this right away from all functions before kexec: what lies where the rings
        // were is then the next kernel's, long before its driver resets the device.
        if was_enabled && !self.config.bus_master_enabled() {
            self.core.halt();
        }
        if offset == self.pci_cfg + PCI_CFG_DATA
            && let Some((target, len)) = self.pci_cfg_target()
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
            COMMON => read_at(self.common().as_slice(), within, data),
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
        })
    }

    fn restore(&mut self, state: Value) -> Result<(), Box<dyn Error + Send + Sync>> {
        let state: State = serde_json::from_value(state)?;
        self.core.restore(state.core)?;
        self.config.restore(state.config)?;
        if !self.msix.restore(&self.config, &state.msix) {
            return Err("it has another number of MSI-X vectors".into());
        }
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
