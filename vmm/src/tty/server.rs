//! The socket of a running guest's console.
//!
//! Each client first gets what the guest said last, then what follows; what it sends is the guest's
//! input. One that has closed its side gets what was said until then, and is at its end. All happens
//! in the control thread, which waits for none of them: a client that is too far behind is
//! disconnected, and one whose input the guest does not read is not read either.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devices::serial::Serial;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use vmm_sys_util::eventfd::EventFd;

use super::transcript::Transcript;
use crate::qmp::socket::Listener;

/// How many clients there may be; more are disconnected at once.
const MOST_CLIENTS: usize = 32;
/// How many are accepted before others have their turn.
const MOST_ACCEPTED: usize = 64;
/// How much of a client's input is read at once, and may wait for the guest besides what its port
/// takes.
const INPUT: usize = 4096;
/// How much is sent at once, and how often before others have their turn.
const CHUNK: usize = 16 << 10;
const MOST_CHUNKS: usize = 4;
/// How long the last of the output waits for clients at the guest's end.
const LAST_WORDS: Duration = Duration::from_secs(1);

// Event tokens; the clients' follow.
const CONNECTION: u32 = 0;
const NEWS: u32 = 1;
const ROOM: u32 = 2;
const FIRST_CLIENT: u32 = 3;

/// Where the clients' input goes.
pub trait Input: Debug + Send {
    /// Takes what there is room for, without waiting, and returns how much.
    fn push(&mut self, bytes: &[u8]) -> usize;

    /// The descriptor and the event that say that there is room again after [`Input::push`] took
    /// less than it got. It is only watched until then, and no one else in the event loop has it.
    fn room(&self) -> (RawFd, EventSet);
}

/// The way to the guest's serial port.
#[derive(Debug)]
pub struct ToSerial {
    serial: Arc<Mutex<Serial>>,
    room: EventFd,
}

impl ToSerial {
    /// Gives the port an eventfd for its room.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn new(serial: Arc<Mutex<Serial>>) -> io::Result<Self> {
        let room = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let port = room.try_clone()?;
        let mut locked = serial.lock().unwrap_or_else(PoisonError::into_inner);
        locked.signal_room(port);
        drop(locked);
        Ok(Self { serial, room })
    }
}

impl Input for ToSerial {
    fn push(&mut self, bytes: &[u8]) -> usize {
        // What it says is about to be found out.
        let _ = self.room.read();
        let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
        serial.push_input(bytes)
    }

    fn room(&self) -> (RawFd, EventSet) {
        (self.room.as_raw_fd(), EventSet::IN)
    }
}

/// Serves a console's socket.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    transcript: Arc<Transcript>,
    input: Box<dyn Input>,
    clients: BTreeMap<u32, Client>,
    next_token: u32,
    is_room_watched: bool,
}

/// A client. Dropping it closes its connection.
#[derive(Debug)]
struct Client {
    socket: UnixStream,
    /// Up to where it has the transcript.
    position: u64,
    /// Up to where it gets it: it has closed its side.
    last: Option<u64>,
    /// Its socket takes no more now.
    is_full: bool,
    /// Input that the guest has no room for.
    held: Vec<u8>,
    watched: EventSet,
}

/// A client's connection is at its end.
#[derive(Debug)]
struct Gone;

impl Server {
    /// Serves those who connect to `listener`.
    pub fn new(listener: Listener, transcript: Arc<Transcript>, input: Box<dyn Input>) -> Self {
        Self {
            listener,
            transcript,
            input,
            clients: BTreeMap::new(),
            next_token: FIRST_CLIENT,
            is_room_watched: false,
        }
    }

