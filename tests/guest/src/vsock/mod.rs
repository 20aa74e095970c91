//! The modes that use the socket device.
//!
//! `vsock` serves: echo on port 7, sink on 9, source of `bytes` on 19, one that never reads on 13; a
//! connection to port 1 ends it, and one to port 2 resets the machine. `vsock-connect` opens `count` connections to the host's `port`, sends
//! `bytes` of the stream on each and closes its half; the same bytes have to come back.

pub mod rig;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use rig::{
    CLOSED, CREDIT_REQUEST, CREDIT_UPDATE, MAX_DATA, NO_SEND, Packet, REQUEST, RESPONSE, RST, RW,
    Rig, SHUTDOWN,
};

use crate::net::stream::Position;
use crate::options::Options;
use crate::power;
use crate::report;
use crate::serial::println;

/// What the guest can take of a connection: as Linux has it by default.
const ROOM: u32 = 256 << 10;
/// Connections to these ports end the guest, and reset the machine.
const QUIT: u32 = 1;
const RESET: u32 = 2;
/// The first port of the guest's own.
const FIRST_PORT: u32 = 10_000;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Echo,
    Sink,
    Source,
    Silent,
    Client,
}

impl Role {
    /// The service on this port.
    fn of(port: u32) -> Option<Self> {
        match port {
            7 => Some(Self::Echo),
            9 => Some(Self::Sink),
            13 => Some(Self::Silent),
            19 => Some(Self::Source),
            _ => None,
        }
    }
}

/// A connection.
struct Connection {
    role: Role,
    /// The host has accepted, or the guest has.
    is_open: bool,
    /// The host's room, what it has passed on, and what it was sent.
    room: u32,
    forwarded: u32,
    sent: u32,
    /// What was taken here, and what the host knows of.
    taken: u32,
    said: u32,
    /// What has come and is to go out again.
    echo: VecDeque<u8>,
    input: Position,
    output: Position,
    /// How much is to be sent in all.
    bytes: u64,
    /// The flags of SHUTDOWN, of either side.
    host_shut: u32,
    shut: u32,
    is_waiting: bool,
}

/// All of them.
struct Stack {
    rig: Rig,
    connections: BTreeMap<(u32, u32), Connection>,
    /// Those that have something to send, and no room.
    waiting: VecDeque<(u32, u32)>,
    bytes: u64,
    served: u32,
    failed: u32,
    quit: bool,
}

/// Serves until a connection to port 1.
pub fn serve(options: &Options) {
    let mut stack = match Stack::start(options) {
        Ok(stack) => stack,
        Err(why) => return report::fail("vsock", why),
    };
    println!("READY vsock cid={}", stack.rig.cid);
    while !stack.quit {
        stack.turn_or_sleep();
    }
    stack.report("vsock");
}

/// Connects to the host.
pub fn connect(options: &Options) {
    let mut stack = match Stack::start(options) {
        Ok(stack) => stack,
        Err(why) => return report::fail("vsock-connect", why),
    };
    let host = u32::from(options.port.unwrap_or(7));
    for port in FIRST_PORT..FIRST_PORT + options.count {
        let key = (port, host);
        stack.insert(key, Role::Client, &Packet::default());
        stack.say(key, REQUEST, 0);
        stack.turn();
    }
    while !stack.connections.is_empty() {
        stack.turn_or_sleep();
    }
    stack.report("vsock-connect");
}

