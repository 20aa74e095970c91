//! What is special to a disk, and its queues by hand (virtio 1.2, 5.2).

use alloc::vec::Vec;

use super::device::{VirtioDevice, go, negotiate, queue_size};
use super::ring::{Descriptor, Ring, WRITE};
use crate::cpu;
use crate::memory::{PAGE, Shared};

/// What sectors are counted by.
pub const SECTOR: usize = 512;
/// The length of a serial number.
pub const ID: usize = 20;

/// Feature bits.
pub mod feature {
    pub const RO: u64 = 1 << 5;
    pub const FLUSH: u64 = 1 << 9;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
    /// All that this guest can do.
    pub const ALL: u64 =
        RO | FLUSH | CONFIG_WCE | MQ | DISCARD | WRITE_ZEROES | EVENT_IDX | VERSION_1;
}

/// What a request is to do.
pub mod request {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// How it ended.
pub mod outcome {
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
}

/// The flag of a range to be zeroed, that its space may be given back.
pub const UNMAP: u32 = 1;

/// The header of a request.
pub const HEADER: usize = 16;
/// Where the parts of the configuration are that are written or read alone.
const CAPACITY: u64 = 0;
const WRITEBACK: u64 = 32;

/// The parts of the configuration that are read here.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// In sectors.
    pub capacity: u64,
    /// The most pieces of a request's data.
    pub seg_max: u32,
    /// The logical block size, in bytes.
    pub blk_size: u32,
    /// How many queues there are, where it says so.
    pub queues: u16,
    /// The most sectors and ranges that one request can discard.
    pub discard: [u32; 2],
    /// The same for zeroing.
    pub write_zeroes: [u32; 2],
}

impl Config {
    /// Reads it.
    pub fn read(disk: VirtioDevice) -> Self {
        Self {
            capacity: capacity(disk),
            seg_max: disk.config(12),
            blk_size: disk.config(20),
            queues: disk.config(34),
            discard: [disk.config(36), disk.config(40)],
            write_zeroes: [disk.config(48), disk.config(52)],
        }
    }
}

/// The size of the disk in sectors, both halves from the same moment.
pub fn capacity(disk: VirtioDevice) -> u64 {
    loop {
        let generation = disk.generation();
        let [low, high] = [CAPACITY, CAPACITY + 4].map(|at| disk.config::<u32>(at));
        if disk.generation() == generation {
            return u64::from(high) << 32 | u64::from(low);
        }
    }
}

/// Whether the disk has a cache that a flush is needed for.
pub fn writeback(disk: VirtioDevice) -> u8 {
    disk.config(WRITEBACK)
}

/// Turns that on and off.
pub fn set_writeback(disk: VirtioDevice, value: u8) {
    disk.set_config(WRITEBACK, value);
}

/// A range to discard or zero, as it lies in memory.
pub fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// The header of a request, as it lies in memory.
pub fn header(kind: u32, sector: u64) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// So far ahead an event index asks for no interrupt.
const NEVER: u16 = 0x8000;
/// Header and status of a place: the status comes after the header.
const HEAD: usize = 32;
const STATUS: usize = HEADER;
/// What a status is before the device writes it.
const UNWRITTEN: u8 = 0xee;

/// How a queue is to be used.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// How many requests it can hold at a time.
    pub places: u16,
    /// The pieces of a request's data.
    pub pieces: u16,
    /// The most bytes of them.
    pub room: usize,
}

/// A queue. Each request in it has a place, with a header, data and a status of its own.
#[derive(Debug)]
pub struct BlkQueue {
    disk: VirtioDevice,
    ring: Ring,
    shape: Shape,
    heads: Shared,
    data: Shared,
    has_event_idx: bool,
    /// Requests that the device need not know of yet.
    offered: u16,
    /// Notifications of the device.
    pub kicks: u64,
}

/// Brings a disk up with so many queues, and all features that it offers of the `wanted` ones.
/// Returns those too.
pub fn bring_up(
    disk: VirtioDevice,
    wanted: u64,
    queues: u16,
    shape: Shape,
) -> Result<(u64, Vec<BlkQueue>), &'static str> {
    let features = negotiate(disk, wanted)?;
    let has_event_idx = features & feature::EVENT_IDX != 0;
    let queues = (0..queues).map(|number| BlkQueue::new(disk, number, shape, has_event_idx));
    let queues = queues.collect::<Result<Vec<_>, _>>()?;
    go(disk);
    Ok((features, queues))
}

