//! What has passed a queue pair and what has not, over all drivers that the NIC has had.

use std::fmt;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::lock;

/// What passed to the driver, and what did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct RxCounters {
    /// Frames given to the driver.
    pub frames: u64,
    /// Chains that they filled.
    pub chains: u64,
    /// Their bytes, with the headers.
    pub bytes: u64,
    /// Frames that the driver did not want, or cannot take as they came.
    pub filtered: u64,
    /// Chains that could not hold a frame.
    pub bad_chains: u64,
    /// Times that the driver had no buffers left.
    pub starved: u64,
    /// Frames larger than any may be, or than the driver's whole ring, or without mergeable buffers
    /// one chain, could hold.
    pub too_large: u64,
    /// Reads that failed.
    pub errors: u64,
    /// Times that the rate limit held frames back.
    pub limited: u64,
    /// DHCP answers whose checksum was completed.
    pub dhcp_checksums: u64,
}

/// What passed from the driver, and what did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct TxCounters {
    /// Frames that the backend took.
    pub frames: u64,
    /// Their bytes, with the headers.
    pub bytes: u64,
    /// Chains that were no frame to begin with.
    pub bad_chains: u64,
    /// Frames that the backend refused: a header that lies, fewer than 14 bytes, on a user network a destination on the
    /// host's loopback.
    pub refused: u64,
    /// Times that the backend had no room.
    pub full: u64,
    /// Times that the rate limit held frames back.
    pub limited: u64,
}

/// What a queue pair has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct PairCounters {
    /// The receive queue.
    pub rx: RxCounters,
    /// The transmit queue.
    pub tx: TxCounters,
    /// The driver's notifications of the receive queue.
    pub rx_kicks: u64,
    /// The driver's notifications of the transmit queue.
    pub tx_kicks: u64,
    /// Interrupts for the receive queue.
    pub rx_interrupts: u64,
    /// Interrupts for the transmit queue.
    pub tx_interrupts: u64,
    /// Times that the pair's thread has waited for something to do.
    pub wakeups: u64,
}

/// What the control queue has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct CtrlCounters {
    /// Commands.
    pub commands: u64,
    /// Those that were unknown, wrong, or not granted.
    pub refused: u64,
    /// Chains that were no command to begin with.
    pub bad_chains: u64,
    /// The driver's notifications.
    pub kicks: u64,
    /// Interrupts.
    pub interrupts: u64,
}

/// The counters of a pair: its thread publishes them whenever it has nothing to do, and every few
/// milliseconds while it has.
pub type SharedCounters = Arc<Mutex<PairCounters>>;

/// The counters as they were published last.
pub fn read(counters: &SharedCounters) -> PairCounters {
    *lock(counters)
}

impl fmt::Display for PairCounters {
    /// For people: what passed, and of everything else what has happened at all.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rx, tx, .. } = self;
        write!(f, "received {} frames, {} bytes", rx.frames, rx.bytes)?;
        let list = |f: &mut fmt::Formatter<'_>, counts: &[(u64, &str)]| {
            counts
                .iter()
                .filter(|(count, _)| *count > 0)
                .try_for_each(|(count, what)| write!(f, ", {count} {what}"))
        };
        list(
            f,
            &[
                (rx.filtered, "filtered"),
                (rx.bad_chains, "bad chains"),
                (rx.starved, "times without buffers"),
                (rx.too_large, "too large"),
                (rx.errors, "errors"),
                (rx.limited, "times rate-limited"),
                (rx.dhcp_checksums, "DHCP checksums completed"),
                (self.rx_kicks, "kicks"),
                (self.rx_interrupts, "interrupts"),
            ],
        )?;
        write!(f, "; sent {} frames, {} bytes", tx.frames, tx.bytes)?;
        list(
            f,
            &[
                (tx.bad_chains, "bad chains"),
                (tx.refused, "refused"),
                (tx.full, "times without room"),
                (tx.limited, "times rate-limited"),
                (self.tx_kicks, "kicks"),
                (self.tx_interrupts, "interrupts"),
            ],
        )?;
        write!(f, "; {} wake-ups", self.wakeups)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_told_without_those_at_zero() {
        let mut counters = PairCounters::default();
        assert_eq!(
            counters.to_string(),
            "received 0 frames, 0 bytes; sent 0 frames, 0 bytes; 0 wake-ups"
        );
        counters.rx.filtered = 3;
        counters.tx.refused = 1;
        counters.tx_kicks = 2;
        assert_eq!(
            counters.to_string(),
            "received 0 frames, 0 bytes, 3 filtered; sent 0 frames, 0 bytes, 1 refused, 2 kicks; \
             0 wake-ups"
        );
    }
}
