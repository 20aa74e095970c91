//! Requests to a share's server, several at a time, and how many there were.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::{READ_ONLY, READ_WRITE, lookup, open};
use crate::cpu;
use crate::disk::load::Blocks;
use crate::memory::{PAGE, Shared};
use crate::options::{Operation, Options};
use crate::serial::println;
use crate::virtio::device::VirtioDevice;
use crate::virtio::fs::{
    EVENT_IDX, Fs, IN_HEADER, NEVER, OUT_HEADER, REQUESTS, ROOT, header, opcode,
};
use crate::virtio::ring::{Descriptor, WRITE};

/// The file that is used.
const NAME: &str = "load";
/// Descriptors of a request: header and body, header and body of the reply, and data.
const DESCRIPTORS: u16 = 5;
/// Where a reply begins in a place; the data begin on the next page.
const REPLY: usize = PAGE / 2;
/// Bytes that follow the header of a reply: of WRITE, of LOOKUP and of GETATTR.
const WRITTEN: usize = 8;
const ENTRY: usize = 128;
const ATTRIBUTES: usize = 104;

/// Requests of `guest.op`, `guest.depth` at a time, for `guest.ms`: of `guest.block` bytes each in the
/// first `guest.bytes` of the file.
pub fn run(device: VirtioDevice, options: &Options) -> Result<String, String> {
    let mut fs = Fs::start_with(device, EVENT_IDX, options.depth * DESCRIPTORS)?;
    fs.init()?;
    let node = lookup(&mut fs, NAME)?;
    let flags = match options.operation {
        Operation::Write => READ_WRITE,
        _ => READ_ONLY,
    };
    let handle = open(&mut fs, node, flags)?;
    let mut load = Load {
        memory: Shared::new(usize::from(options.depth) * place_size(options)),
        fs,
        options,
        blocks: Blocks::new(options.order, options.bytes / options.block as u64),
        node,
        handle,
        offered: 0,
        kicks: 0,
    };
    println!("READY share-load");
    let start = cpu::ticks();
    let end = start + cpu::ticks_in(options.nanoseconds());
    (0..options.depth).for_each(|place| load.offer(place));
    load.kick();
    let (mut requests, mut waiting) = (0_u64, options.depth);
    while waiting > 0 {
        let now = cpu::ticks();
        if now > end + cpu::ticks_in(cpu::PATIENCE.total_micros() * 1000) {
            return Err("a request is not completed".into());
        }
        while let Some(place) = load.take()? {
            requests += 1;
            if now > end {
                waiting -= 1;
            } else {
                load.offer(place);
            }
        }
        load.kick();
    }
    let ns = cpu::ns_of(cpu::ticks() - start);
    let kicks = load.kicks;
    // The device stays up, so that what its server's threads have used can be read; nothing is on its way.
    core::mem::forget(load);
    Ok(format!("requests={requests} ns={ns} kicks={kicks}"))
}

/// A page for what is no data, and the data.
fn place_size(options: &Options) -> usize {
    PAGE + options.block.next_multiple_of(PAGE)
}

struct Load<'a> {
    fs: Fs,
    /// A place for each request that may be on its way.
    memory: Shared,
    options: &'a Options,
    blocks: Blocks,
    node: u64,
    handle: u64,
    /// Requests that the device need not know of yet.
    offered: u16,
    kicks: u64,
}

impl Load<'_> {
    /// What a request is: its number, the node, its body, the bytes of its reply's body, and whether its
    /// data go to the device or come from there, if it has any.
    fn request(&mut self) -> (u32, u64, Vec<u8>, usize, Option<bool>) {
        match self.options.operation {
            Operation::Read => (opcode::READ, self.node, self.extent(), 0, Some(false)),
            Operation::Write => (opcode::WRITE, self.node, self.extent(), WRITTEN, Some(true)),
            Operation::Lookup => {
                let name = [NAME.as_bytes(), b"\0"].concat();
                (opcode::LOOKUP, ROOT, name, ENTRY, None)
            }
            Operation::Attributes => {
                let body = [0; 16].to_vec();
                (opcode::GETATTR, self.node, body, ATTRIBUTES, None)
            }
        }
    }

    /// The body of a request for the next block.
    fn extent(&mut self) -> Vec<u8> {
        let length = self.options.block as u32;
        let offset = self.blocks.next() * u64::from(length);
        let mut body = [self.handle, offset].map(u64::to_le_bytes).concat();
        body.extend_from_slice(&length.to_le_bytes());
        body.resize(40, 0);
        body
    }

    /// Makes a request available.
    fn offer(&mut self, place: u16) {
        let (number, node, body, reply, data) = self.request();
        let length = IN_HEADER + body.len();
        let block = self.options.block;
        let sent = if data == Some(true) { block } else { 0 };
        let at = usize::from(place) * place_size(self.options);
        let header = header(length + sent, number, u64::from(place) + 1, node);
        self.memory.put(at, &header);
        self.memory.put(at + IN_HEADER, &body);
        self.memory.put(at + REPLY, &[0; OUT_HEADER]);
        let piece = |offset: usize, length: usize, flags: u16| {
            let address = self.memory.address() + (at + offset) as u64;
            Descriptor::new(address, length as u32, flags)
        };
        let received = if data == Some(false) { block } else { 0 };
        let mut chain = [
            piece(0, IN_HEADER, 0),
            piece(IN_HEADER, body.len(), 0),
            piece(PAGE, sent, 0),
            piece(REPLY, OUT_HEADER, WRITE),
            piece(REPLY + OUT_HEADER, reply, WRITE),
        ];
        if received > 0 {
            chain[4] = piece(PAGE, received, WRITE);
        }
        let first = place * DESCRIPTORS;
        let ring = &mut self.fs.rings[REQUESTS];
        let pieces = chain.iter().filter(|piece| piece.length > 0);
        let last = first + pieces.clone().count() as u16 - 1;
        for (index, piece) in (first..).zip(pieces) {
            let piece = if index < last {
                piece.then(index + 1)
            } else {
                *piece
            };
            ring.describe(index, piece);
        }
        ring.offer(first);
        self.offered += 1;
    }

    /// Notifies the device of what has been offered, if it wants to know.
    fn kick(&mut self) {
        if self.offered > 0 && self.fs.wants_notification(REQUESTS, self.offered) {
            self.fs.device.notify(REQUESTS as u16);
            self.kicks += 1;
        }
        self.offered = 0;
    }

    /// Takes the place of a request that is done, which must have gone well.
    fn take(&mut self) -> Result<Option<u16>, String> {
        let ring = &mut self.fs.rings[REQUESTS];
        let Some((head, length)) = ring.take() else {
            return Ok(None);
        };
        ring.set_used_event(ring.taken().wrapping_add(NEVER));
        let place = head / DESCRIPTORS;
        let at = usize::from(place) * place_size(self.options) + REPLY;
        let (written, error) = (
            self.memory.read::<u32>(at),
            self.memory.read::<u32>(at + 4) as i32,
        );
        let is_whole = match self.options.operation {
            Operation::Read => length as usize == OUT_HEADER + self.options.block,
            _ => true,
        };
        match error == 0 && written == length && is_whole {
            true => Ok(Some(place)),
            false => Err(format!("a request ends with error={error} length={length}")),
        }
    }
}
