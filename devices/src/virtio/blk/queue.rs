//! A queue of requests: from chains to requests, and back when they are done.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::counters::BlkCounters;
use super::disk::Disk;
use super::request::{Parts, Request, Status, bytes};
use crate::virtio::Segments;
use crate::virtio::iovec::scatter;
use crate::virtio::queue::{Buffers, Chain, Next, Queue};

/// Requests that are used together: the driver's processor then loses its copy of the index less
/// often.
const BATCH: u16 = 16;

/// Why a queue's turn has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The driver has no more requests, and will notify of the next one.
    Idle,
    /// The rate limit lets nothing pass until then: only the timer ends this.
    Limited(Instant),
    /// The budget is used up.
    Budget,
    /// The avail index is invalid: only a reset ends this.
    Broken,
}

/// A queue of a disk.
#[derive(Debug)]
pub struct BlkQueue {
    queue: Queue,
    disk: Arc<Disk>,
    buffers: Buffers,
    /// What it has done so far.
    pub counters: BlkCounters,
}

impl BlkQueue {
    /// Does what `queue` asks of `disk`.
    pub fn new(queue: Queue, disk: Arc<Disk>) -> Self {
        Self {
            queue,
            disk,
            buffers: Buffers::default(),
            counters: BlkCounters::default(),
        }
    }

    /// Where the queue stands.
    pub fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Carries out up to `budget` requests; whatever else a driver can repeat for ever costs budget
    /// too. Says why it stopped, and whether to interrupt the driver.
    pub fn handle(&mut self, budget: usize) -> (Stop, bool) {
        let mut left = budget;
        let stop = loop {
            self.queue.disable_notification();
            match self.drain(&mut left) {
                // Requests came while notifications were still off.
                Stop::Idle if self.queue.enable_notification() && left > 0 => left -= 1,
                Stop::Idle if left == 0 => break Stop::Budget,
                stop => break stop,
            }
        };
        self.queue.flush_used();
        (stop, self.queue.needs_notification())
    }

    fn drain(&mut self, left: &mut usize) -> Stop {
        while *left > 0 {
            *left -= 1;
            if let Some(until) = self.disk.limiter.held_until() {
                self.counters.limited += 1;
                return Stop::Limited(until);
            }
            self.buffers.clear();
            let chain = match self.queue.pop(&mut self.buffers) {
                Next::Chain(chain) => chain,
                Next::Bad => {
                    self.counters.bad_chains += 1;
                    continue;
                }
                Next::Empty => return Stop::Idle,
                Next::Broken => return Stop::Broken,
            };
            self.serve(chain);
            if self.queue.unflushed() >= BATCH {
                self.queue.flush_used();
            }
        }
        Stop::Budget
    }

    fn serve(&mut self, chain: Chain) {
        let status = match Parts::split(&mut self.buffers) {
            Some(parts) => self.carry_out(parts),
            None => {
                self.counters.bad_chains += 1;
                Status::IoError
            }
        };
        // Without room for a status, nothing has been done.
        if let Some(buffer) = self.buffers.writable.last() {
            // SAFETY: the iovec is one of a chain that `Queue::pop` resolved inside guest memory,
            // which the queue keeps mapped.
            unsafe { scatter(std::slice::from_ref(buffer), 0, &[status as u8]) };
        }
        // The status is the last byte, so that all of them count as written.
        self.queue.push_used(chain.head, chain.writable.len as u32);
    }

    fn carry_out(&mut self, parts: Parts) -> Status {
        let disk = &*self.disk;
        let request = match parts.request(&self.buffers, disk.image(), disk.is_readonly()) {
            Ok(request) => request,
            Err(status) => {
                self.counters.refused += 1;
                disk.limiter.charge(0);
                return status;
            }
        };
        let (sent, wanted) = (parts.sent(&self.buffers), parts.wanted(&self.buffers));
        let moved = match request {
            Request::Read { .. } => bytes(wanted),
            Request::Write { .. } => bytes(sent),
            _ => 0,
        };
        disk.limiter.charge(moved as usize);
        // SAFETY: the iovecs are those of a chain that `Queue::pop` resolved inside guest memory,
        // which the queue keeps mapped, and to which nothing refers.
        let sent = unsafe { Segments::new(sent) };
        // SAFETY: as above.
        let wanted = unsafe { Segments::new(wanted) };
        let result = disk.execute(&request, sent, wanted);
        self.finish(&request, moved, result)
    }

    /// What is to be said of a request that moved so many bytes, or failed.
    fn finish(&mut self, request: &Request, moved: u64, result: io::Result<()>) -> Status {
        let counters = &mut self.counters;
        if let Err(error) = result {
            counters.errors += 1;
            self.disk.complain(request, &error);
            return Status::IoError;
        }
        match request {
            Request::Read { .. } => {
                counters.reads += 1;
                counters.read_bytes += moved;
            }
            Request::Write { .. } => {
                counters.writes += 1;
                counters.written_bytes += moved;
            }
            Request::Flush => counters.flushes += 1,
            Request::Discard(_) | Request::WriteZeroes { .. } => counters.discards += 1,
            Request::Serial => {}
        }
        Status::Ok
    }
}
