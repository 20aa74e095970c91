//! Waits until the disk is larger, which the disk must say, and uses what is new.

use alloc::format;
use alloc::string::String;

use super::{pattern, with_disk};
use crate::options::Options;
use crate::serial::println;
use crate::virtio::blk::{SECTOR, Shape, bring_up, capacity, feature, outcome, request};
use crate::virtio::device::VirtioDevice;

/// In the interrupt status: the configuration has changed.
const CONFIG_CHANGED: u32 = 2;

/// Waits once.
pub fn run(options: &Options) {
    with_disk("disk-grow", options, grow);
}

fn grow(disk: VirtioDevice) -> Result<String, String> {
    let shape = Shape {
        places: 1,
        pieces: 1,
        room: SECTOR,
    };
    let (_, mut queues) = bring_up(disk, feature::ALL, 1, shape)?;
    let before = capacity(disk);
    let queue = &mut queues[0];
    match queue.call(request::IN, before, SECTOR)? {
        outcome::IOERR => {}
        status => return Err(format!("beyond the end: {status}")),
    }
    println!("READY disk-grow");
    disk.wait_interrupt(CONFIG_CHANGED)?;
    disk.acknowledge(CONFIG_CHANGED);
    let now = capacity(disk);
    if now <= before {
        return Err(format!("it has {now} sectors, and had {before}"));
    }
    queue.put(0, 0, &pattern(1, now - 1));
    match queue.call(request::OUT, now - 1, SECTOR)? {
        outcome::OK => Ok(format!("before={before} now={now}")),
        status => Err(format!("its last sector: {status}")),
    }
}
