//! The configuration space of the block device: what the driver reads of it, and who changes it.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::request::{MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZEROES_SECTORS, SIZE_MAX};
use crate::disk::{BlockSizes, SECTOR};
use crate::lock;
use crate::virtio::{Interrupt, read_at};

/// Bytes of `struct virtio_blk_config` up to the last field that has a feature here (virtio 1.2,
/// 5.2.4).
const LEN: usize = 60;
/// Offset of `writeback`, the one field that a driver writes.
pub(super) const WRITEBACK: usize = 32;

/// What does not change while the device lives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub blocks: BlockSizes,
    pub queues: u16,
    /// The most pieces of data that a request may have.
    pub seg_max: u32,
}

/// The configuration space. The control thread grows the disk, the driver switches its write cache.
#[derive(Debug)]
pub(super) struct ConfigSpace {
    layout: Layout,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    capacity: u64,
    writeback: bool,
    generation: u32,
    interrupt: Option<Arc<dyn Interrupt>>,
    /// It has grown while there was no driver to be notified.
    missed: bool,
}

/// What another device needs to show the same. The size is the image's.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ConfigState {
    writeback: bool,
    generation: u32,
}

impl ConfigSpace {
    /// Of a disk of `capacity` bytes.
    pub fn new(layout: Layout, capacity: u64) -> Self {
        let state = State {
            capacity,
            writeback: true,
            generation: 0,
            interrupt: None,
            missed: false,
        };
        Self {
            layout,
            state: Mutex::new(state),
        }
    }

    /// Fills `data` from `offset` on.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let state = lock(&self.state);
        let Layout {
            blocks,
            queues,
            seg_max,
        } = self.layout;
        let mut bytes = [0; LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..][..field.len()].copy_from_slice(field);
        put(0, &(state.capacity / SECTOR).to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &seg_max.to_le_bytes());
        put(20, &blocks.logical.to_le_bytes());
        // Logical blocks in a physical one, as a power of two.
        let exponent = (blocks.physical / blocks.logical.max(1)).max(1).ilog2();
        put(24, &[exponent as u8]);
        // The least that a transfer is best made of, in logical blocks.
        put(26, &((1_u32 << exponent) as u16).to_le_bytes());
        put(WRITEBACK, &[state.writeback.into()]);
        put(34, &queues.to_le_bytes());
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &(MAX_RANGES as u32).to_le_bytes());
        put(44, &(blocks.discard / SECTOR as u32).to_le_bytes());
        put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
        put(52, &1_u32.to_le_bytes());
        put(56, &[1]);
        read_at(&bytes, offset, data);
    }

    /// Whether the driver wants a write cache, as far as it can choose.
    pub fn writeback(&self) -> bool {
        lock(&self.state).writeback
    }

    /// The driver chooses, or a reset does.
    pub fn set_writeback(&self, on: bool) {
        lock(&self.state).writeback = on;
    }

    /// Shows a new size, and notifies the driver.
    pub fn set_capacity(&self, capacity: u64) {
        let mut state = lock(&self.state);
        if state.capacity == capacity {
            return;
        }
        state.capacity = capacity;
        state.generation = state.generation.wrapping_add(1);
        match &state.interrupt {
            Some(interrupt) => interrupt.config(),
            None => state.missed = true,
        }
    }

    /// Changes with the size.
    pub fn generation(&self) -> u32 {
        lock(&self.state).generation
    }

    /// From now on a driver is notified of changes, and of those before it if it was there then.
    pub fn attach(&self, interrupt: Arc<dyn Interrupt>, resumed: bool) {
        let mut state = lock(&self.state);
        if std::mem::take(&mut state.missed) && resumed {
            interrupt.config();
        }
        state.interrupt = Some(interrupt);
    }

    /// Until it is attached again, a driver is not notified.
    pub fn detach(&self) {
        lock(&self.state).interrupt = None;
    }

    pub fn save(&self) -> ConfigState {
        let state = lock(&self.state);
        ConfigState {
            writeback: state.writeback,
            generation: state.generation,
        }
    }

    pub fn restore(&self, saved: &ConfigState) {
        let mut state = lock(&self.state);
        state.writeback = saved.writeback;
        state.generation = saved.generation;
        // The image may have another size here.
        state.missed = true;
    }
}
