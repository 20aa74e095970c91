//! Writes numbered blocks, and says which of them are flushed: so that whoever kills the monitor
//! knows what the image must hold.

use alloc::format;
use alloc::string::String;

use super::{pattern, with_disk};
use crate::options::Options;
use crate::serial::println;
use crate::virtio::blk::{BlkQueue, SECTOR, Shape, bring_up, capacity, feature, outcome, request};
use crate::virtio::device::VirtioDevice;

/// The size of a block, in bytes and sectors.
const BLOCK: usize = 4096;
const SECTORS: u64 = (BLOCK / SECTOR) as u64;
/// How many blocks are on their way, and are written before a flush.
const DEPTH: u16 = 8;
const BATCH: u64 = 32;
/// Blocks that follow one another are so far apart that most lie in a cluster of their own.
const STRIDE: u64 = 37;

/// Writes `guest.count` batches. Block n is the n-th of all that it writes; it has the pattern with n as
/// the seed, and begins with n.
pub fn run(options: &Options) {
    with_disk("disk-journal", options, |disk| write(disk, options.count));
}

fn write(disk: VirtioDevice, batches: u32) -> Result<String, String> {
    let shape = Shape {
        places: DEPTH,
        pieces: 1,
        room: BLOCK,
    };
    let wanted = feature::VERSION_1 | feature::EVENT_IDX | feature::FLUSH;
    let (features, mut queues) = bring_up(disk, wanted, 1, shape)?;
    if features & feature::FLUSH == 0 {
        return Err("the disk has no flush".into());
    }
    let count = capacity(disk) / SECTORS;
    let mut number = 1;
    for _ in 0..batches {
        batch(&mut queues[0], number, count)?;
        number += BATCH;
        match queues[0].call(request::FLUSH, 0, 0)? {
            outcome::OK => println!("FLUSHED {}", number - 1),
            status => return Err(format!("a flush ends with {status}")),
        }
    }
    Ok(format!("blocks={}", number - 1))
}

/// Writes a batch of blocks from this number on.
fn batch(queue: &mut BlkQueue, first: u64, count: u64) -> Result<(), String> {
    let (mut next, mut done) = (first, 0);
    let end = first + BATCH;
    let mut free: alloc::vec::Vec<u16> = (0..DEPTH).collect();
    while done < BATCH {
        while next < end
            && let Some(place) = free.pop()
        {
            let block = next.wrapping_mul(STRIDE) % count;
            for n in 0..SECTORS {
                let at = n as usize * SECTOR;
                queue.put(place, at, &pattern(next, block * SECTORS + n));
                queue.put(place, at, &next.to_le_bytes());
            }
            queue.offer(place, request::OUT, block * SECTORS, BLOCK);
            next += 1;
        }
        queue.kick();
        while let Some((place, status)) = queue.take() {
            if status != outcome::OK {
                return Err(format!("writing ends with {status}"));
            }
            free.push(place);
            done += 1;
        }
    }
    Ok(())
}
