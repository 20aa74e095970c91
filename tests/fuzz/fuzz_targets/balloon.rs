//! The balloon: any memory, any rings, and what the driver writes of the configuration.
#![no_main]

use std::sync::Arc;

use devices::virtio::Activation;
use devices::virtio::balloon::{BalloonJob, ConfigSpace};
use devices::virtio::worker::Job;
use fuzz::{Deaf, Queue, memory};
use libfuzzer_sys::fuzz_target;

/// What the driver writes of the configuration: where, and what.
type Write = (u8, u32);

fuzz_target!(|input: ([Queue; 5], u64, Vec<Write>, Vec<u8>)| {
    let (queues, features, writes, bytes) = input;
    let memory = memory(&bytes);
    let config = Arc::new(ConfigSpace::new(0).expect("an eventfd can be had"));
    for (offset, value) in writes {
        config.write(offset.into(), &value.to_le_bytes());
        config.read(offset.into(), &mut [0; 7]);
    }
    let activation = Activation {
        memory: Arc::clone(&memory),
        features,
        queues: queues.iter().map(|queue| queue.active(&memory)).collect(),
        resumed: false,
        interrupt: Arc::new(Deaf),
    };
    let Ok(mut job) = BalloonJob::new(activation, config) else {
        return;
    };
    for _ in 0..4 {
        job.turn();
    }
    job.park();
});
