//! The control queue: any memory, any ring, and any command by itself.
#![no_main]

use std::sync::Arc;

use devices::virtio::net::ctrl::{Control, CtrlQueue, Permissions};
use devices::virtio::net::features::Features;
use fuzz::{Queue, Script, config, filter, memory};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Queue, u64, Vec<u8>, Vec<u8>)| {
    let (queue, features, command, bytes) = input;
    let backends = [(); 3].map(|()| Arc::new(Script::new(Vec::new())));
    let control = Control {
        backends: backends.to_vec(),
        config: config(),
        filter: filter(),
        features: Features::from_bits_truncate(features),
        permissions: Permissions {
            change_mac: true,
            allow_promisc: true,
        },
    };
    control.execute(&command);
    let memory = memory(&bytes);
    let Some(queue) = queue.get(&memory) else {
        return;
    };
    let mut queue = CtrlQueue::new(queue, control);
    for _ in 0..4 {
        queue.handle(64);
    }
});
