//! A front end of vhost-user with a guest's memory of its own, and one request at a time: all that a guest's driver can
//! do, and more.

use std::fs::File;
use std::io::{IoSlice, Read, Seek};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vmm::share::{Server, start};

use crate::harness::{PATIENCE, vm};

// Requests of vhost-user.
pub const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
pub const RESET_DEVICE: u32 = 34;
const SET_DEVICE_STATE_FD: u32 = 42;

/// Version 1.
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;

// virtio's and vhost-user's features, and protocol features.
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
const PROTOCOL: u64 = 1 << 30;
const MQ_REPLY_ACK_RESET_STATE: u64 = 1 | 1 << 3 | 1 << 13 | 1 << 19;

const MEMORY: u64 = 8 << 20;
/// Where the front end has the guest's memory.
const USER: u64 = 0x7000_0000_0000;
pub const SIZE: u16 = 64;

// Of each queue: its parts, and where a request and the answer to it lie.
const QUEUE: u64 = 4 << 20;
pub const DESC: u64 = 0;
pub const AVAIL: u64 = 0x1000;
pub const USED: u64 = 0x2000;
pub const REQUEST: u64 = 0x1_0000;
pub const ANSWER: u64 = 0x20_0000;

pub const HIPRIO: u32 = 0;
pub const REQUESTS: u32 = 1;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct Queue {
    kick: OwnedFd,
    call: OwnedFd,
    avail: u16,
}

/// A guest with one share.
pub struct Guest {
    pub server: Server,
    pub memory: File,
    queues: Vec<Queue>,
}

fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

impl Guest {
    /// Serves `directory` with minivmm itself, and starts both queues.
    pub fn new(directory: &Path, read_only: bool) -> Self {
        Self::by(directory, read_only, &vm::binary())
    }

    pub fn by(directory: &Path, read_only: bool, program: &Path) -> Self {
        let mut server = start(directory, read_only, Some(program)).unwrap();
        server
            .wait_ready()
            .unwrap_or_else(|error| panic!("{error}: {:?}", std::error::Error::source(&error)));
        let memory = File::from(memfd_create(c"guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&memory, MEMORY).unwrap();
        let queue = || Queue {
            kick: new_eventfd(),
            call: new_eventfd(),
            avail: 0,
        };
        let queues = vec![queue(), queue()];
        let mut guest = Self {
            server,
            memory,
            queues,
        };
        guest.connect();
        guest
    }

    /// What a front end says before the first request.
    pub fn connect(&mut self) {
        self.send(SET_OWNER, &[], &[]);
        assert_ne!(self.ask(GET_FEATURES) & VERSION_1, 0);
        self.ask(GET_PROTOCOL_FEATURES);
        let features = MQ_REPLY_ACK_RESET_STATE.to_le_bytes();
        self.send(SET_PROTOCOL_FEATURES, &features, &[]);
        let features = VERSION_1 | EVENT_IDX | PROTOCOL;
        self.set(SET_FEATURES, &features.to_le_bytes(), &[]);
        let mut table = [1u32, 0].map(u32::to_le_bytes).concat();
        table.extend([0, MEMORY, USER, 0].map(u64::to_le_bytes).concat());
        let memory = self.memory.try_clone().unwrap();
        self.set(SET_MEM_TABLE, &table, &[memory.as_fd()]);
        for index in [HIPRIO, REQUESTS] {
            self.start(index);
        }
    }

    /// Starts a queue from its beginning.
    pub fn start(&mut self, index: u32) {
        let pair = |value: u32| [index, value].map(u32::to_le_bytes).concat();
        let base = u64::from(index) * QUEUE;
        self.memory.write_all_at(&[0; 0x3000], base).unwrap();
        self.queues[index as usize].avail = 0;
        self.set(SET_VRING_NUM, &pair(SIZE.into()), &[]);
        self.set(SET_VRING_BASE, &pair(0), &[]);
        let mut addresses = pair(0);
        addresses.extend(
            [DESC, USED, AVAIL]
                .map(|part| (USER + base + part).to_le_bytes())
                .concat(),
        );
        addresses.extend([0; 8]);
        self.set(SET_VRING_ADDR, &addresses, &[]);
        let queue = &self.queues[index as usize];
        let [kick, call] = [&queue.kick, &queue.call].map(|fd| fd.try_clone().unwrap());
        let number = u64::from(index).to_le_bytes();
        self.set(SET_VRING_CALL, &number, &[call.as_fd()]);
        self.set(SET_VRING_KICK, &number, &[kick.as_fd()]);
        self.set(SET_VRING_ENABLE, &pair(1), &[]);
    }

    /// Sends a message and descriptors with it.
    pub fn send(&self, request: u32, body: &[u8], fds: &[BorrowedFd]) {
        self.send_flags(request, VERSION, body, fds);
    }

    fn send_flags(&self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd]) {
        let mut message = [request, flags, body.len() as u32]
            .map(u32::to_le_bytes)
            .concat();
        message.extend(body);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space[..]);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let bytes = [IoSlice::new(&message)];
        sendmsg(
            &self.server.socket,
            &bytes,
            &mut control,
            SendFlags::empty(),
        )
        .unwrap();
    }

