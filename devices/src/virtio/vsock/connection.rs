//! One connection between a port of the guest's and a Unix socket of the host's.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use vmm_sys_util::epoll::EventSet;

use super::header::{self, Header};

use crate::disk::advance;
use crate::virtio::iovec::gather;

/// Bytes that a guest may have sent of a connection and its socket has not taken yet. They are held
/// here, so that a peer that does not read keeps only its own connection waiting.
pub const BUFFER: u32 = 256 << 10;
/// The most bytes of a packet for the guest.
pub const MAX_PACKET: u32 = 64 << 10;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The guest is to be asked.
    Asking,
    /// It has been asked.
    Asked,
    /// It has asked, and the answer is to be sent.
    Answering,
    /// Both sides have agreed.
    Established,
    /// The guest has closed it. What it had sent before goes to the host.
    Orphan,
}

/// A packet that makes no sense in its connection: it is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation;

/// A connection.
#[derive(Debug)]
pub struct Connection {
    /// Closed as soon as the host's side is.
    socket: Option<UnixStream>,
    /// How far it is.
    pub phase: Phase,
    /// When it ends if nothing happens.
    pub deadline: Option<Instant>,
    /// It waits for its turn to send to the guest.
    pub is_queued: bool,
    /// The socket may have something to read, as far as is known.
    readable: bool,
    /// The last read has filled the room that it had: there may be as much again.
    pub is_streaming: bool,
    /// The socket is closed in both directions.
    hung_up: bool,
    /// The flags of SHUTDOWN that the guest has sent.
    guest_shut: u32,
    /// Those of them that the socket has got.
    passed_shut: u32,
    /// The flags that the guest is to know of, and those that it does.
    host_shut: u32,
    said_shut: u32,
    /// What the guest can take: bytes that it holds, has passed on, and was sent.
    peer_alloc: u32,
    peer_forwarded: u32,
    sent: u32,
    /// It was asked for its credit, of which there was none.
    has_asked: bool,
    must_ask: bool,
    /// Bytes that came from the guest, that its socket has taken, and that the guest knows of.
    received: u32,
    forwarded: u32,
    said_forwarded: u32,
    must_update: bool,
    /// What the socket has not taken yet, from `taken` on.
    held: Vec<u8>,
    taken: usize,
}

impl Connection {
    /// One that a program of the host asks for.
    pub fn from_host(socket: UnixStream) -> Self {
        Self {
            socket: Some(socket),
            phase: Phase::Asking,
            deadline: None,
            is_queued: false,
            readable: false,
            is_streaming: false,
            hung_up: false,
            guest_shut: 0,
            passed_shut: 0,
            host_shut: 0,
            said_shut: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
            sent: 0,
            has_asked: false,
            must_ask: false,
            received: 0,
            forwarded: 0,
            said_forwarded: 0,
            must_update: false,
            held: Vec::new(),
            taken: 0,
        }
    }

    /// One that the guest has asked for.
    pub fn from_guest(socket: UnixStream, request: &Header) -> Self {
        let mut connection = Self::from_host(socket);
        connection.phase = Phase::Answering;
        connection.update_credit(request);
        connection
    }

    /// The socket, unless the host's side is closed.
    pub fn fd(&self) -> Option<RawFd> {
        self.socket.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// What its socket is watched for: room only while there is something for it.
    pub fn events(&self) -> EventSet {
        let events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        match self.is_blocked() {
            true => events | EventSet::OUT,
            false => events,
        }
    }

    /// Whether something waits for the socket to take it.
    pub fn is_blocked(&self) -> bool {
        !self.held.is_empty()
    }

    /// Whether nothing is left to do for it.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Orphan && !self.is_blocked()
    }