impl Stack {
    fn start(options: &Options) -> Result<Self, &'static str> {
        Ok(Self {
            rig: Rig::start(options)?,
            connections: BTreeMap::new(),
            waiting: VecDeque::new(),
            bytes: options.bytes,
            served: 0,
            failed: 0,
            quit: false,
        })
    }

    fn report(&self, name: &str) {
        let detail = format!("served={} failed={}", self.served, self.failed);
        match self.failed {
            0 => report::ok(name, detail),
            _ => report::fail(name, detail),
        }
    }

    fn insert(&mut self, key: (u32, u32), role: Role, packet: &Packet) {
        let connection = Connection {
            role,
            is_open: role != Role::Client,
            room: packet.buf_alloc,
            forwarded: packet.fwd_cnt,
            sent: 0,
            taken: 0,
            said: 0,
            echo: VecDeque::new(),
            input: Position::default(),
            output: Position::default(),
            bytes: self.bytes,
            host_shut: 0,
            shut: 0,
            is_waiting: false,
        };
        self.connections.insert(key, connection);
    }

    /// Sends a packet without data.
    fn say(&mut self, key: (u32, u32), op: u16, flags: u32) {
        self.send(key, op, flags, &[]);
    }

    fn send(&mut self, key: (u32, u32), op: u16, flags: u32, data: &[u8]) {
        let connection = self.connections.get_mut(&key);
        let fwd_cnt = connection.map_or(0, |connection| {
            connection.sent = connection.sent.wrapping_add(data.len() as u32);
            connection.said = connection.taken;
            connection.taken
        });
        let packet = Packet {
            port: key.0,
            host: key.1,
            op,
            flags,
            buf_alloc: ROOM,
            fwd_cnt,
        };
        self.rig.send(packet, data);
    }

    /// Does what there is to do; with interrupts, halts until there is something.
    fn turn_or_sleep(&mut self) {
        if !self.turn() {
            self.rig.sleep();
        }
    }

    /// Looks once at all that there is to do. Whether there was anything.
    fn turn(&mut self) -> bool {
        let mut data = Vec::new();
        let mut is_busy = self.rig.is_reset();
        if is_busy {
            println!("RESET vsock connections={}", self.connections.len());
            self.connections.clear();
            self.waiting.clear();
        }
        if let Some(packet) = self.rig.receive(&mut data) {
            is_busy = true;
            let key = (packet.port, packet.host);
            self.handle(key, &packet, &data);
            self.pump(key);
        }
        if let Some(key) = self.waiting.pop_front() {
            is_busy = true;
            if let Some(connection) = self.connections.get_mut(&key) {
                connection.is_waiting = false;
            }
            self.pump(key);
        }
        is_busy
    }

    fn handle(&mut self, key: (u32, u32), packet: &Packet, data: &[u8]) {
        if packet.op == REQUEST {
            match key.0 {
                QUIT => self.quit = true,
                RESET => power::reset(),
                _ => {}
            }
            return match Role::of(key.0) {
                Some(role) => {
                    self.insert(key, role, packet);
                    self.say(key, RESPONSE, 0);
                }
                None => self.say(key, RST, 0),
            };
        }
        let Some(connection) = self.connections.get_mut(&key) else {
            return match packet.op {
                RST => {}
                _ => self.say(key, RST, 0),
            };
        };
        (connection.room, connection.forwarded) = (packet.buf_alloc, packet.fwd_cnt);
        match packet.op {
            RESPONSE => connection.is_open = true,
            RST => self.end(key),
            RW => self.take(key, data),
            CREDIT_REQUEST => self.say(key, CREDIT_UPDATE, 0),
            SHUTDOWN => connection.host_shut |= packet.flags,
            _ => {}
        }
    }

    /// A connection is over: rightly if both sides had said that they are done.
    fn end(&mut self, key: (u32, u32)) {
        let Some(connection) = self.connections.remove(&key) else {
            return;
        };
        match connection.shut == CLOSED || connection.role == Role::Silent {
            true => self.served += 1,
            false => {
                self.failed += 1;
                println!("LOST {key:?} {:?}", connection.role);
            }
        }
    }

    fn take(&mut self, key: (u32, u32), data: &[u8]) {
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        match connection.role {
            Role::Echo => connection.echo.extend(data),
            Role::Sink | Role::Client => {
                if let Err(at) = connection.input.check(data) {
                    self.failed += 1;
                    println!("WRONG {key:?} at {at}");
                }
                connection.taken = connection.taken.wrapping_add(data.len() as u32);
            }
            Role::Source => connection.taken = connection.taken.wrapping_add(data.len() as u32),
            Role::Silent => {}
        }
        // Half of the room at a time, as a driver does that wants to be quick.
        if connection.taken.wrapping_sub(connection.said) >= ROOM / 2 {
            self.say(key, CREDIT_UPDATE, 0);
        }
    }

    /// Sends what a connection has, as far as there is room on either side.
    fn pump(&mut self, key: (u32, u32)) {
        while let Some(connection) = self.connections.get_mut(&key) {
            if !connection.is_open || connection.shut & NO_SEND != 0 {
                // The host has nothing more to say either: Linux resets then.
                if connection.is_open && connection.is_done() {
                    return self.finish(key);
                }
                return;
            }
            if !self.rig.can_send() {
                if !core::mem::replace(&mut connection.is_waiting, true) {
                    self.waiting.push_back(key);
                }
                return;
            }
            let under_way = connection.sent.wrapping_sub(connection.forwarded);
            let credit = (connection.room.saturating_sub(under_way) as usize).min(MAX_DATA);
            match connection.next(credit) {
                Next::Data(data) => self.send(key, RW, 0, &data),
                Next::Shut(flags) => {
                    connection.shut = flags;
                    self.say(key, SHUTDOWN, flags);
                }
                Next::Nothing => return,
            }
        }
    }

    /// A client's connection has all that it waits for.
    fn finish(&mut self, key: (u32, u32)) {
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        if connection.shut != CLOSED {
            connection.shut = CLOSED;
            let got = connection.input.0;
            if got != connection.bytes {
                self.failed += 1;
                println!("SHORT {key:?} {got}");
            }
            self.say(key, SHUTDOWN, CLOSED);
        }
    }
}

/// What a connection sends next.
enum Next {
    Data(Vec<u8>),
    Shut(u32),
    Nothing,
}

impl Connection {
    fn is_done(&self) -> bool {
        self.role == Role::Client && self.host_shut & NO_SEND != 0
    }

    fn next(&mut self, credit: usize) -> Next {
        let has_all = self.host_shut & NO_SEND != 0;
        match self.role {
            Role::Silent => Next::Nothing,
            Role::Echo => {
                let count = self.echo.len().min(credit);
                match count {
                    0 if self.echo.is_empty() && has_all => Next::Shut(CLOSED),
                    0 => Next::Nothing,
                    _ => {
                        self.taken = self.taken.wrapping_add(count as u32);
                        Next::Data(self.echo.drain(..count).collect())
                    }
                }
            }
            Role::Sink => {
                if !has_all {
                    return Next::Nothing;
                }
                let answer = format!("OK {}\n", self.input.0);
                match self.output.0 {
                    0 => {
                        self.output.0 = 1;
                        Next::Data(String::into_bytes(answer))
                    }
                    _ => Next::Shut(CLOSED),
                }
            }
            Role::Source | Role::Client => {
                let left = self.bytes - self.output.0;
                let count = (left as usize).min(credit);
                match (left, count, self.role) {
                    (0, _, Role::Client) => Next::Shut(NO_SEND),
                    (0, ..) => Next::Shut(CLOSED),
                    (_, 0, _) => Next::Nothing,
                    _ => {
                        let mut data = alloc::vec![0; count];
                        self.output.fill(&mut data);
                        Next::Data(data)
                    }
                }
            }
        }
    }
}