    /// Sends a message that is to be acknowledged.
    fn set(&self, request: u32, body: &[u8], fds: &[BorrowedFd]) {
        self.send_flags(request, VERSION | NEED_REPLY, body, fds);
        let (reply, result) = self.reply();
        assert_eq!((reply, result), (request, 0));
    }

    /// Sends a message without a body that is answered with a number.
    pub fn ask(&self, request: u32) -> u64 {
        self.send(request, &[], &[]);
        self.reply().1
    }

    /// Stops a queue: what it would go on with.
    pub fn stop(&self, index: u32) -> u32 {
        let body = [index, 0].map(u32::to_le_bytes).concat();
        self.send(GET_VRING_BASE, &body, &[]);
        (self.reply().1 >> 32) as u32
    }

    /// The guest's driver resets the device: both queues stop.
    pub fn reset(&self) {
        self.set(RESET_DEVICE, &[], &[]);
    }

    /// Stops both queues, and has a server write down what the guest has open.
    pub fn save(&self) -> File {
        for index in [HIPRIO, REQUESTS] {
            self.stop(index);
        }
        let mut state = File::from(memfd_create(c"state", MemfdFlags::CLOEXEC).unwrap());
        self.transfer(0, &state);
        state.rewind().unwrap();
        state
    }

    /// Has another server, to which the guest has been connected, go on with that.
    pub fn restore(&mut self, state: &File) {
        for index in [HIPRIO, REQUESTS] {
            self.stop(index);
        }
        self.transfer(1, state);
        for index in [HIPRIO, REQUESTS] {
            self.start(index);
        }
    }

    /// Passes a file for the state, in the phase "stopped": the server has none to pass.
    fn transfer(&self, direction: u32, state: &File) {
        let body = [direction, 0].map(u32::to_le_bytes).concat();
        self.send(SET_DEVICE_STATE_FD, &body, &[state.as_fd()]);
        assert_eq!(self.reply(), (SET_DEVICE_STATE_FD, 1 << 8));
    }

    fn reply(&self) -> (u32, u64) {
        let mut message = [0; 20];
        (&self.server.socket).read_exact(&mut message).unwrap();
        let request = u32::from_le_bytes(message[..4].try_into().unwrap());
        let value = u64::from_le_bytes(message[12..].try_into().unwrap());
        (request, value)
    }

    pub fn put(&self, queue: u32, at: u64, bytes: &[u8]) {
        let at = u64::from(queue) * QUEUE + at;
        self.memory.write_all_at(bytes, at).unwrap();
    }

    pub fn get(&self, queue: u32, at: u64, bytes: &mut [u8]) {
        let at = u64::from(queue) * QUEUE + at;
        self.memory.read_exact_at(bytes, at).unwrap();
    }

    pub fn used(&self, queue: u32) -> u16 {
        let mut used = [0; 2];
        self.get(queue, USED + 2, &mut used);
        u16::from_le_bytes(used)
    }

