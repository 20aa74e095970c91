//! Configuration space and BAR of virtio-pci of a whole NIC, threads included.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::irq::IrqLine;
use devices::pci::{MsixRoutes, PciFunction};
use devices::virtio::VirtioDevice;
use devices::virtio::pci::PciTransport;
use fuzz::{Access, Value, memory, nic};
use libfuzzer_sys::fuzz_target;

/// What a guest does to a function.
#[derive(Debug, Arbitrary)]
enum Step {
    Bar(Access),
    ReadConfig(u16, u8),
    WriteConfig(u16, Value),
}

/// Messages that go nowhere.
#[derive(Debug)]
struct Nowhere;

impl MsixRoutes for Nowhere {
    fn connect(&self, _vector: usize, _address: u64, _data: u32) {}
    fn disconnect(&self, _vector: usize) {}
}

fuzz_target!(|input: (Vec<u8>, Vec<Vec<u8>>, Vec<Step>)| {
    let (bytes, frames, steps) = input;
    let memory = memory(&bytes);
    let device: Box<dyn VirtioDevice> = Box::new(nic(frames));
    let vectors = PciTransport::vectors(device.as_ref());
    let lines = (0..vectors).map(|_| IrqLine::new().expect("an eventfd can be had"));
    let routes = Box::new(Nowhere);
    let mut function = PciTransport::new(
        device,
        Arc::clone(&memory),
        0xd000_0000,
        lines.collect(),
        routes,
    )
    .expect("eventfds can be had");
    for step in steps {
        match step {
            Step::Bar(access) => access.make(&mut function, &memory),
            // The bus passes on accesses of 1, 2 and 4 bytes that stay inside their double word.
            Step::ReadConfig(offset, len) => {
                let len = [1, 2, 4][usize::from(len % 3)];
                let offset = usize::from(offset) % 4096 / len * len;
                function.read_config(offset, &mut [0; 4][..len]);
            }
            Step::WriteConfig(offset, value) => {
                let bytes = value.bytes();
                let len = bytes.len().min(4);
                let offset = usize::from(offset) % 4096 / len * len;
                function.write_config(offset, &bytes[..len]);
            }
        }
    }
});
