//! From the guest to the network: chains of the transmit queue become frames of the backend.

use std::io;
use std::sync::Arc;

use super::backend::Backend;
use super::capture::Direction;
use super::counters::TxCounters;
use super::hooks::Hooks;
use super::observe::Observer;
use super::pair::Stop;
use crate::virtio::queue::{Buffers, Next, Queue};

/// Frames that are used together: the driver's processor then loses its copy of the index less often.
const BATCH: u16 = 16;

/// The transmit queue.
#[derive(Debug)]
pub struct TxQueue {
    queue: Queue,
    observer: Arc<Observer>,
    buffers: Buffers,
    /// What happens to each frame besides.
    pub hooks: Hooks,
    /// What has passed so far.
    pub counters: TxCounters,
}

impl TxQueue {
    /// Sends what `queue` holds, and shows it to `observer`.
    pub fn new(queue: Queue, observer: Arc<Observer>) -> Self {
        Self {
            queue,
            observer,
            buffers: Buffers::default(),
            hooks: Hooks::default(),
            counters: TxCounters::default(),
        }
    }

    /// Where the queue stands.
    pub fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Sends up to `budget` frames. Says why it stopped, and whether to interrupt the driver.
    pub fn send(&mut self, backend: &impl Backend, budget: usize) -> (Stop, bool) {
        let mut left = budget;
        let stop = loop {
            self.queue.disable_notification();
            match self.drain(backend, &mut left) {
                // Frames came while notifications were still off. The retry costs budget too, or
                // a driver that moves its index to and fro would keep the thread here.
                Stop::Idle if self.queue.enable_notification() && left > 0 => left -= 1,
                Stop::Idle if left == 0 => break Stop::Budget,
                stop => break stop,
            }
        };
        let stop = match backend.flush() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && stop == Stop::Idle => {
                self.counters.full += 1;
                Stop::Full
            }
            _ => stop,
        };
        self.queue.flush_used();
        (stop, self.queue.needs_notification())
    }

    fn drain(&mut self, backend: &impl Backend, left: &mut usize) -> Stop {
        while *left > 0 {
            *left -= 1;
            if let Some(until) = self.hooks.held_until() {
                self.counters.limited += 1;
                return Stop::Limited(until);
            }
            self.buffers.clear();
            let chain = match self.queue.pop(&mut self.buffers) {
                Next::Chain(chain) if chain.writable.segments == 0 => chain,
                Next::Chain(chain) => {
                    self.counters.bad_chains += 1;
                    self.queue.add_used(chain.head, 0);
                    continue;
                }
                Next::Bad => {
                    self.counters.bad_chains += 1;
                    continue;
                }
                Next::Empty => return Stop::Idle,
                Next::Broken => return Stop::Broken,
            };
            // SAFETY: the iovecs are those of a chain that `Queue::pop` resolved inside guest
            // memory, which the queue keeps mapped.
            match unsafe { backend.write_frame(&self.buffers.readable) } {
                Ok(_) => self.sent(chain.readable.len),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.counters.full += 1;
                    self.queue.undo_pop();
                    return Stop::Full;
                }
                // EINVAL for a bad header, EMSGSIZE, ENETDOWN: the frame is lost, as it would be
                // on a wire, and the device lives on.
                Err(error) => {
                    self.counters.refused += 1;
                    log::trace!("frame of {} bytes refused: {error}", chain.readable.len);
                }
            }
            self.queue.push_used(chain.head, 0);
            if self.queue.unflushed() >= BATCH {
                self.queue.flush_used();
            }
        }
        Stop::Budget
    }

    /// What is to be done for a frame of `len` bytes with its header that the backend has taken.
    fn sent(&mut self, len: usize) {
        let frame = &self.buffers.readable;
        // SAFETY: the iovecs are those of a chain that `Queue::pop` resolved inside guest memory,
        // which the queue keeps mapped.
        unsafe { self.observer.look(frame) };
        // SAFETY: as above.
        unsafe { self.hooks.passed(Direction::Sent, frame, len) };
        self.counters.frames += 1;
        self.counters.bytes += len as u64;
    }
}