    /// A descriptor, by its fields. The address is within the queue's part of memory.
    pub fn describe(&self, queue: u32, index: u16, (at, len, flags, next): (u64, u32, u16, u16)) {
        let at = u64::from(queue) * QUEUE + at;
        let mut bytes = at.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend([flags, next].map(u16::to_le_bytes).concat());
        self.put(queue, DESC + 16 * u64::from(index), &bytes);
    }

    /// Makes the chain at `head` available: the slot of its answer in the used ring.
    pub fn offer(&mut self, index: u32, head: u16) -> u64 {
        let queue = &mut self.queues[index as usize];
        let slot = u64::from(queue.avail % SIZE);
        queue.avail = queue.avail.wrapping_add(1);
        let avail = queue.avail;
        self.put(index, AVAIL + 4 + 2 * slot, &head.to_le_bytes());
        self.put(index, AVAIL + 2, &avail.to_le_bytes());
        fence(Ordering::SeqCst);
        let mut event = [0; 2];
        self.get(index, USED + 4 + 8 * u64::from(SIZE), &mut event);
        // Where it has asked to be kicked.
        if u16::from_le_bytes(event) == avail.wrapping_sub(1) {
            self.kick(index);
        }
        slot
    }

    /// Waits until so many requests are answered.
    pub fn wait_used(&self, index: u32, used: u16) {
        let is_used = || self.used(index) == used;
        assert!(self.until(index, is_used), "{}", self.server.service.said());
    }

    /// Makes the chain at `head` available and waits until it is used: how long its answer is.
    pub fn submit(&mut self, index: u32, head: u16) -> u32 {
        let slot = self.offer(index, head);
        let avail = self.queues[index as usize].avail;
        let used = || self.used(index) == avail;
        assert!(self.until(index, used), "{}", self.server.service.said());
        let mut element = [0; 8];
        self.get(index, USED + 4 + 8 * slot, &mut element);
        let [id, len] =
            [&element[..4], &element[4..]].map(|word| u32::from_le_bytes(word.try_into().unwrap()));
        assert_eq!(id, u32::from(head));
        len
    }

    pub fn kick(&self, index: u32) {
        rustix::io::write(&self.queues[index as usize].kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// Waits for calls of the device until this holds, or the server ends.
    fn until(&self, index: u32, holds: impl Fn() -> bool) -> bool {
        let timeout = Timespec {
            tv_sec: PATIENCE.as_secs() as i64,
            tv_nsec: 0,
        };
        // It is to call for the next one that it answers (virtio 1.2, 2.7.7).
        let ask = || {
            let used = self.used(index).to_le_bytes();
            self.put(index, AVAIL + 4 + 2 * u64::from(SIZE), &used);
            fence(Ordering::SeqCst);
        };
        loop {
            ask();
            if holds() {
                return true;
            }
            let call = &self.queues[index as usize].call;
            let mut fds = [
                PollFd::new(call, PollFlags::IN),
                PollFd::new(&self.server.socket, PollFlags::RDHUP),
            ];
            if poll(&mut fds, Some(&timeout)) == Ok(0) || !fds[1].revents().is_empty() {
                return false;
            }
            rustix::io::read(call, &mut [0; 8]).unwrap();
        }
    }

    /// Describes a request, with room for an answer, as the chain at 0.
    pub fn prepare(&self, queue: u32, request: &[u8], room: u32) {
        self.put(queue, REQUEST, request);
        let len = request.len() as u32;
        match room {
            0 => self.describe(queue, 0, (REQUEST, len, 0, 0)),
            _ => {
                self.describe(queue, 0, (REQUEST, len, NEXT, 1));
                self.describe(queue, 1, (ANSWER, room, WRITE, 0));
            }
        }
    }

    /// Sends a request and room for an answer: how much was answered.
    pub fn transact(&mut self, queue: u32, request: &[u8], room: u32) -> Vec<u8> {
        self.prepare(queue, request, room);
        let len = self.submit(queue, 0);
        let mut answer = vec![0; len as usize];
        self.get(queue, ANSWER, &mut answer);
        answer
    }

    /// The other end of the connection, to end it with.
    pub fn socket(&self) -> &UnixStream {
        &self.server.socket
    }
}
