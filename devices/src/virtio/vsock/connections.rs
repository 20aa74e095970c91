//! All connections of a guest, and which of them has something to say to it.
//!
//! Nothing here grows with what a guest or a program does: there are [`MAX_CONNECTIONS`], each waits
//! for its turn at most once, and the resets for packets that fit none of them are bounded too.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{EpollEvent, EventSet};

use super::connection::{Connection, Phase, Violation};
use super::counters::{Counting, count};
use super::header::{self, Header};
use super::host::{Client, Host, LISTENER};
use crate::virtio::Complaints;

/// Connections of a guest, with programs that have not said yet which port they want.
pub const MAX_CONNECTIONS: usize = 1024;
/// Resets that may wait for the guest before no more of its packets are looked at.
const MAX_RESETS: usize = 256;
/// Programs that are accepted in one turn.
const ACCEPTED_AT_ONCE: usize = 32;
/// The first port that a program of the host gets as its own: the guest's own are lower.
const FIRST_PORT: u32 = 1 << 30;
/// No port (VMADDR_PORT_ANY). Here it is in the keys of what has none.
const NO_PORT: u32 = u32::MAX;

/// How long a program may take to say which port it wants.
const LINE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the guest may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a program may take to read what a guest had sent before it closed.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(60);
/// How often all of these are looked at, while there are some.
const TICK: Duration = Duration::from_secs(1);

/// The connections of a guest whose driver is ready.
#[derive(Debug)]
pub struct Connections {
    host: Arc<Host>,
    cid: u64,
    counting: Arc<Counting>,
    complaints: Complaints,
    /// By [`key`].
    table: HashMap<u64, Connection>,
    clients: HashMap<u64, Client>,
    /// Those that have something for the guest, each once.
    ready: VecDeque<u64>,
    resets: VecDeque<Header>,
    next_port: u32,
    next_id: u32,
    /// There may be programs to be accepted.
    has_clients: bool,
    /// There were no descriptors for them.
    is_starved: bool,
    /// When those are looked at that may take so long and no longer.
    pub tick: Option<Instant>,
}

/// What is next for the guest.
#[derive(Debug)]
pub enum Outgoing {
    /// A packet without data.
    Packet(Header),
    /// Data, which are in a socket yet.
    Data(Data),
}

/// Data of a connection.
#[derive(Debug)]
pub struct Data {
    key: u64,
    /// So many bytes the guest can take.
    pub most: usize,
    /// There may well be more than fits one buffer.
    pub is_streaming: bool,
}

/// The header of a packet of a connection to the guest with this CID.
fn header(cid: u64, key: u64, op: u16) -> Header {
    Header {
        src_cid: header::HOST_CID,
        dst_cid: cid,
        src_port: (key >> 32) as u32,
        dst_port: key as u32,
        kind: header::STREAM,
        op,
        ..Header::default()
    }
}

fn key(host_port: u32, guest_port: u32) -> u64 {
    u64::from(host_port) << 32 | u64::from(guest_port)
}

impl Connections {
    /// None yet, of a guest with this CID.
    pub(super) fn new(host: Arc<Host>, cid: u32, counting: Arc<Counting>) -> Self {
        Self {
            host,
            cid: cid.into(),
            counting,
            complaints: Complaints::default(),
            table: HashMap::new(),
            clients: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
            next_id: 0,
            has_clients: true,
            is_starved: false,
            tick: None,
        }
    }

