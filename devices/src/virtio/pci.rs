//! The virtio-pci transport, without its legacy parts (virtio 1.2, 4.1).

mod common;
mod interrupt;

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vm_memory::{ByteValued, GuestMemoryMmap};

use self::interrupt::PciInterrupt;
use super::status::Status;
use super::transport::{Registers, Transport};
use super::{VirtioDevice, kind, read_at};
use crate::bus::{BoxError, BusDevice};
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
    config: Value,
    msix: Vec<MsixEntry>,
}

/// Configuration space and MSI-X table, beside the structures in BAR 0.
#[derive(Debug)]
pub struct Pci {
    config: ConfigSpace,
    msix: Msix,
    /// Where the pci_cfg capability stands in configuration space, a window into BAR 0 (4.1.4.9).
    pci_cfg: usize,
    /// The log has that the driver gets no interrupts.
    has_warned: bool,
}

/// A virtio device as a PCI function. On the memory bus it is BAR 0, where a queue is notified by a
/// write to [`NOTIFY`] and [`NOTIFY_STRIDE`] times its number.
///
/// It has no interrupt pin: without MSI-X a driver has to poll.
pub type PciTransport = Transport<Pci>;

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
        let registers = Pci {
            config,
            msix,
            pci_cfg,
            has_warned: false,
        };
        Self::with_registers(registers, interrupt, device, memory)
    }

    /// Warns once of a driver that goes on without interrupts, or has given up as Linux does.
    fn warn_without_msix(&mut self) {
        let status = self.status();
        let what = match status.contains(Status::FAILED) {
            true => "gives it up",
            false if status.contains(Status::DRIVER_OK) => "starts it",
            false => return,
        };
        if self.registers.has_warned || self.registers.msix.is_enabled(&self.registers.config) {
            return;
        }
        self.registers.has_warned = true;
        log::warn!(
            "the {}: the guest's driver {what} with MSI-X off, and on the PCI bus there \
             are no other interrupts (is pci=nomsi on the guest's command line?); virtio-mmio \
             needs no MSI-X",
            kind(self.device.device_id())
        );
    }
}

impl Pci {
    /// Which part of BAR 0 an access to configuration space at `at` reaches: what the guest has
    /// chosen in the pci_cfg capability, if it is valid and this is its data.
    fn pci_cfg_target(&self, at: usize) -> Option<(u64, usize)> {
        let bar = self.config.dword(self.pci_cfg + 4) as u8;
        let offset = self.config.dword(self.pci_cfg + 8);
        let len = self.config.dword(self.pci_cfg + 12);
        let valid = at == self.pci_cfg + PCI_CFG_DATA
            && bar == 0
            && matches!(len, 1 | 2 | 4)
            && offset < BAR_LEN;
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
        if let Some((target, len)) = self.registers.pci_cfg_target(offset) {
            let mut value = [0; 4];
            self.read(target, &mut value[..len]);
            self.registers.config.set(offset, &value);
        }
        self.registers.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let Pci { config, msix, .. } = &mut self.registers;
        let was_enabled = config.bus_master_enabled();
        config.write(offset, data);
        msix.update(config);
        // Linux takes this right away from all functions before kexec: what lies where the rings
        // were is then the next kernel's, long before its driver resets the device.
        if was_enabled && !config.bus_master_enabled() {
            self.halt();
        }
        if let Some((target, len)) = self.registers.pci_cfg_target(offset)
            && let Some(data) = data.get(..len)
        {
            self.write(target, data);
        }
    }
}

impl Registers for Pci {
    type Interrupt = PciInterrupt;

    fn read(transport: &mut PciTransport, offset: u64, data: &mut [u8]) {
        let (structure, within) = split(offset);
        let (interrupt, msix) = (&transport.interrupt, &transport.registers.msix);
        match structure {
            COMMON => read_at(transport.common().as_slice(), within, data),
            DEVICE => transport.device.read_config(within, data),
            MSIX_TABLE => msix.read_table(within, data),
            MSIX_PENDING => msix.read_pending(&interrupt.lines, within, data),
            ISR if within == 0 => read_at(&[interrupt.take_status()], 0, data),
            _ => data.fill(0),
        }
    }

    fn write(transport: &mut PciTransport, offset: u64, data: &[u8]) {
        let (structure, within) = split(offset);
        let Pci { config, msix, .. } = &mut transport.registers;
        match structure {
            COMMON => transport.write_common(within, data),
            DEVICE => transport.device.write_config(within, data),
            NOTIFY => transport.notify(within / NOTIFY_STRIDE as usize),
            MSIX_TABLE => msix.write_table(config, within, data),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.config.reset();
        self.msix.reset(&self.config);
    }

    fn save(&self) -> Value {
        json!(State {
            config: self.config.save(),
            msix: self.msix.entries().to_vec(),
        })
    }

    fn check(&self, state: &Value) -> Result<(), BoxError> {
        let state = State::deserialize(state)?;
        ConfigSpace::check(&state.config)?;
        match state.msix.len() == self.msix.entries().len() {
            true => Ok(()),
            false => Err("it has another number of MSI-X vectors".into()),
        }
    }

    fn restore(&mut self, state: Value) -> Result<(), BoxError> {
        self.check(&state)?;
        let state: State = serde_json::from_value(state)?;
        self.config.restore(state.config)?;
        self.msix.restore(&self.config, &state.msix);
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
