//! The receive queue: any memory, any ring, any frames.
#![no_main]

use std::sync::Arc;

use devices::virtio::net::features::Features;
use devices::virtio::net::filter::{Filter, Rules};
use devices::virtio::net::rx::{RxLayout, RxQueue};
use fuzz::{MAC, Queue, Script, memory};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Queue, bool, Option<u64>, Vec<Vec<u8>>, Vec<u8>)| {
    let (queue, mergeable, features, frames, bytes) = input;
    let memory = memory(&bytes);
    let Some(queue) = queue.get(&memory) else {
        return;
    };
    let layout = RxLayout {
        mergeable,
        largest_frame: 65_562,
    };
    let filter = Arc::new(Filter::default());
    if let Some(features) = features {
        filter.change(|rules| {
            *rules = Rules::new(MAC, Features::from_bits_truncate(features));
            rules.set_table(&[], &[]);
        });
    }
    let backend = Script::new(frames);
    let mut rx = RxQueue::new(queue, layout).with_filter(filter);
    for _ in 0..4 {
        rx.receive(&backend, 64);
    }
});
