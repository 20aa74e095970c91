//! A PCI Express host bridge with one bus (PCI Firmware Specification 3.3, 4.1; PCI Local Bus
//! Specification 3.0).
//!
//! Devices sit at fixed addresses: their BARs show size and place as the specification asks, but
//! the place is the plan's and cannot be moved. So the windows stand on the memory bus for good,
//! and an ioeventfd inside one never goes stale.

mod config;
mod msix;

use std::fmt;
use std::sync::{Arc, Mutex};

use serde_json::Value;

pub use config::{CapabilityId, ConfigSpace, Identity};
pub use msix::{Entry as MsixEntry, MSIX_ENTRY_LEN, Msix, MsixRoutes};

use crate::bus::{BoxError, BusDevice, check};
use crate::lock;

/// Bytes of configuration space that a function has under ECAM.
pub const ECAM_FUNCTION_LEN: u64 = 4096;
/// Bytes of ECAM for one bus.
pub const ECAM_BUS_LEN: u64 = 256 * ECAM_FUNCTION_LEN;
/// Devices that fit on the bus.
pub const SLOTS: usize = 32;
/// The first of the ports of configuration mechanism #1.
pub const CONFIG_PORT: u16 = 0xcf8;
/// Their number: an address and a data register of four bytes each.
pub const CONFIG_PORTS: u64 = 8;

/// A device with one function.
///
/// `offset` and length stay inside the first 256 bytes.
pub trait PciFunction: Send + fmt::Debug {
    /// The guest reads configuration space.
    fn read_config(&mut self, offset: usize, data: &mut [u8]);
    /// The guest writes configuration space.
    fn write_config(&mut self, offset: usize, data: &[u8]);
}

/// A function on the bus, with its own lock.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// The functions of bus 0 by their slots. The host bridge has the first one.
#[derive(Debug)]
pub struct PciBus {
    slots: [Option<SharedFunction>; SLOTS],
    bridge: Arc<Mutex<HostBridge>>,
}

impl Default for PciBus {
    /// A bus with its host bridge.
    fn default() -> Self {
        let bridge = Arc::new(Mutex::new(HostBridge::new()));
        let mut slots = [const { None }; SLOTS];
        slots[0] = Some(Arc::clone(&bridge) as SharedFunction);
        Self { slots, bridge }
    }
}

impl PciBus {
    /// Puts a function into a slot that is free, 1 to 31. False when it is not.
    #[must_use]
    pub fn insert(&mut self, slot: usize, function: SharedFunction) -> bool {
        match self.slots.get_mut(slot) {
            Some(free @ None) => {
                *free = Some(function);
                true
            }
            _ => false,
        }
    }

    /// Reads; where there is no function, or nothing of it, all bits are ones.
    fn read(&self, at: Place, data: &mut [u8]) {
        match self.find(at) {
            Some(_) if at.offset >= ConfigSpace::LEN => data.fill(0),
            Some(found) if at.offset + data.len() <= ConfigSpace::LEN => {
                lock(found).read_config(at.offset, data);
            }
            _ => data.fill(0xff),
        }
    }

    fn write(&self, at: Place, data: &[u8]) {
        if let Some(found) = self.find(at)
            && at.offset + data.len() <= ConfigSpace::LEN
        {
            lock(found).write_config(at.offset, data);
        }
    }

    fn find(&self, at: Place) -> Option<&Mutex<dyn PciFunction>> {
        let slot = self.slots.get(at.slot).filter(|_| at.function == 0);
        slot?.as_deref()
    }
}

/// A place in the configuration spaces of the bus.
#[derive(Clone, Copy, Debug)]
struct Place {
    slot: usize,
    function: usize,
    offset: usize,
}

/// The enhanced configuration access mechanism: configuration space as memory.
#[derive(Debug)]
pub struct Ecam(pub Arc<PciBus>);

impl Ecam {
    fn target(offset: u64) -> Place {
        let offset = offset as usize;
        Place {
            slot: offset >> 15 & 0x1f,
            function: offset >> 12 & 7,
            offset: offset & 0xfff,
        }
    }
}

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(Self::target(offset), data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.write(Self::target(offset), data);
    }

    // Of the functions, only the bridge is on no other bus.
    fn reset(&mut self) {
        lock(&self.0.bridge).0.reset();
    }

    fn save(&self) -> Result<Value, BoxError> {
        Ok(lock(&self.0.bridge).0.save())
    }

    fn check(&self, state: &Value) -> Result<(), BoxError> {
        ConfigSpace::check(state)
    }

    fn restore(&mut self, state: Value) -> Result<(), BoxError> {
        Ok(lock(&self.0.bridge).0.restore(state)?)
    }
}

/// Configuration mechanism #1: an address register at port 0xcf8, and data at 0xcfc.
#[derive(Debug)]
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: u32,
}

impl ConfigPorts {
    const ENABLE: u32 = 1 << 31;
    const DATA: u64 = 4;

    /// Ports for `bus`.
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus, address: 0 }
    }

    /// What the address register points to, on bus 0.
    fn target(&self, port: u64) -> Option<Place> {
        let address = self.address as usize;
        let on_bus_0 = self.address & Self::ENABLE != 0 && address >> 16 & 0xff == 0;
        let within = port.checked_sub(Self::DATA)? as usize;
        on_bus_0.then_some(Place {
            slot: address >> 11 & 0x1f,
            function: address >> 8 & 7,
            offset: (address & 0xfc) + within,
        })
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (self.target(offset), offset, data.len()) {
            (Some(target), ..) => self.bus.read(target, data),
            (None, 0, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(target) = self.target(offset) {
            self.bus.write(target, data);
        } else if let (0, Ok(word)) = (offset, data.try_into()) {
            self.address = u32::from_le_bytes(word);
        }
    }

    fn reset(&mut self) {
        self.address = 0;
    }

    fn save(&self) -> Result<Value, BoxError> {
        Ok(self.address.into())
    }

    fn check(&self, state: &Value) -> Result<(), BoxError> {
        check::<u32>(state)
    }

    fn restore(&mut self, state: Value) -> Result<(), BoxError> {
        self.address = serde_json::from_value(state)?;
        Ok(())
    }
}

/// The function that the root of the bus is seen by. It does nothing.
#[derive(Debug)]
struct HostBridge(ConfigSpace);

impl HostBridge {
    fn new() -> Self {
        // The ids of QEMU's generic PCI Express host bridge, which guests know.
        Self(ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: 0x06_0000,
            ..Identity::default()
        }))
    }
}

impl PciFunction for HostBridge {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.0.write(offset, data);
    }
}

#[cfg(test)]
mod tests;
