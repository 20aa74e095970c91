//! Pings with the NIC's interrupts on, and counts: the monitor's irqfd, the IOAPIC or a message,
//! and our handler at work.

use alloc::format;
use alloc::string::String;

use super::ping::{PATIENCE, Pinger};
use super::{Stack, with_stack};
use crate::cpu;
use crate::options::Options;
use crate::virtio::Kind;
use crate::virtio::device::VirtioDevice;

/// Each of `count` pings must bring an interrupt, and acknowledging it must make room for the next
/// one.
pub fn run(options: &Options) {
    with_stack("interrupts", options, |stack| count(stack, options));
}

fn count(stack: &mut Stack, options: &Options) -> Result<String, String> {
    let nic = VirtioDevice::find(Kind::Net, options.index)?;
    let line = nic.line();
    let mut pinger = Pinger::start(stack, options.peer()?)?;
    nic.enable_interrupts();
    // This one also finds out the peer's address.
    pinger.ping(stack, 0).ok_or("a ping was not answered")?;
    let mut interrupted = 0;
    for number in 1..=options.count as u16 {
        stack.nic.acknowledge_interrupt()?;
        let before = cpu::interrupts(line);
        pinger.send(stack, number).ok_or("no room for a ping")?;
        stack.poll();
        // The receive queue is not read now: polling it would ask the device (by the event index)
        // not to interrupt.
        interrupted += u32::from(comes(line, before));
        if !pinger.wait(stack, number) {
            return Err("a ping was not answered".into());
        }
    }
    let total = cpu::interrupts(line);
    let summary = format!(
        "pings={} with_interrupt={interrupted} total={total}",
        options.count
    );
    if interrupted == options.count {
        Ok(summary)
    } else {
        Err(summary)
    }
}

/// Whether the line interrupts once more than `before`, in time.
fn comes(line: u32, before: u64) -> bool {
    let end = cpu::now() + PATIENCE;
    while cpu::now() < end {
        if cpu::interrupts(line) > before {
            return true;
        }
    }
    false
}
