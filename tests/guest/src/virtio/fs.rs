//! What is special to a file system device: its queues by hand, and requests of FUSE (virtio 1.2, 5.11;
//! include/uapi/linux/fuse.h).

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use super::device::{VirtioDevice, go, negotiate, queue_size};
use super::ring::{Descriptor, Ring, WRITE};
use crate::cpu;
use crate::memory::{PAGE, Shared};

/// The queue for requests that overtake others, and that for these.
pub const HIGH_PRIORITY: usize = 0;
pub const REQUESTS: usize = 1;

/// What a request is to do.
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const INIT: u32 = 26;
    pub const CREATE: u32 = 35;
}

/// The node that every path begins with.
pub const ROOT: u64 = 1;
/// The version of FUSE: 7.31, which every server knows.
const VERSION: [u32; 2] = [7, 31];
/// FUSE_MAX_PAGES: a request may have more than 128 KiB.
const MAX_PAGES: u32 = 1 << 22;

const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;
/// So far ahead an event index asks for no interrupt.
pub const NEVER: u16 = 0x8000;
const TAG_LEN: u64 = 36;
const QUEUES: u16 = 2;
/// Descriptors of a queue that are used here.
const SIZE: u16 = 8;
/// Bytes of the headers of a request and of a reply.
pub const IN_HEADER: usize = 40;
pub const OUT_HEADER: usize = 16;
/// Where the reply of a request begins in its memory.
const REPLY: usize = PAGE;

/// What came of a request: an error number or 0, and what follows the header of the reply.
pub type Reply = (i32, Vec<u8>);

/// A device that is up.
#[derive(Debug)]
pub struct Fs {
    pub device: VirtioDevice,
    /// Its queues.
    pub rings: Vec<Ring>,
    has_event_idx: bool,
    /// For each queue a request and its reply.
    memory: Vec<Shared>,
    unique: u64,
}

/// The header of a request of so many bytes, of user, group and process 0.
pub fn header(length: usize, opcode: u32, unique: u64, node: u64) -> [u8; IN_HEADER] {
    let mut header = [0; IN_HEADER];
    header[..4].copy_from_slice(&(length as u32).to_le_bytes());
    header[4..8].copy_from_slice(&opcode.to_le_bytes());
    header[8..16].copy_from_slice(&unique.to_le_bytes());
    header[16..24].copy_from_slice(&node.to_le_bytes());
    header
}

/// The tag that it is mounted by.
pub fn tag(device: VirtioDevice) -> String {
    let bytes = (0..TAG_LEN).map(|at| device.config::<u8>(at));
    let bytes: Vec<_> = bytes.take_while(|&byte| byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// How many queues for requests it has.
pub fn request_queues(device: VirtioDevice) -> u32 {
    device.config(TAG_LEN)
}

impl Fs {
    /// Brings a device up.
    pub fn start(device: VirtioDevice) -> Result<Self, &'static str> {
        Self::start_with(device, 0, SIZE)
    }

    /// The same with those of these features that it offers besides, and room for so many descriptors in a
    /// queue.
    pub fn start_with(
        device: VirtioDevice,
        features: u64,
        descriptors: u16,
    ) -> Result<Self, &'static str> {
        let features = negotiate(device, VERSION_1 | features)?;
        let size = descriptors.next_power_of_two().max(SIZE);
        let rings = (0..QUEUES).map(|number| {
            let mut ring = Ring::new(number, queue_size(device, number, size)?);
            if ring.size < descriptors {
                return Err("the queue is too small");
            }
            // It polls. Without event indexes the device does not look.
            ring.set_used_event(NEVER);
            ring.enable(device);
            Ok(ring)
        });
        let rings = rings.collect::<Result<_, &'static str>>()?;
        go(device);
        Ok(Self {
            device,
            rings,
            has_event_idx: features & EVENT_IDX != 0,
            memory: (0..QUEUES).map(|_| Shared::new(2 * PAGE)).collect(),
            unique: 0,
        })
    }

    /// Whether the device wants to be notified of the last `offered` requests.
    pub fn wants_notification(&self, queue: usize, offered: u16) -> bool {
        !self.has_event_idx || self.rings[queue].wants_notification(offered)
    }

    /// Makes a request by a queue which has none on its way, with room for so many bytes after the
    /// reply's header; nothing at all for one that has no reply.
    pub fn offer(&mut self, queue: usize, opcode: u32, node: u64, body: &[u8], room: Option<u32>) {
        self.unique += 1;
        let header = header(IN_HEADER + body.len(), opcode, self.unique, node);
        let memory = &mut self.memory[queue];
        memory.put(0, &header);
        memory.put(IN_HEADER, body);
        memory.put(REPLY, &[0; OUT_HEADER]);
        let at = memory.address();
        let mut chain = vec![
            Descriptor::new(at, IN_HEADER as u32, 0),
            Descriptor::new(at + IN_HEADER as u64, body.len() as u32, 0),
        ];
        if let Some(room) = room {
            let reply = at + REPLY as u64;
            chain.push(Descriptor::new(reply, OUT_HEADER as u32, WRITE));
            let data = Descriptor::new(reply + OUT_HEADER as u64, room, WRITE);
            chain.extend((room > 0).then_some(data));
        }
        chain.retain(|descriptor| descriptor.length > 0);
        let ring = &mut self.rings[queue];
        ring.offer_chain(&chain);
        self.device.notify(queue as u16);
    }

    /// Waits for the end of a queue's request.
    pub fn wait(&mut self, queue: usize) -> Result<Reply, &'static str> {
        let end = cpu::now() + cpu::PATIENCE;
        let length = loop {
            if let Some((_, length)) = self.rings[queue].take() {
                break length as usize;
            }
            if cpu::now() > end {
                return Err("a request is not completed");
            }
        };
        if length < OUT_HEADER {
            return Ok((0, Vec::new()));
        }
        let memory = &self.memory[queue];
        let (written, error): (u32, i32) =
            (memory.read(REPLY), memory.read::<u32>(REPLY + 4) as i32);
        if written as usize != length || memory.read::<u64>(REPLY + 8) != self.unique {
            return Err("a reply is that of another request");
        }
        let mut bytes = vec![0; length - OUT_HEADER];
        memory.get(REPLY + OUT_HEADER, &mut bytes);
        Ok((error, bytes))
    }

    /// Makes a request and waits for its end.
    pub fn call(
        &mut self,
        opcode: u32,
        node: u64,
        body: &[u8],
        room: u32,
    ) -> Result<Reply, &'static str> {
        self.offer(REQUESTS, opcode, node, body, Some(room));
        self.wait(REQUESTS)
    }

    /// The first request of all. Returns the server's version.
    pub fn init(&mut self) -> Result<(i32, u32), &'static str> {
        // No read-ahead.
        let [major, minor] = VERSION;
        let body = [major, minor, 0, MAX_PAGES].map(u32::to_le_bytes).concat();
        let (error, reply) = self.call(opcode::INIT, 0, &body, 64)?;
        Ok((error, word(&reply, 4)))
    }
}

impl Drop for Fs {
    /// The device may not use memory that is freed.
    fn drop(&mut self) {
        self.device.reset();
    }
}

/// The word at an offset of a reply, or 0 beyond its end.
pub fn word(reply: &[u8], at: usize) -> u32 {
    let bytes = reply
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u32::from_le_bytes)
}

/// Two of them.
pub fn double(reply: &[u8], at: usize) -> u64 {
    u64::from(word(reply, at + 4)) << 32 | u64::from(word(reply, at))
}