    /// Whether so many resets wait that the guest's packets have to wait, too.
    pub fn is_clogged(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Whether there is something for the guest.
    pub fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Whether there is more to do at once than [`Connections::look`] has done.
    pub fn has_more(&self) -> bool {
        self.has_clients && !self.is_starved
    }

    /// A packet of the guest's, whose data are `data`.
    ///
    /// # Safety
    ///
    /// The iovecs must describe `packet.len` bytes of memory that may be read.
    pub unsafe fn handle(&mut self, packet: &Header, data: &mut Vec<libc::iovec>) {
        if packet.src_cid != self.cid {
            return;
        }
        let key = key(packet.dst_port, packet.src_port);
        if packet.kind != header::STREAM || packet.dst_cid != header::HOST_CID {
            return self.refuse(packet);
        }
        let Some(connection) = self.table.get_mut(&key) else {
            return match packet.op {
                header::REQUEST => self.request(key, packet),
                _ => self.refuse(packet),
            };
        };
        connection.update_credit(packet);
        let was_blocked = connection.is_blocked();
        let done = match packet.op {
            header::RST => {
                let is_refusal = connection.phase == Phase::Asked;
                count(&self.counting.refused, is_refusal.into());
                self.remove(key);
                return;
            }
            header::RESPONSE => connection.accept(packet.dst_port),
            header::RW => {
                count(&self.counting.tx_bytes, packet.len.into());
                // SAFETY: the caller vouches for the memory.
                unsafe { connection.send(data, packet.len) }
            }
            header::CREDIT_UPDATE => Ok(()),
            header::CREDIT_REQUEST => {
                connection.credit_requested();
                Ok(())
            }
            header::SHUTDOWN => match connection.shut(packet.flags) {
                true => return self.orphan(key, packet),
                false => Ok(()),
            },
            _ => Err(Violation),
        };
        if done.is_err() {
            self.remove(key);
            return self.refuse(packet);
        }
        if let (false, true, Some(fd)) = (was_blocked, connection.is_blocked(), connection.fd()) {
            self.host.watch_anew(fd, key, connection.events());
        }
        self.schedule(key);
    }

    /// The guest asks for a connection.
    fn request(&mut self, key: u64, packet: &Header) {
        count(&self.counting.from_guest, 1);
        let is_port = packet.src_port != NO_PORT && packet.dst_port != NO_PORT;
        let socket = match self.has_room() && is_port {
            true => self.host.connect(packet.dst_port).ok(),
            false => None,
        };
        let connection = socket.map(|socket| Connection::from_guest(socket, packet));
        if let Some(connection) = connection
            && self.watch(key, &connection)
        {
            self.insert(key, connection);
            return self.schedule(key);
        }
        count(&self.counting.refused, 1);
        self.refuse(packet);
    }

    /// Whether there may be another connection. Says so in the log where not.
    fn has_room(&self) -> bool {
        let has_room = self.table.len() + self.clients.len() < MAX_CONNECTIONS;
        if !has_room && self.complaints.may_warn() {
            log::warn!("vsock: refused a connection: there are {MAX_CONNECTIONS} already");
        }
        has_room
    }

    fn watch(&self, key: u64, connection: &Connection) -> bool {
        let fd = connection.fd();
        fd.is_some_and(|fd| self.host.watch(fd, key, connection.events()).is_ok())
    }

    /// The guest has closed it. It may use its port again; what it has sent still goes to the host.
    fn orphan(&mut self, key: u64, packet: &Header) {
        self.refuse(packet);
        let Some(mut connection) = self.remove(key) else {
            return;
        };
        connection.phase = Phase::Orphan;
        let fd = connection.fd().filter(|_| !connection.is_over());
        let Some(fd) = fd else {
            return;
        };
        connection.deadline = Some(Instant::now() + ORPHAN_TIMEOUT);
        connection.is_queued = false;
        let key = self.new_id();
        self.host.watch_anew(fd, key, connection.events());
        self.insert(key, connection);
        self.start_clock();
    }

    /// A key of something that is no connection of the guest's.
    fn new_id(&mut self) -> u64 {
        loop {
            // Never that of the listening socket.
            self.next_id = (self.next_id + 1) % NO_PORT;
            let key = key(NO_PORT, self.next_id);
            if !self.clients.contains_key(&key) && !self.table.contains_key(&key) {
                return key;
            }
        }
    }

    fn insert(&mut self, key: u64, connection: Connection) {
        self.table.insert(key, connection);
        self.count_open();
    }

    fn remove(&mut self, key: u64) -> Option<Connection> {
        let connection = self.table.remove(&key)?;
        // Or a guest that opens and closes would fill the queue.
        if connection.is_queued {
            self.ready.retain(|&queued| queued != key);
        }
        self.count_open();
        self.is_starved = false;
        Some(connection)
    }

    fn count_open(&self) {
        let open = self.table.len() as u64;
        self.counting.open.store(open, Ordering::Relaxed);
    }

    /// Resets what a packet of the guest's is about.
    fn refuse(&mut self, packet: &Header) {
        if packet.op != header::RST {
            self.resets.push_back(packet.reset());
        }
    }

    /// Gives a connection its turn to send to the guest, if it has something.
    fn schedule(&mut self, key: u64) {
        if let Some(connection) = self.table.get_mut(&key)
            && !connection.is_queued
            && connection.has_turn()
        {
            connection.is_queued = true;
            self.ready.push_back(key);
        }
    }

    /// What is next for the guest.
    pub fn next(&mut self) -> Option<Outgoing> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(Outgoing::Packet(reset));
        }
        while let Some(key) = self.ready.pop_front() {
            let Some(connection) = self.table.get_mut(&key) else {
                continue;
            };
            connection.is_queued = false;
            if let Some((op, flags)) = connection.take_op() {
                let mut packet = header(self.cid, key, op);
                packet.flags = flags;
                connection.stamp(&mut packet);
                self.schedule(key);
                return Some(Outgoing::Packet(packet));
            }
            if let Some(most) = connection.sendable() {
                return Some(Outgoing::Data(Data {
                    key,
                    most: most as usize,
                    is_streaming: connection.is_streaming,
                }));
            }
            self.schedule(key);
        }
        None
    }

    /// Reads data into the guest's memory. Returns how much, and the header of its packets, whose
    /// length is still to be set.
    ///
    /// # Safety
    ///
    /// Each iovec must describe memory that may be written, together [`Data::most`] bytes at the most.
    pub unsafe fn read(&mut self, data: &Data, room: &[libc::iovec]) -> (usize, Header) {
        let mut packet = header(self.cid, data.key, header::RW);
        let Some(connection) = self.table.get_mut(&data.key) else {
            return (0, packet);
        };
        // SAFETY: the caller vouches for the memory.
        let len = unsafe { connection.read(room) };
        if len > 0 {
            connection.stamp(&mut packet);
        }
        count(&self.counting.rx_bytes, len as u64);
        self.schedule(data.key);
        (len, packet)
    }

    /// Looks at what has happened to the host's sockets.
    ///
    /// # Errors
    ///
    /// Fails with EINTR.
    pub fn look(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 64];
        let seen = self.host.events(&mut events)?;
        for event in &events[..seen] {
            match event.data() {
                LISTENER => self.has_clients = true,
                key if self.clients.contains_key(&key) => self.hear(key),
                key => self.socket_event(key, event.event_set()),
            }
        }
        Ok(())
    }

    fn socket_event(&mut self, key: u64, events: EventSet) {
        let Some(connection) = self.table.get_mut(&key) else {
            return;
        };
        connection.note(events);
        let was_blocked = connection.is_blocked();
        connection.flush();
        if connection.is_given_up() {
            return self.give_up(key);
        }
        if connection.is_over() {
            self.remove(key);
            return;
        }
        if let (true, false, Some(fd)) = (was_blocked, connection.is_blocked(), connection.fd()) {
            self.host.watch_anew(fd, key, connection.events());
        }
        self.schedule(key);
    }

    /// Ends a connection that has not come about, and says so to a guest that knows of it.
    fn give_up(&mut self, key: u64) {
        let given_up = self.remove(key);
        if given_up.is_some_and(|connection| connection.phase == Phase::Asked) {
            self.resets.push_back(header(self.cid, key, header::RST));
        }
    }

    /// Accepts programs that connect, but not so many that all else would wait.
    pub fn accept(&mut self) {
        for _ in 0..ACCEPTED_AT_ONCE {
            if !self.has_more() {
                return;
            }
            match self.host.accept() {
                Ok(socket) => self.accepted(socket),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                        self.is_starved = true;
                        if self.complaints.may_warn() {
                            log::warn!("vsock: a program has to wait for its connection: {error}");
                        }
                    }
                    Some(libc::EINTR | libc::ECONNABORTED) => {}
                    _ => self.has_clients = false,
                },
            }
        }
    }

    fn accepted(&mut self, socket: UnixStream) {
        count(&self.counting.from_host, 1);
        let key = self.new_id();
        let client = Client::new(socket, Instant::now() + LINE_TIMEOUT);
        let events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        // Closing it is the refusal.
        if !self.has_room() || self.host.watch(client.fd(), key, events).is_err() {
            return count(&self.counting.refused, 1);
        }
        self.clients.insert(key, client);
        self.start_clock();
    }

    /// Hears a program out that is to say which port it wants.
    fn hear(&mut self, id: u64) {
        let Some(mut client) = self.clients.remove(&id) else {
            return;
        };
        match client.port() {
            Ok(None) => {
                self.clients.insert(id, client);
            }
            Ok(Some(guest_port)) if guest_port != NO_PORT => {
                let key = self.new_key(guest_port);
                let mut connection = Connection::from_host(client.into_socket());
                connection.deadline = Some(Instant::now() + ANSWER_TIMEOUT);
                if let Some(fd) = connection.fd() {
                    self.host.watch_anew(fd, key, connection.events());
                }
                self.insert(key, connection);
                self.start_clock();
                self.schedule(key);
            }
            // Closing it is the refusal.
            _ => {
                count(&self.counting.refused, 1);
                self.is_starved = false;
            }
        }
    }

    /// The key of a connection to this port, from one that is free.
    fn new_key(&mut self, guest_port: u32) -> u64 {
        loop {
            let port = self.next_port;
            self.next_port = FIRST_PORT | (port.wrapping_add(1) % FIRST_PORT);
            let key = key(port, guest_port);
            if !self.table.contains_key(&key) {
                return key;
            }
        }
    }

    fn start_clock(&mut self) {
        self.tick.get_or_insert_with(|| Instant::now() + TICK);
    }

    /// Ends what has taken too long.
    pub fn expire(&mut self, now: Instant) {
        let before = self.clients.len();
        self.clients.retain(|_, client| client.deadline > now);
        let late = (before - self.clients.len()) as u64;
        count(&self.counting.refused, late);
        let is_late = |connection: &Connection| connection.deadline.is_some_and(|at| at <= now);
        let late = self.table.iter().filter(|(_, one)| is_late(one));
        let late = late.map(|(key, one)| (*key, one.phase != Phase::Orphan));
        let late: Vec<(u64, bool)> = late.collect();
        for (key, is_refusal) in late {
            count(&self.counting.refused, is_refusal.into());
            self.give_up(key);
        }
        self.is_starved = false;
        let waits = |connection: &Connection| connection.deadline.is_some();
        let is_some = !self.clients.is_empty() || self.table.values().any(waits);
        self.tick = is_some.then_some(now + TICK);
    }

    /// Closes everything.
    pub fn close(&mut self) {
        *self = Self::new(
            Arc::clone(&self.host),
            self.cid as u32,
            Arc::clone(&self.counting),
        );
        self.count_open();
    }

    /// Nothing has happened for so long, because the guest was paused.
    pub fn shift(&mut self, paused: Duration) {
        for client in self.clients.values_mut() {
            client.deadline += paused;
        }
        for connection in self.table.values_mut() {
            connection.deadline = connection.deadline.map(|at| at + paused);
        }
    }
}
