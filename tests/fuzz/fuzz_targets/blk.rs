//! A queue of a disk: any memory, any ring, and requests that are nearly right.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use devices::disk::Storage;
use devices::virtio::QueueConfig;
use devices::virtio::blk::Disk;
use devices::virtio::blk::queue::BlkQueue;
use devices::virtio::rate::RateLimit;
use fuzz::image::MemoryImage;
use fuzz::{Queue, memory};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Where the headers lie, and after each of them its status.
const HEADERS: u64 = 0x7f00;

/// A chain of header, data and status.
#[derive(Debug, Arbitrary)]
struct Request {
    kind: u8,
    sector: u8,
    /// Where the data lies, how much there is, and whether the device is to write it.
    data: u16,
    sectors: u8,
    odd: bool,
    is_wanted: bool,
    /// Bytes of the header, if not all.
    cut: Option<u8>,
}

impl Request {
    /// Lays it out as the driver's request of this number.
    fn lay(&self, n: u16, ring: &QueueConfig, memory: &GuestMemoryMmap) {
        let write = |value: u64, at: u64| {
            let _ = memory.write_obj(value, GuestAddress(at));
        };
        let header = HEADERS + 32 * u64::from(n);
        write((self.kind % 16).into(), header);
        write(self.sector.into(), header + 8);
        let len = u64::from(self.sectors) * 256 + u64::from(self.odd);
        let wanted = 2 * u64::from(self.is_wanted);
        let first = 3 * n;
        let parts = [
            (header, self.cut.unwrap_or(16).into(), 1),
            (self.data.into(), len, 1 | wanted),
            (header + 16, 1, 2),
        ];
        for (index, (address, len, flags)) in (first..).zip(parts) {
            let at = ring.descriptors + 16 * u64::from(index % ring.size);
            let next = u64::from((index + 1) % ring.size);
            write(address, at);
            write(len | flags << 32 | next << 48, at + 8);
        }
        let slot = ring.available + 4 + 2 * u64::from(n % ring.size);
        let _ = memory.write_obj(first % ring.size, GuestAddress(slot));
        let _ = memory.write_obj(n + 1, GuestAddress(ring.available + 2));
    }
}

fuzz_target!(|input: (Queue, bool, bool, Vec<Request>, Vec<u8>)| {
    let (ring, readonly, writeback, requests, bytes) = input;
    let memory = memory(&bytes);
    let Some(queue) = ring.get(&memory) else {
        return;
    };
    for (n, request) in (0..16).zip(&requests) {
        request.lay(n, &ring.config(), &memory);
    }
    let limit = RateLimit {
        bits: None,
        frames: None,
        burst: Duration::ZERO,
    };
    let image = Arc::new(MemoryImage::new(readonly));
    let storage = Storage::Image(image);
    let disk = Disk::new("disk0".into(), storage, readonly, [b's'; 20], limit, true);
    disk.set_writeback(writeback);
    let mut queue = BlkQueue::new(queue, Arc::new(disk));
    for _ in 0..4 {
        queue.handle(64);
    }
});
