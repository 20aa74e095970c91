//! What the vCPUs leave the guest for, counted.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// The exits of one vCPU to the monitor by their kinds: KVM handles most by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct ExitCounts {
    /// The guest read a port.
    pub io_in: u64,
    /// The guest wrote a port.
    pub io_out: u64,
    /// The guest read a device's register in memory.
    pub mmio_read: u64,
    /// The guest wrote one.
    pub mmio_write: u64,
    /// The guest halted where KVM does not wait itself.
    pub hlt: u64,
    /// The monitor, or a signal, wanted the thread.
    pub interrupted: u64,
    /// All else.
    pub other: u64,
}

impl fmt::Display for ExitCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            io_in,
            io_out,
            mmio_read,
            mmio_write,
            hlt,
            interrupted,
            other,
        } = self;
        write!(
            f,
            "{io_in} port reads, {io_out} port writes, {mmio_read} MMIO reads, {mmio_write} MMIO \
             writes, {hlt} HLT, {interrupted} interrupted, {other} other"
        )
    }
}

/// The counters, which the vCPU's thread alone changes and any other may read. They share no cache
/// line with those of another vCPU (two, where the processor fetches them in pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Exits {
    pub io_in: Counter,
    pub io_out: Counter,
    pub mmio_read: Counter,
    pub mmio_write: Counter,
    pub hlt: Counter,
    pub interrupted: Counter,
    pub other: Counter,
}

impl Exits {
    /// How many there are by now.
    pub fn read(&self) -> ExitCounts {
        ExitCounts {
            io_in: self.io_in.get(),
            io_out: self.io_out.get(),
            mmio_read: self.mmio_read.get(),
            mmio_write: self.mmio_write.get(),
            hlt: self.hlt.get(),
            interrupted: self.interrupted.get(),
            other: self.other.get(),
        }
    }
}

/// A counter of one writer, which needs no locked instruction.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    /// Counts one more.
    pub fn add(&self) {
        self.0.store(self.get() + 1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
