//! A queue of a disk: any memory, any ring.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use devices::disk::Storage;
use devices::virtio::blk::Disk;
use devices::virtio::blk::queue::BlkQueue;
use devices::virtio::rate::RateLimit;
use fuzz::image::MemoryImage;
use fuzz::{Queue, memory};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Queue, bool, bool, Vec<u8>)| {
    let (queue, readonly, writeback, bytes) = input;
    let memory = memory(&bytes);
    let Some(queue) = queue.get(&memory) else {
        return;
    };
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