impl BlkQueue {
    fn new(
        disk: VirtioDevice,
        number: u16,
        shape: Shape,
        has_event_idx: bool,
    ) -> Result<Self, &'static str> {
        let wanted = (shape.places * (shape.pieces + 2)).next_power_of_two();
        if queue_size(disk, number, wanted)? < wanted {
            return Err("the queue is too small");
        }
        let room = shape.room.next_multiple_of(PAGE);
        let mut ring = Ring::new(number, wanted);
        ring.set_used_event(NEVER);
        ring.enable(disk);
        Ok(Self {
            disk,
            ring,
            heads: Shared::new(usize::from(shape.places) * HEAD),
            data: Shared::new(usize::from(shape.places) * room),
            shape: Shape { room, ..shape },
            has_event_idx,
            offered: 0,
            kicks: 0,
        })
    }

    /// Writes into the data of a place.
    pub fn put(&mut self, place: u16, offset: usize, bytes: &[u8]) {
        let at = usize::from(place) * self.shape.room + offset;
        self.data.put(at, bytes);
    }

    /// Reads the data of a place.
    pub fn get(&self, place: u16, offset: usize, bytes: &mut [u8]) {
        let at = usize::from(place) * self.shape.room + offset;
        self.data.get(at, bytes);
    }

    /// Makes a request available whose data is the first `length` bytes of the place's.
    pub fn offer(&mut self, place: u16, kind: u32, sector: u64, length: usize) {
        self.offer_pieces(place, kind, sector, &[length]);
    }

    /// The same with the data in pieces of these lengths.
    pub fn offer_pieces(&mut self, place: u16, kind: u32, sector: u64, lengths: &[usize]) {
        let head = usize::from(place) * HEAD;
        self.heads.put(head, &header(kind, sector));
        self.heads.write(head + STATUS, UNWRITTEN);
        let at = self.heads.address() + head as u64;
        let flags = match kind {
            request::IN | request::GET_ID => WRITE,
            _ => 0,
        };
        let mut data = self.data.address() + (usize::from(place) * self.shape.room) as u64;
        let first = place * (self.shape.pieces + 2);
        let mut index = first;
        let header = Descriptor::new(at, HEADER as u32, 0);
        self.ring.describe(index, header.then(index + 1));
        for &length in lengths.iter().filter(|&&length| length > 0) {
            index += 1;
            let piece = Descriptor::new(data, length as u32, flags);
            self.ring.describe(index, piece.then(index + 1));
            data += length as u64;
        }
        let status = Descriptor::new(at + STATUS as u64, 1, WRITE);
        self.ring.describe(index + 1, status);
        self.ring.offer(first);
        self.offered += 1;
    }

    /// Notifies the device of what has been offered, if it wants to know.
    pub fn kick(&mut self) {
        if self.offered == 0 {
            return;
        }
        if !self.has_event_idx || self.ring.wants_notification(self.offered) {
            self.disk.notify(self.ring.queue);
            self.kicks += 1;
        }
        self.offered = 0;
    }

    /// Lets the next request that is done interrupt.
    pub fn interrupt_next(&mut self) {
        let next = self.ring.taken();
        self.ring.set_used_event(next);
    }

    /// Takes a request that is done: its place, and how it ended.
    pub fn take(&mut self) -> Option<(u16, u8)> {
        let (head, _) = self.ring.take()?;
        let next = self.ring.taken().wrapping_add(NEVER);
        self.ring.set_used_event(next);
        let place = head / (self.shape.pieces + 2);
        Some((place, self.heads.read(usize::from(place) * HEAD + STATUS)))
    }

    /// Makes a request by the first place, and waits for its end.
    pub fn call(&mut self, kind: u32, sector: u64, length: usize) -> Result<u8, &'static str> {
        self.call_pieces(kind, sector, &[length])
    }

    /// The same with the data in pieces.
    pub fn call_pieces(
        &mut self,
        kind: u32,
        sector: u64,
        lengths: &[usize],
    ) -> Result<u8, &'static str> {
        self.offer_pieces(0, kind, sector, lengths);
        self.kick();
        self.wait()
    }

    /// Waits for the end of a request.
    pub fn wait(&mut self) -> Result<u8, &'static str> {
        let end = cpu::now() + cpu::PATIENCE;
        loop {
            if let Some((_, status)) = self.take() {
                return Ok(status);
            }
            if cpu::now() > end {
                return Err("the disk does not end a request");
            }
        }
    }
}

impl Drop for BlkQueue {
    /// The disk may not use memory that is freed.
    fn drop(&mut self) {
        self.disk.reset();
    }
}
