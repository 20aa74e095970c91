//! The transmit queue: any memory, any ring.
#![no_main]

use devices::virtio::net::tx::TxQueue;
use fuzz::{Queue, Script, memory, observer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Queue, Vec<u8>)| {
    let (queue, bytes) = input;
    let memory = memory(&bytes);
    let Some(queue) = queue.get(&memory) else {
        return;
    };
    let backend = Script::new(Vec::new());
    let mut tx = TxQueue::new(queue, observer());
    for _ in 0..4 {
        tx.send(&backend, 64);
    }
});
