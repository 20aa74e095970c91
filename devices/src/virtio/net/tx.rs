//! From the guest to the network: chains of the transmit queue become frames of the backend.

use std::io;
use std::sync::Arc;

use super::backend::Backend;
use super::observe::Observer;
use crate::virtio::queue::{Direction, MAX_SEGMENTS, Next, Ring};

/// What passed, and what did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TxCounters {
    /// Frames that the backend took.
    pub frames: u64,
    /// Their bytes, with the headers.
    pub bytes: u64,
    /// Chains that were no frame to begin with.
    pub bad_chains: u64,
    /// Frames that the kernel refused (a header that lies, fewer than 14 bytes).
    pub refused: u64,
}

/// Why [`TxQueue::send`] stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TxStop {
    /// The queue is empty; the driver will notify.
    Empty,
    /// The backend has no room; it will poll writable.
    Full,
    /// The budget is used up.
    Budget,
    /// The ring makes no sense.
    Broken,
}

/// The transmit queue.
#[derive(Debug)]
pub struct TxQueue {
    ring: Ring,
    observer: Arc<Observer>,
    iovecs: Vec<libc::iovec>,
    counters: TxCounters,
}

impl TxQueue {
    /// Sends what `ring` holds, and shows it to `observer`.
    pub fn new(ring: Ring, observer: Arc<Observer>) -> Self {
        Self {
            ring,
            observer,
            iovecs: Vec::with_capacity(MAX_SEGMENTS),
            counters: TxCounters::default(),
        }
    }

    /// What passed so far.
    pub fn counters(&self) -> TxCounters {
        self.counters
    }

    /// Sends up to `budget` frames. Says why it stopped, and whether to interrupt the driver.
    pub fn send(&mut self, backend: &impl Backend, budget: usize) -> (TxStop, bool) {
        let before = self.counters;
        let mut left = budget;
        let stop = loop {
            self.ring.disable_notification();
            match self.drain(backend, &mut left) {
                // Frames came while notifications were still off. The retry costs budget too, or
                // a driver that moves its index to and fro would keep the thread here.
                TxStop::Empty if self.ring.enable_notification() && left > 0 => left -= 1,
                TxStop::Empty if left == 0 => break TxStop::Budget,
                stop => break stop,
            }
        };
        (stop, self.counters != before && self.ring.needs_interrupt())
    }

    fn drain(&mut self, backend: &impl Backend, left: &mut usize) -> TxStop {
        while *left > 0 {
            *left -= 1;
            self.iovecs.clear();
            let chain = match self.ring.next(Direction::FromDriver, &mut self.iovecs) {
                Next::Chain(chain) => chain,
                Next::Bad => {
                    self.counters.bad_chains += 1;
                    continue;
                }
                Next::Empty => return TxStop::Empty,
                Next::Broken => return TxStop::Broken,
            };
            // SAFETY: the iovecs are those of a chain that `Ring::next` resolved inside guest
            // memory, which the ring keeps mapped.
            match unsafe { backend.write_frame(&self.iovecs) } {
                Ok(_) => {
                    // SAFETY: as above.
                    unsafe { self.observer.look(&self.iovecs) };
                    self.counters.frames += 1;
                    self.counters.bytes += chain.len as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.ring.undo_next();
                    return TxStop::Full;
                }
                // EINVAL for a bad header, EMSGSIZE, ENETDOWN: the frame is lost, as it would be
                // on a wire, and the device lives on.
                Err(error) => {
                    self.counters.refused += 1;
                    log::trace!("frame of {} bytes refused: {error}", chain.len);
                }
            }
            self.ring.complete(chain.head, 0);
        }
        TxStop::Budget
    }
}
