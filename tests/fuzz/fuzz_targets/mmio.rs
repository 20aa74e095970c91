//! The registers of virtio-mmio of a whole NIC, threads included.
#![no_main]

use std::sync::Arc;

use devices::irq::IrqLine;
use devices::virtio::mmio::MmioTransport;
use fuzz::{Access, memory, nic};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Vec<u8>, Vec<Vec<u8>>, Vec<Access>)| {
    let (bytes, frames, accesses) = input;
    let memory = memory(&bytes);
    let line = IrqLine::new().expect("an eventfd can be had");
    let device = Box::new(nic(frames));
    let mut transport =
        MmioTransport::new(device, Arc::clone(&memory), line).expect("eventfds can be had");
    for access in accesses {
        access.make(&mut transport, &memory);
    }
});
