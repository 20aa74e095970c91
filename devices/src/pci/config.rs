//! The configuration space of a function: a type 0 header and capabilities (PCI Local Bus
//! Specification 3.0, chapter 6).

use serde_json::{Value, json};

use crate::bus::{BoxError, check};

/// What a function is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Base class, subclass and programming interface, 8 bits each.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// Kinds of capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapabilityId {
    /// Of the vendor's own making: virtio's structures.
    Vendor = 0x09,
    /// MSI-X.
    MsiX = 0x11,
}

/// Configuration space, with the bits that a guest may change.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: [u8; Self::LEN],
    writable: [u8; Self::LEN],
    /// What BAR 0 holds, unless the guest has just asked for its size.
    bar_0: u32,
    /// The last capability, to be linked to the next one.
    last: usize,
    /// Where the next capability goes.
    free: usize,
}

const VENDOR: usize = 0x00;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CLASS: usize = 0x08;
const CACHE_LINE: usize = 0x0c;
const BAR_0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const HEADER_LEN: usize = 0x40;

/// Status: there is a list of capabilities.
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// Command: bus master.
const COMMAND_MASTER: u16 = 1 << 2;
/// Command: memory space, bus master, interrupt disable.
const COMMAND_WRITABLE: u16 = 1 << 1 | COMMAND_MASTER | 1 << 10;

impl ConfigSpace {
    /// Bytes that a function of this kind has.
    pub const LEN: usize = 256;

    /// A function without BARs and capabilities.
    pub fn new(identity: Identity) -> Self {
        let (bytes, writable) = ([0; Self::LEN], [0; Self::LEN]);
        let mut new = Self {
            bytes,
            writable,
            bar_0: 0,
            last: CAPABILITIES,
            free: HEADER_LEN,
        };
        new.set(VENDOR, &identity.vendor.to_le_bytes());
        new.set(VENDOR + 2, &identity.device.to_le_bytes());
        new.set(
            CLASS,
            &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes(),
        );
        new.set(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        new.set(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        new.make_writable(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        new.make_writable(CACHE_LINE, &[0xff]);
        new.make_writable(INTERRUPT_LINE, &[0xff]);
        new
    }

    /// Gives the function BAR 0: 32-bit memory of `len` bytes, a power of two, at `base`, a
    /// multiple of it.
    ///
    /// A guest that writes ones there reads the size (6.2.5.1); whatever else it writes, it reads
    /// the base again.
    pub fn set_bar_0(&mut self, base: u32, len: u32) {
        self.bar_0 = base;
        self.set(BAR_0, &base.to_le_bytes());
        self.make_writable(BAR_0, &(!(len - 1)).to_le_bytes());
    }

    /// Adds a capability: `body` follows its id and the link to the next. Returns its offset.
    pub fn add_capability(&mut self, id: CapabilityId, body: &[u8]) -> usize {
        let at = self.free;
        let link = if self.last == CAPABILITIES {
            CAPABILITIES
        } else {
            self.last + 1
        };
        self.set(link, &[at as u8]);
        self.set(STATUS, &[STATUS_CAPABILITIES]);
        self.set(at, &[id as u8, 0]);
        self.set(at + 2, body);
        self.last = at;
        self.free = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Lets the guest change the bits of `mask` from `offset` on.
    pub fn make_writable(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Sets bytes, writable or not.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Whether the guest lets the function reach memory by itself (6.2.2).
    pub fn bus_master_enabled(&self) -> bool {
        self.word(COMMAND) & COMMAND_MASTER != 0
    }

    /// A 16-bit register.
    pub fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// A 32-bit register.
    pub fn dword(&self, offset: usize) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    /// The guest reads.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        match self.bytes.get(offset..offset + data.len()) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    /// Takes back what the guest has written: at power-on all bits that it may change are 0, but
    /// for the place of BAR 0.
    pub fn reset(&mut self) {
        self.write(0, &[0; Self::LEN]);
    }

    /// All of it, as the guest reads it.
    pub fn save(&self) -> Value {
        json!(&self.bytes[..])
    }

    /// Finds out whether what was saved is a configuration space.
    ///
    /// # Errors
    ///
    /// Fails when it is none.
    pub fn check(state: &Value) -> Result<(), BoxError> {
        check::<Vec<u8>>(state)
    }

    /// Takes from what was saved what a guest may have changed.
    ///
    /// # Errors
    ///
    /// As [`ConfigSpace::check`].
    pub fn restore(&mut self, state: Value) -> Result<(), serde_json::Error> {
        let bytes: Vec<u8> = serde_json::from_value(state)?;
        self.write(0, &bytes);
        Ok(())
    }

    /// The guest writes.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let cells = self.bytes.iter_mut().zip(&self.writable);
        for ((byte, mask), new) in cells.skip(offset).zip(data) {
            *byte = (*byte & !mask) | (new & mask);
        }
        let size_mask = u32::from_le_bytes([0, 1, 2, 3].map(|n| self.writable[BAR_0 + n]));
        if self.dword(BAR_0) != size_mask {
            self.set(BAR_0, &self.bar_0.to_le_bytes());
        }
    }
}
