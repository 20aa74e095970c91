//! A range of physical addresses with registers in it.

use crate::memory::{Word, read_at, write_at};

/// Registers, which are no RAM.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// The first physical address.
    pub base: u64,
    /// How many bytes it has.
    pub size: u64,
}

impl Region {
    /// Reads a register of any width.
    pub fn read<T: Word>(&self, offset: u64) -> T {
        // SAFETY: everything below 4 GiB is mapped; this is no RAM, and reading is at most an
        // experiment on a device.
        unsafe { read_at(self.inside::<T>(offset)) }
    }

    /// Writes a register of any width.
    pub fn write<T: Word>(&self, offset: u64, value: T) {
        // SAFETY: everything below 4 GiB is mapped, and this is no RAM. What a device then does to
        // memory is up to the rings, which lie in `Shared` memory, or, in the hostile mode, to the
        // monitor's care.
        unsafe { write_at(self.inside::<T>(offset), value) };
    }

    /// Writes an address into the two halves of a register.
    pub fn write_address(&self, offset: u64, address: u64) {
        self.write(offset, address as u32);
        self.write(offset + 4, (address >> 32) as u32);
    }

    /// A part of it, or none where it would not be inside.
    pub fn part(&self, offset: u64, size: u64) -> Option<Self> {
        let is_inside = offset <= self.size && size <= self.size - offset;
        is_inside.then_some(Self {
            base: self.base + offset,
            size,
        })
    }

    fn inside<T>(&self, offset: u64) -> u64 {
        assert!(
            offset + size_of::<T>() as u64 <= self.size,
            "{offset:#x} is outside of {self:x?}"
        );
        self.base + offset
    }
}
