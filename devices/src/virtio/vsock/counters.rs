//! What is counted of a device's connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Counters of a vsock device. But for the connections that are open, they only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct VsockCounters {
    /// Connections that there are now, those that wait for the guest's answer included.
    pub open: u64,
    /// Connections that programs of the host have asked for.
    pub from_host: u64,
    /// Connections that the guest has asked for.
    pub from_guest: u64,
    /// Of those of either side, those that were refused.
    pub refused: u64,
    /// Bytes of data that the guest was sent.
    pub rx_bytes: u64,
    /// Bytes of data that the guest has sent.
    pub tx_bytes: u64,
}

/// The same while the device's thread counts.
#[derive(Debug, Default)]
pub(super) struct Counting {
    pub open: AtomicU64,
    pub from_host: AtomicU64,
    pub from_guest: AtomicU64,
    pub refused: AtomicU64,
    pub rx_bytes: AtomicU64,
    pub tx_bytes: AtomicU64,
}

/// Counts `n` more.
pub(super) fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Reads a device's counters.
#[derive(Clone, Debug)]
pub struct VsockHandle(pub(super) Arc<Counting>);

impl VsockHandle {
    /// What they are now.
    pub fn counters(&self) -> VsockCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        VsockCounters {
            open: read(&self.0.open),
            from_host: read(&self.0.from_host),
            from_guest: read(&self.0.from_guest),
            refused: read(&self.0.refused),
            rx_bytes: read(&self.0.rx_bytes),
            tx_bytes: read(&self.0.tx_bytes),
        }
    }
}
