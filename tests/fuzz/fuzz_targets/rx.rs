//! The receive queue: any memory, any ring, any frames.
#![no_main]

use devices::virtio::net::features::Features;
use devices::virtio::net::filter::Rules;
use devices::virtio::net::rx::{RxLayout, RxQueue};
use fuzz::{Queue, Script, filter, memory};
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
    let filter = filter();
    if let Some(features) = features {
        filter.change(|rules| {
            *rules = Rules::new(Features::from_bits_truncate(features));
            rules.set_table(&[], &[]);
        });
    }
    let backend = Script::new(frames);
    let mut rx = RxQueue::new(queue, layout, filter);
    for _ in 0..4 {
        rx.receive(&backend, 64);
    }
});
