//! MSI-X: a table of messages, one for each vector (PCI Local Bus Specification 3.0, 6.8.2).

use std::fmt;

use serde::{Deserialize, Serialize};
use vm_memory::ByteValued;

use crate::irq::IrqLine;
use crate::pci::config::{CapabilityId, ConfigSpace};

/// Bytes of a table entry: address, upper address, data, vector control.
pub const MSIX_ENTRY_LEN: usize = size_of::<Entry>();

/// Offset of Message Control in the capability.
const CONTROL: usize = 2;
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;
/// Vector control: masked.
const MASKED: u32 = 1;

/// Connects vectors to the machine. Each vector is an eventfd; while it is disconnected, what is
/// written to it stays there, and goes out when it is connected again.
pub trait MsixRoutes: Send + fmt::Debug {
    /// From now on `vector` sends this message.
    fn connect(&self, vector: usize, address: u64, data: u32);
    /// From now on `vector` sends nothing.
    fn disconnect(&self, vector: usize);
}

/// An entry of the table, little-endian as this host.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

// SAFETY: integers only, and no padding between them: one of 64 bits and two of 32.
unsafe impl ByteValued for Entry {}

impl Entry {
    /// A vector is masked until the guest says otherwise.
    const NEW: Self = Self {
        address: 0,
        data: 0,
        control: MASKED,
    };
}

/// The MSI-X state of a function.
#[derive(Debug)]
pub struct Msix {
    entries: Vec<Entry>,
    /// The message that each vector sends now; `None` while it is masked.
    connected: Vec<Option<(u64, u32)>>,
    routes: Box<dyn MsixRoutes>,
    capability: usize,
}

impl Msix {
    /// Adds the capability: `vectors` vectors, table and pending bits in BAR 0 at these offsets.
    pub fn new(
        config: &mut ConfigSpace,
        vectors: usize,
        table: u32,
        pending: u32,
        routes: Box<dyn MsixRoutes>,
    ) -> Self {
        let size = (vectors - 1) as u16;
        // The low three bits name the BAR: 0.
        let body = [
            &size.to_le_bytes()[..],
            &table.to_le_bytes(),
            &pending.to_le_bytes(),
        ]
        .concat();
        let capability = config.add_capability(CapabilityId::MsiX, &body);
        config.make_writable(capability + CONTROL, &(ENABLE | MASK_ALL).to_le_bytes());
        Self {
            entries: vec![Entry::NEW; vectors],
            connected: vec![None; vectors],
            routes,
            capability,
        }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> usize {
        self.entries.len()
    }

    /// Whether the guest has turned MSI-X on.
    pub fn is_enabled(&self, config: &ConfigSpace) -> bool {
        config.word(self.capability + CONTROL) & ENABLE != 0
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        let (entry, at) = (offset / MSIX_ENTRY_LEN, offset % MSIX_ENTRY_LEN);
        let bytes = self.entries.get(entry).map(ByteValued::as_slice);
        match bytes.and_then(|bytes| bytes.get(at..at + data.len())) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0),
        }
    }

    /// The guest writes the table, in 32 or 64 bits.
    pub fn write_table(&mut self, config: &ConfigSpace, offset: usize, data: &[u8]) {
        let at = offset % MSIX_ENTRY_LEN;
        let aligned = matches!(data.len(), 4 | 8) && at.is_multiple_of(data.len());
        let Some(entry) = self
            .entries
            .get_mut(offset / MSIX_ENTRY_LEN)
            .filter(|_| aligned)
        else {
            return;
        };
        entry.as_mut_slice()[at..at + data.len()].copy_from_slice(data);
        // The other bits of vector control are reserved and read as 0.
        entry.control &= MASKED;
        self.update(config);
    }

    /// The pending bits: vectors that wait to be unmasked.
    pub fn read_pending(&self, lines: &[IrqLine], offset: usize, data: &mut [u8]) {
        let mut bits = 0u64;
        for (vector, line) in lines.iter().enumerate().take(64) {
            let waits = self.connected.get(vector).is_some_and(Option::is_none) && line.is_raised();
            bits |= u64::from(waits) << vector;
        }
        crate::virtio::read_at(&bits.to_le_bytes(), offset, data);
    }

    /// Masks and disconnects all vectors, after [`ConfigSpace::reset`].
    pub fn reset(&mut self, config: &ConfigSpace) {
        self.entries.fill(Entry::NEW);
        self.update(config);
    }

    /// The table.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Sets up the table as another one was, which has as many vectors, and connects them.
    pub fn restore(&mut self, config: &ConfigSpace, entries: &[Entry]) {
        for (entry, saved) in self.entries.iter_mut().zip(entries) {
            *entry = *saved;
        }
        self.update(config);
    }

    /// Connects and disconnects vectors as table and control register say. To be called after a
    /// write to configuration space.
    pub fn update(&mut self, config: &ConfigSpace) {
        let control = config.word(self.capability + CONTROL);
        let open = control & ENABLE != 0 && control & MASK_ALL == 0;
        for (vector, (entry, connected)) in self.entries.iter().zip(&mut self.connected).enumerate()
        {
            let unmasked = open && entry.control & MASKED == 0;
            let wanted = unmasked.then_some((entry.address, entry.data));
            if *connected == wanted {
                continue;
            }
            match wanted {
                Some((address, data)) => self.routes.connect(vector, address, data),
                None => self.routes.disconnect(vector),
            }
            *connected = wanted;
        }
    }
}
