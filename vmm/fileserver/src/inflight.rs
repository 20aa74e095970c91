//! The record of the requests that are being served: what the monitor completes when this process dies.
//!
//! Its layout is that of the vhost-user specification for split virtqueues ("Inflight I/O tracking"): for each queue a
//! header and an entry for each descriptor, and the next queue at a multiple of 64 bytes.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// Descriptors that a queue can have: so many entries its part of the record has.
pub const QUEUE_SIZE: u16 = 1024;
/// The queue of high priority and the one of requests.
pub const QUEUES: usize = 2;

const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const HEADER: usize = 16;
const ENTRY: usize = 16;
const QUEUE: usize = (HEADER + ENTRY * QUEUE_SIZE as usize).next_multiple_of(64);

/// Bytes of the record.
pub const RECORD: usize = QUEUES * QUEUE;

/// One queue's part of the record.
#[derive(Debug)]
pub(crate) struct Inflight {
    record: Arc<MmapRegion>,
    at: usize,
}

impl Inflight {
    /// Maps the record, a file of [`RECORD`] bytes: the part of each queue.
    pub fn map(record: OwnedFd) -> io::Result<Vec<Self>> {
        let file = FileOffset::new(File::from(record), 0);
        let record = MmapRegion::from_file(file, RECORD).map_err(io::Error::other)?;
        let record = Arc::new(record);
        let parts = (0..QUEUES).map(|queue| Self {
            record: record.clone(),
            at: queue * QUEUE,
        });
        let parts: Vec<_> = parts.collect();
        for part in &parts {
            part.set(VERSION, 1);
            part.set(DESC_NUM, QUEUE_SIZE);
        }
        Ok(parts)
    }

    fn set(&self, field: usize, value: u16) {
        // Within the record, and aligned: never an error.
        if let Ok(word) = self.record.get_atomic_ref::<AtomicU16>(self.at + field) {
            word.store(value, Ordering::Release);
        }
    }

    fn mark(&self, head: u16, inflight: u8) {
        let entry = self.at + HEADER + ENTRY * usize::from(head);
        // A head beyond the queue's size is no descriptor, and is not used either.
        if let (true, Ok(byte)) = (
            head < QUEUE_SIZE,
            self.record.get_atomic_ref::<AtomicU8>(entry),
        ) {
            byte.store(inflight, Ordering::Release);
        }
    }

    /// A queue starts with this used index.
    pub fn start(&self, used: u16) {
        self.set(USED_IDX, used);
    }

    /// The request at `head` is served from now on.
    pub fn begin(&self, head: u16) {
        self.mark(head, 1);
    }

    /// The request at `head` is about to be put into the used ring.
    pub fn complete(&self, head: u16) {
        self.set(LAST_BATCH_HEAD, head);
    }

    /// The used ring has the request at `head`, and its index is `used`.
    pub fn end(&self, head: u16, used: u16) {
        self.mark(head, 0);
        self.set(USED_IDX, used);
    }
}
