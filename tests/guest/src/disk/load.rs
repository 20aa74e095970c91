//! Reads or writes as fast as the disk can, and measures.

use alloc::format;
use alloc::string::String;

use super::with_disk;
use crate::cpu;
use crate::options::{Operation, Options, Order};
use crate::serial::println;
use crate::virtio::blk::{SECTOR, Shape, bring_up, capacity, feature, outcome, request};
use crate::virtio::device::VirtioDevice;

/// Requests of `guest.block` bytes, `guest.depth` at a time, for `guest.ms`; with `guest.bytes` no
/// further into the disk than that.
pub fn run(options: &Options) {
    with_disk("disk-load", options, |disk| load(disk, options));
}

fn load(disk: VirtioDevice, options: &Options) -> Result<String, String> {
    let shape = Shape {
        places: options.depth,
        pieces: 1,
        room: options.block,
    };
    // An own cache would have to be flushed for what is written to count.
    let wanted = feature::VERSION_1 | feature::EVENT_IDX | feature::FLUSH;
    let (_, mut queues) = bring_up(disk, wanted, 1, shape)?;
    let queue = &mut queues[0];
    let kind = match options.operation {
        Operation::Read => request::IN,
        Operation::Write => request::OUT,
        Operation::Lookup | Operation::Attributes => return Err("a disk has no files".into()),
    };
    for place in 0..options.depth {
        (0..options.block)
            .step_by(SECTOR)
            .for_each(|at| queue.put(place, at, &super::pattern(3, place.into())));
    }
    let sectors = (options.block / SECTOR) as u64;
    let mut blocks = Blocks::new(options.order, capacity(disk) / sectors);
    println!("READY disk-load");
    let start = cpu::ticks();
    let end = start + cpu::ticks_in(options.nanoseconds());
    for place in 0..options.depth {
        queue.offer(place, kind, blocks.next() * sectors, options.block);
    }
    queue.kick();
    let (mut requests, mut waiting) = (0_u64, options.depth);
    while waiting > 0 {
        let is_over = cpu::ticks() > end;
        while let Some((place, status)) = queue.take() {
            if status != outcome::OK {
                let read = match options.depth {
                    1 => queue.call(request::IN, 0, options.block)?,
                    _ => status,
                };
                return Err(format!(
                    "request {requests} ends with {status}, a read after it with {read}"
                ));
            }
            requests += 1;
            if is_over {
                waiting -= 1;
            } else {
                queue.offer(place, kind, blocks.next() * sectors, options.block);
            }
        }
        queue.kick();
    }
    let ns = cpu::ns_of(cpu::ticks() - start);
    let bytes = requests * options.block as u64;
    Ok(format!(
        "requests={requests} bytes={bytes} ns={ns} kicks={}",
        queue.kicks
    ))
}

/// Which block comes next.
pub struct Blocks {
    order: Order,
    count: u64,
    state: u64,
}

impl Blocks {
    /// Of so many.
    pub fn new(order: Order, count: u64) -> Self {
        Self {
            order,
            count,
            // Any number but 0.
            state: 0x2545_f491_4f6c_dd1d,
        }
    }

    /// Its number.
    pub fn next(&mut self) -> u64 {
        match self.order {
            Order::Sequential => self.state += 1,
            // Marsaglia's xorshift, in 64 bits.
            Order::Random => {
                self.state ^= self.state << 13;
                self.state ^= self.state >> 7;
                self.state ^= self.state << 17;
            }
        }
        self.state % self.count
    }
}