    /// The socket has something to read or to say.
    pub fn note(&mut self, events: EventSet) {
        self.readable |= events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            (self.readable, self.hung_up) = (true, true);
        }
    }

    /// Whether a program that asked for the connection has gone before it had one.
    pub fn is_given_up(&self) -> bool {
        matches!(self.phase, Phase::Asking | Phase::Asked) && self.hung_up
    }

    /// The guest has accepted: says so to the program that asked, with the port that it has.
    ///
    /// # Errors
    ///
    /// It was not asked, or the program has gone.
    pub fn accept(&mut self, port: u32) -> Result<(), Violation> {
        if self.phase != Phase::Asked {
            return Err(Violation);
        }
        (self.phase, self.deadline) = (Phase::Established, None);
        let said = format!("OK {port}\n");
        let mut iovecs = [iovec(said.as_bytes())];
        // SAFETY: the iovec describes `said`.
        let sent = unsafe { self.write(&mut iovecs) };
        match sent {
            Ok(n) if n == said.len() => Ok(()),
            _ => Err(Violation),
        }
    }

    /// A packet of the guest's says what it can take.
    pub fn update_credit(&mut self, packet: &Header) {
        (self.peer_alloc, self.peer_forwarded) = (packet.buf_alloc, packet.fwd_cnt);
        if self.credit() > 0 {
            self.has_asked = false;
        }
    }

    /// The guest asks for our credit.
    pub fn credit_requested(&mut self) {
        self.must_update = true;
    }

    /// Bytes that the guest can take now.
    fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_alloc.saturating_sub(under_way)
    }

    /// Whether data may be read for the guest.
    fn may_read(&self) -> bool {
        self.phase == Phase::Established
            && self.readable
            && self.host_shut & header::NO_SEND == 0
            && self.guest_shut & header::NO_RECEIVE == 0
    }

    /// How many bytes of data can be sent to the guest now, if there may be any.
    pub fn sendable(&mut self) -> Option<u32> {
        if !self.may_read() {
            return None;
        }
        let credit = self.credit();
        if credit == 0 && !self.has_asked {
            (self.must_ask, self.has_asked) = (true, true);
        }
        (credit > 0).then_some(credit.min(MAX_PACKET))
    }

    /// The packet without data that is to be sent to the guest before anything else, with its flags.
    pub fn take_op(&mut self) -> Option<(u16, u32)> {
        match self.phase {
            Phase::Asking => {
                self.phase = Phase::Asked;
                return Some((header::REQUEST, 0));
            }
            Phase::Answering => {
                self.phase = Phase::Established;
                return Some((header::RESPONSE, 0));
            }
            Phase::Asked | Phase::Orphan => return None,
            Phase::Established => {}
        }
        if self.said_shut != self.host_shut {
            self.said_shut = self.host_shut;
            return Some((header::SHUTDOWN, self.host_shut));
        }
        if std::mem::take(&mut self.must_ask) {
            return Some((header::CREDIT_REQUEST, 0));
        }
        let must_update = std::mem::take(&mut self.must_update);
        must_update.then_some((header::CREDIT_UPDATE, 0))
    }

    /// Whether there is something to send to the guest.
    pub fn has_turn(&mut self) -> bool {
        let has_op = match self.phase {
            Phase::Asking | Phase::Answering => true,
            Phase::Asked | Phase::Orphan => false,
            Phase::Established => {
                self.said_shut != self.host_shut || self.must_ask || self.must_update
            }
        };
        // Finding no credit is what makes it ask.
        has_op || self.sendable().is_some() || self.must_ask
    }

    /// What a packet to the guest says of the credit that it has here.
    pub fn stamp(&mut self, header: &mut Header) {
        (header.buf_alloc, header.fwd_cnt) = (BUFFER, self.forwarded);
        self.said_forwarded = self.forwarded;
        self.must_update = false;
    }

    /// Reads data for the guest into its memory. Nothing is there where it returns 0.
    ///
    /// # Safety
    ///
    /// Each iovec must describe memory that may be written.
    pub unsafe fn read(&mut self, iovecs: &[libc::iovec]) -> usize {
        let Some(fd) = self.fd() else {
            return 0;
        };
        let room: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
        // SAFETY: the caller vouches for the memory; pointer and count are those of one slice.
        let n = unsafe { libc::syscall(libc::SYS_readv, fd, iovecs.as_ptr(), iovecs.len()) };
        self.is_streaming = usize::try_from(n) == Ok(room);
        match usize::try_from(n) {
            Ok(0) => self.no_more_from_host(),
            Ok(n) => {
                self.sent = self.sent.wrapping_add(n as u32);
                return n;
            }
            Err(_) => match io::Error::last_os_error().kind() {
                io::ErrorKind::WouldBlock => self.readable = false,
                io::ErrorKind::Interrupted => {}
                _ => self.no_more_from_host(),
            },
        }
        0
    }

    fn no_more_from_host(&mut self) {
        self.readable = false;
        self.host_shut |= header::NO_SEND;
        self.settle();
    }

    /// The guest sends `len` bytes.
    ///
    /// # Errors
    ///
    /// It may not send, or not so much.
    ///
    /// # Safety
    ///
    /// The iovecs must describe `len` bytes of memory that may be read.
    pub unsafe fn send(
        &mut self,
        iovecs: &mut Vec<libc::iovec>,
        len: u32,
    ) -> Result<(), Violation> {
        let under_way = self.received.wrapping_sub(self.forwarded);
        if self.phase != Phase::Established
            || self.guest_shut & header::NO_SEND != 0
            || len > BUFFER - under_way
        {
            return Err(Violation);
        }
        self.received = self.received.wrapping_add(len);
        let written = match self.is_blocked() {
            true => 0,
            // What a program will not read is lost, as if it had come just before it closed.
            // SAFETY: the caller vouches for the memory.
            false => unsafe { self.write(iovecs) }.unwrap_or(len as usize),
        };
        self.forward(written as u32);
        let left = len as usize - written;
        if left > 0 {
            advance(iovecs, written);
            self.held.drain(..std::mem::take(&mut self.taken));
            let at = self.held.len();
            self.held.reserve_exact(BUFFER as usize - at);
            self.held.resize(at + left, 0);
            // SAFETY: the caller vouches for the memory, of which the buffer is no part.
            unsafe { gather(iovecs, 0, &mut self.held[at..]) };
        } else {
            self.settle();
        }
        Ok(())
    }

    /// Gives the socket what is held, as far as it takes it.
    pub fn flush(&mut self) {
        while self.is_blocked() {
            let mut iovecs = [iovec(&self.held[self.taken..])];
            // SAFETY: the iovec describes a part of the buffer, which is not changed meanwhile.
            match unsafe { self.write(&mut iovecs) } {
                Ok(0) => return,
                Ok(n) => {
                    self.taken += n;
                    self.forward(n as u32);
                }
                Err(_) => {
                    let lost = self.held.len() - self.taken;
                    self.taken = self.held.len();
                    self.forward(lost as u32);
                }
            }
            if self.taken == self.held.len() {
                (self.held, self.taken) = (Vec::new(), 0);
            }
        }
        self.settle();
    }

    /// Writes to the socket: returns 0 while it takes nothing, and fails once it never will again.
    ///
    /// # Safety
    ///
    /// Each iovec must describe memory that may be read.
    unsafe fn write(&mut self, iovecs: &mut [libc::iovec]) -> io::Result<usize> {
        let Some(fd) = self.fd() else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        // SAFETY: all bytes zero is a valid value of `msghdr`, a C struct of integers and pointers.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        (message.msg_iov, message.msg_iovlen) = (iovecs.as_mut_ptr(), iovecs.len());
        let message = &raw const message;
        // SAFETY: the message has nothing but iovecs, for which the caller vouches.
        let n = unsafe { libc::syscall(libc::SYS_sendmsg, fd, message, libc::MSG_NOSIGNAL) };
        let error = match usize::try_from(n) {
            Ok(n) => return Ok(n),
            Err(_) => io::Error::last_os_error(),
        };
        match error.kind() {
            io::ErrorKind::WouldBlock => return Ok(0),
            // It is non-blocking, and a signal can only come before.
            io::ErrorKind::Interrupted => return Ok(0),
            _ => {}
        }
        // The program has closed it, or does not read any more.
        self.host_shut |= header::NO_RECEIVE;
        Err(error)
    }

    /// So many bytes of the guest's have gone to the socket, or are lost with it. The guest hears of
    /// it once it would think that half of the buffer is full.
    fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
        let unsaid = self.forwarded.wrapping_sub(self.said_forwarded);
        self.must_update |= unsaid >= BUFFER / 2;
    }

    /// The guest closes a direction or both. Whether it has closed the connection.
    pub fn shut(&mut self, flags: u32) -> bool {
        self.guest_shut |= flags & header::CLOSED;
        self.settle();
        self.guest_shut == header::CLOSED
    }

    /// Passes on what has been closed, as far as data allows: to the socket what the guest has closed,
    /// and closes it when it is closed on both sides.
    fn settle(&mut self) {
        for (flag, how) in [
            (header::NO_RECEIVE, Shutdown::Read),
            (header::NO_SEND, Shutdown::Write),
        ] {
            let is_due = self.guest_shut & !self.passed_shut & flag != 0;
            // Each call is an event of the socket.
            if is_due && (flag == header::NO_RECEIVE || !self.is_blocked()) {
                self.passed_shut |= flag;
                // The other end may be closed.
                let _ = self.socket.as_ref().map(|socket| socket.shutdown(how));
            }
        }
        if self.guest_shut & header::NO_RECEIVE != 0 && self.phase == Phase::Established {
            self.host_shut |= header::NO_SEND;
        }
        // With nothing left to read, a socket that hung up has nothing left at all.
        if self.hung_up && self.host_shut & header::NO_SEND != 0 {
            self.host_shut |= header::NO_RECEIVE;
        }
        if self.host_shut == header::CLOSED && !self.is_blocked() {
            self.socket = None;
        }
    }
}

fn iovec(bytes: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}
