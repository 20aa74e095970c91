//! What has been read and written, over all drivers that the disk has had.

use std::fmt;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

/// What a queue has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct BlkCounters {
    /// Reads that succeeded.
    pub reads: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Discards and writes of zeros that succeeded.
    pub discards: u64,
    /// Requests that the host failed.
    pub errors: u64,
    /// Requests that no disk could carry out: past its end, of an unknown kind.
    pub refused: u64,
    /// Chains that were no request to begin with.
    pub bad_chains: u64,
    /// Times that the rate limit held requests back.
    pub limited: u64,
    /// The driver's notifications.
    pub kicks: u64,
    /// Interrupts.
    pub interrupts: u64,
    /// Times that the queue's thread has waited for something to do.
    pub wakeups: u64,
}

/// The counters of a queue: its thread publishes them whenever it has nothing to do, and every few
/// milliseconds while it has.
pub(super) type SharedCounters = Arc<Mutex<BlkCounters>>;

impl BlkCounters {
    /// Both together.
    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            reads: self.reads + other.reads,
            read_bytes: self.read_bytes + other.read_bytes,
            writes: self.writes + other.writes,
            written_bytes: self.written_bytes + other.written_bytes,
            flushes: self.flushes + other.flushes,
            discards: self.discards + other.discards,
            errors: self.errors + other.errors,
            refused: self.refused + other.refused,
            bad_chains: self.bad_chains + other.bad_chains,
            limited: self.limited + other.limited,
            kicks: self.kicks + other.kicks,
            interrupts: self.interrupts + other.interrupts,
            wakeups: self.wakeups + other.wakeups,
        }
    }
}

impl fmt::Display for BlkCounters {
    /// For people: what was read and written, and of everything else what has happened at all.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} reads, {} bytes", self.reads, self.read_bytes)?;
        write!(f, "; {} writes, {} bytes", self.writes, self.written_bytes)?;
        let list = [
            (self.flushes, "flushes"),
            (self.discards, "discards"),
            (self.errors, "errors"),
            (self.refused, "refused"),
            (self.bad_chains, "bad chains"),
            (self.limited, "times rate-limited"),
            (self.kicks, "kicks"),
            (self.interrupts, "interrupts"),
            (self.wakeups, "wake-ups"),
        ];
        list.into_iter()
            .filter(|(count, _)| *count > 0)
            .try_for_each(|(count, what)| write!(f, ", {count} {what}"))
    }
}
