//! Everything that is counted while a guest runs.
//!
//! Reading it keeps nothing waiting, and what is counted by threads that are busy is at most some
//! milliseconds old. Counters begin at 0 with the guest, and never go back: a reset of a driver or of
//! the guest does not change them.

use std::fs;

use devices::virtio::balloon::BalloonHandle;
use devices::virtio::blk::BlkHandle;
use devices::virtio::net::NetHandle;
use net::MacAddr;
use serde::{Deserialize, Serialize};

pub use crate::kvm::exits::ExitCounts;
pub use devices::virtio::blk::BlkCounters;
pub use devices::virtio::net::counters::{CtrlCounters, PairCounters, RxCounters, TxCounters};
pub use devices::virtio::vsock::VsockCounters;

/// A guest's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Stats {
    /// Microseconds since its vCPUs were started.
    pub uptime_us: u64,
    /// What each vCPU has left the guest for.
    pub vcpus: Vec<ExitCounts>,
    /// Its memory.
    pub memory: MemoryStats,
    /// Its balloon, if it has one.
    pub balloon: Option<BalloonStats>,
    /// Its sockets to the host, if it has them.
    pub vsock: Option<VsockCounters>,
    /// Bytes that it has written on its console, if it has one.
    pub console_bytes: Option<u64>,
    /// Its NICs, in order.
    pub nics: Vec<NicStats>,
    /// Its disks, in order.
    pub disks: Vec<DiskStats>,
}

/// A guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct MemoryStats {
    /// Bytes that the guest has.
    pub size: u64,
    /// Bytes of anonymous and shared memory that the host holds for the whole process: nearly all of it is what
    /// the guest has touched and not given back. Huge pages that the host has set aside (`--hugepages`) do
    /// not count.
    pub resident: u64,
}

/// A balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct BalloonStats {
    /// Bytes that the guest is asked to hold back.
    pub target: u64,
    /// Bytes that its driver says it does.
    pub actual: u64,
}

/// A NIC.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct NicStats {
    /// `net0`, and so on.
    pub name: String,
    /// Its MAC address.
    pub mac: String,
    /// Whether the guest finds a link.
    pub link: bool,
    /// The kernel moves the frames (vhost-net), and nothing counts them here: `queues` stay at 0.
    pub vhost: bool,
    /// Frames that the guest has sent from another MAC address than the NIC's, and which get no answer.
    pub wrong_source_frames: u64,
    /// Each queue pair, from the first on.
    pub queues: Vec<PairCounters>,
    /// The control queue.
    pub ctrl: CtrlCounters,
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct DiskStats {
    /// `disk0`, and so on.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// Each queue.
    pub queues: Vec<BlkCounters>,
}

impl MemoryStats {
    /// Those of a guest with `size` bytes in this process.
    pub(crate) fn of_process(size: u64) -> Self {
        Self {
            size,
            resident: resident().unwrap_or(0),
        }
    }
}

/// What /proc/self/status counts of anonymous memory, and of memory that a memfd holds.
fn resident() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let kib = |name| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    };
    Some((kib("RssAnon:")? + kib("RssShmem:")?) << 10)
}

impl From<&BalloonHandle> for BalloonStats {
    fn from(balloon: &BalloonHandle) -> Self {
        Self {
            target: balloon.target(),
            actual: balloon.actual(),
        }
    }
}

impl From<&NetHandle> for NicStats {
    fn from(nic: &NetHandle) -> Self {
        let mac = MacAddr::try_from(nic.config().mac());
        Self {
            name: nic.name().to_owned(),
            mac: mac.map(|mac| mac.to_string()).unwrap_or_default(),
            link: nic.config().is_up(),
            vhost: nic.has_vhost(),
            wrong_source_frames: nic.observer().wrong_source(),
            queues: nic.pairs(),
            ctrl: nic.ctrl(),
        }
    }
}

impl From<&BlkHandle> for DiskStats {
    fn from(disk: &BlkHandle) -> Self {
        Self {
            name: disk.name().to_owned(),
            size: disk.size(),
            queues: disk.queues(),
        }
    }
}
