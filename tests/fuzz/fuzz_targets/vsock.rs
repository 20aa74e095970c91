//! The socket device: any memory, any rings, and programs that connect.
#![no_main]

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use devices::events::EventSink;
use devices::virtio::Activation;
use devices::virtio::vsock::Vsock;
use devices::virtio::worker::Job;
use fuzz::{Deaf, Queue, memory};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: ([Queue; 3], Vec<u8>, Vec<u8>)| {
    let (queues, bytes, said) = input;
    let memory = memory(&bytes);
    // The guest's port 80 is this one of the host's.
    let path = format!("/tmp/fuzz-vsock-{}", std::process::id());
    let (socket, port) = (Path::new(&path), format!("{path}_80"));
    for path in [socket, Path::new(&port)] {
        let _ = std::fs::remove_file(path);
    }
    let listener = UnixListener::bind(socket).expect("a socket can be made");
    let _port = UnixListener::bind(&port).expect("a socket can be made");
    let device = Vsock::new("vsock", 3, listener, socket.into(), EventSink::default());
    let mut device = device.expect("threads can be had");
    let activation = Activation {
        features: 0,
        queues: queues.iter().map(|queue| queue.active(&memory)).collect(),
        resumed: false,
        interrupt: Arc::new(Deaf),
        memory,
    };
    let Ok(mut job) = device.job(activation) else {
        return;
    };
    let mut program = UnixStream::connect(socket).expect("the device listens");
    let _ = program.write_all(b"CONNECT 1\n");
    let _ = program.write_all(&said);
    for _ in 0..4 {
        for (_, token, events) in job.wakeups() {
            job.wake(token, events);
        }
        job.turn();
    }
});