    /// Sends the clients, and those that have just connected, the last of the output, and
    /// disconnects them. Waits for them, but not long.
    pub fn finish(mut self) {
        for _ in 0..MOST_ACCEPTED {
            match self.listener.accept() {
                Ok(socket) => drop(self.add(socket)),
                Err(_) => break,
            }
        }
        // Who connects again after its end shall see that there is no console any more.
        drop(self.listener);
        let deadline = Instant::now() + LAST_WORDS;
        let end = self.transcript.end();
        let mut clients: Vec<_> = self.clients.into_values().collect();
        for client in &mut clients {
            client.last = Some(end);
            client.held.clear();
        }
        loop {
            clients.retain_mut(|client| client.send_all(&self.transcript).is_ok());
            let watch = |client| PollFd::from_borrowed_fd(client, PollFlags::OUT);
            let sockets = clients.iter().map(|client| client.socket.as_fd());
            let mut watched: Vec<_> = sockets.map(watch).collect();
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).ok();
            if watched.is_empty() || left.is_zero() || poll(&mut watched, timeout.as_ref()) == Ok(0)
            {
                return;
            }
        }
    }

    /// Makes a connection a client, if there may be another, and returns its token.
    fn add(&mut self, socket: UnixStream) -> Option<u32> {
        if self.clients.len() >= MOST_CLIENTS || socket.set_nonblocking(true).is_err() {
            return None;
        }
        while self.next_token < FIRST_CLIENT || self.clients.contains_key(&self.next_token) {
            self.next_token = self.next_token.wrapping_add(1);
        }
        let token = self.next_token;
        // An event that is still on its way to the last one is not for this one.
        self.next_token = token.wrapping_add(1);
        let client = Client {
            socket,
            position: self.transcript.attach(),
            last: None,
            is_full: false,
            held: Vec::new(),
            watched: EventSet::IN,
        };
        self.clients.insert(token, client);
        Some(token)
    }

    fn accept(&mut self, ops: &mut EventOps) {
        for _ in 0..MOST_ACCEPTED {
            let socket = match self.listener.accept() {
                Ok(socket) => socket,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // The next connection makes another attempt.
                Err(error) => return log::debug!("no connection to the console: {error}"),
            };
            let fd = socket.as_raw_fd();
            let Some(token) = self.add(socket) else {
                continue;
            };
            match ops.add(Events::with_data_raw(fd, token, EventSet::IN)) {
                Ok(()) => self.serve(token, EventSet::empty(), ops),
                Err(error) => {
                    log::debug!("cannot watch a client of the console: {error}");
                    self.forget(token);
                }
            }
        }
        // There may be more, of which this is to be another edge.
        let _ = ops.modify(self.connections());
    }

    fn connections(&self) -> Events {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        Events::with_data(&self.listener, CONNECTION, edge)
    }

    /// Does for a client what its events, or news, allow.
    fn serve(&mut self, token: u32, events: EventSet, ops: &mut EventOps) {
        let Some(client) = self.clients.get_mut(&token) else {
            return;
        };
        let transcript = &self.transcript;
        let served = client
            .receive(events, self.input.as_mut(), transcript)
            .and_then(|()| {
                client.is_full &= !events.contains(EventSet::OUT);
                client.send(transcript)
            });
        let fd = client.socket.as_raw_fd();
        if served.is_err() {
            let _ = ops.remove(Events::empty_raw(fd));
            return self.forget(token);
        }
        let wanted = client.wanted();
        if wanted != std::mem::replace(&mut client.watched, wanted) {
            let _ = ops.modify(Events::with_data_raw(fd, token, wanted));
        }
        if !client.held.is_empty() && !self.is_room_watched {
            let (fd, set) = self.input.room();
            self.is_room_watched = ops.add(Events::with_data_raw(fd, ROOM, set)).is_ok();
        }
    }

    fn forget(&mut self, token: u32) {
        if self.clients.remove(&token).is_some() {
            self.transcript.detach();
        }
    }

    /// The guest has room for input again.
    fn pass_on_held(&mut self, ops: &mut EventOps) {
        let _ = ops.remove(Events::empty_raw(self.input.room().0));
        self.is_room_watched = false;
        for token in self.tokens() {
            self.serve(token, EventSet::empty(), ops);
        }
    }

    fn tokens(&self) -> Vec<u32> {
        self.clients.keys().copied().collect()
    }
}

impl Client {
    /// Passes its input on, as far as there is room.
    fn receive(
        &mut self,
        events: EventSet,
        input: &mut dyn Input,
        transcript: &Transcript,
    ) -> Result<(), Gone> {
        let has_hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        self.pass_on(input);
        let mut buffer = [0; INPUT];
        let mut may_read = events.intersects(EventSet::IN | EventSet::HANG_UP);
        while may_read && self.held.is_empty() && self.last.is_none() {
            match rustix::io::read(&self.socket, &mut buffer) {
                Ok(0) => self.last = Some(transcript.end()),
                Ok(length) => {
                    self.held.extend(&buffer[..length]);
                    self.pass_on(input);
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => return Err(Gone),
            }
            // Of one that is gone all that there is room for; it can send no more.
            may_read = has_hung_up;
        }
        if has_hung_up { Err(Gone) } else { Ok(()) }
    }

    fn pass_on(&mut self, input: &mut dyn Input) {
        if !self.held.is_empty() {
            let taken = input.push(&self.held);
            self.held.drain(..taken);
        }
    }

    /// Sends what was said, as far as its socket takes it.
    fn send(&mut self, transcript: &Transcript) -> Result<(), Gone> {
        let mut chunk = [0; CHUNK];
        for _ in 0..MOST_CHUNKS {
            // Also while the socket is full: a client that is too far behind is found out here.
            let room = if self.is_full { 0 } else { CHUNK };
            let length = transcript.read(self.position, &mut chunk[..room]);
            let length = length.ok_or(Gone)?;
            let wanted = self.last.map(|last| last.saturating_sub(self.position));
            let wanted = wanted.and_then(|wanted| usize::try_from(wanted).ok());
            let chunk = &chunk[..length.min(wanted.unwrap_or(length))];
            if self.is_full {
                return Ok(());
            }
            if chunk.is_empty() {
                return match self.last.is_some() && self.held.is_empty() {
                    true => Err(Gone),
                    false => Ok(()),
                };
            }
            match send(&self.socket, chunk, SendFlags::NOSIGNAL) {
                Ok(sent) => self.position += sent as u64,
                Err(Errno::AGAIN) => self.is_full = true,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Gone),
            }
        }
        // There may be more; when it is its turn again.
        self.is_full = true;
        Ok(())
    }

    /// Sends until its socket takes no more.
    fn send_all(&mut self, transcript: &Transcript) -> Result<(), Gone> {
        let mut before = None;
        while before.replace(self.position) != Some(self.position) {
            self.is_full = false;
            self.send(transcript)?;
        }
        Ok(())
    }

    /// What it waits for.
    fn wanted(&self) -> EventSet {
        let when = |wanted, set| if wanted { set } else { EventSet::empty() };
        let reads = self.held.is_empty() && self.last.is_none();
        when(reads, EventSet::IN) | when(self.is_full, EventSet::OUT)
    }
}

impl MutEventSubscriber for Server {
    fn init(&mut self, ops: &mut EventOps) {
        let news = self.transcript.news();
        for events in [
            self.connections(),
            Events::with_data(news, NEWS, EventSet::IN),
        ] {
            if let Err(error) = ops.add(events) {
                log::warn!("cannot serve the console's socket: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            CONNECTION => self.accept(ops),
            NEWS => {
                self.transcript.take_news();
                for token in self.tokens() {
                    self.serve(token, EventSet::empty(), ops);
                }
            }
            ROOM => self.pass_on_held(ops),
            token => self.serve(token, events.event_set(), ops),
        }
    }
}

#[cfg(test)]
mod tests;
