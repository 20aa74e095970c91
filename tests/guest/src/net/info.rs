//! Prints what each NIC says of itself.

use crate::boot::Boot;
use crate::report;
use crate::serial::println;
use crate::virtio::Kind;
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::{Config, RX, TX, queue_size};

/// One `NIC` line for each.
pub fn run(boot: &Boot) {
    println!("CMDLINE {}", boot.command_line.text());
    println!("RAM {:#x}..{:#x}", boot.ram.start, boot.ram.end);
    let nics = VirtioDevice::all(Kind::Net);
    for (index, nic) in nics.iter().enumerate() {
        let Config {
            mac: [a, b, c, d, e, f],
            status,
            mtu,
            pairs,
        } = Config::read(*nic);
        let transport = nic.transport();
        let sizes = [RX, TX].map(|queue| queue_size(*nic, queue, u16::MAX).unwrap_or(0));
        println!(
            "NIC {index} mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} features={:#x} status={status} mtu={mtu} pairs={pairs} \
             transport={} version={} line={} rx={} tx={}",
            nic.offered(),
            transport.0,
            transport.1,
            nic.line(),
            sizes[0],
            sizes[1],
        );
    }
    report::ok("info", format_args!("nics={}", nics.len()));
}
