//! The entropy device: any memory, any ring.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use devices::virtio::rate::{Limiter, RateLimit};
use devices::virtio::rng::RngJob;
use devices::virtio::worker::Job;
use fuzz::{Deaf, Queue, memory};
use libfuzzer_sys::fuzz_target;

const UNLIMITED: RateLimit = RateLimit {
    bits: None,
    frames: None,
    burst: Duration::ZERO,
};

fuzz_target!(|input: (Queue, Vec<u8>)| {
    let (queue, bytes) = input;
    let Some(queue) = queue.active(&memory(&bytes)) else {
        return;
    };
    let limiter = Arc::new(Limiter::new(UNLIMITED));
    let mut job = RngJob::new(queue, limiter, Arc::new(Deaf));
    for _ in 0..4 {
        job.turn();
    }
});
