//! The server: a subscriber of the control thread's that never waits for a client.
//!
//! A client that reads nothing is disconnected once much waits for it; the others notice nothing. Each client has one
//! command at a time, so that what waits is bounded.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;
use vmm_sys_util::eventfd::EventFd;

use super::connection::Connection;
use super::message::{self, Message, Rejected};
use super::socket::Listener;
use super::{Executor, Outbox, QmpError, Reply};
use crate::events::{EventHub, Subscription};

/// The most clients at once.
const MOST: usize = 64;
/// The most commands that wait for their results, also those of clients that have gone since.
const MOST_PENDING: usize = 256;
/// As many commands of one client are carried out before others have their turn.
const TURN: u32 = 8;
/// How long clients may take to read the last events.
const PATIENCE: Duration = Duration::from_secs(1);

// Event tokens; those of listeners begin at LISTENER, those of connections at CONNECTION.
const EVENTS: u32 = 0;
const RESULTS: u32 = 1;
const LISTENER: u32 = 2;
const CONNECTION: u32 = 1000;

/// The sockets, their clients, and who carries their commands out.
#[derive(Debug)]
pub struct Server {
    listeners: Vec<Listener>,
    /// By their tokens.
    connections: BTreeMap<u32, Connection>,
    next: u32,
    outbox: Arc<Outbox>,
    events: Arc<Subscription>,
    executor: Box<dyn Executor>,
    /// Closed for a moment to turn a client away that there is no descriptor for.
    reserve: Option<File>,
}

impl Server {
    /// Serves those who connect to `listeners`.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn new(
        listeners: Vec<Listener>,
        hub: &EventHub,
        executor: Box<dyn Executor>,
    ) -> io::Result<Self> {
        Ok(Self {
            listeners,
            connections: BTreeMap::new(),
            next: CONNECTION,
            outbox: Arc::new(Outbox {
                waiting: Mutex::default(),
                event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            }),
            events: hub.subscribe()?,
            executor,
            reserve: reserve(),
        })
    }

    fn accept(&mut self, listener: usize, ops: &mut EventOps) {
        // One at a time: the next is announced again.
        let stream = match self.listeners[listener].accept() {
            Ok(stream) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => return self.turn_away(listener, &error),
        };
        if self.connections.len() >= MOST {
            let clients = self.connections.iter();
            let mut silent = clients.filter(|(_, client)| !client.negotiated);
            match silent.next() {
                // The oldest of those that have not begun to speak QMP.
                Some((&token, _)) => self.remove(token, &ErrorKind::QuotaExceeded.into(), ops),
                None => return log::debug!("QMP: a client is turned away: there are {MOST}"),
            }
        }
        match Connection::new(stream, &self.executor.version()) {
            Ok(connection) => self.add(connection, ops),
            Err(error) => log::debug!("QMP: cannot serve a client: {error}"),
        }
    }

    fn add(&mut self, connection: Connection, ops: &mut EventOps) {
        while self.connections.contains_key(&self.next) {
            self.next = self.next.checked_add(1).unwrap_or(CONNECTION);
        }
        let token = self.next;
        // An event of one that has just gone must not be another's.
        self.next = self.next.checked_add(1).unwrap_or(CONNECTION);
        let events = Events::with_data(connection.stream(), token, connection.interest());
        match ops.add(events) {
            Ok(()) => drop(self.connections.insert(token, connection)),
            Err(error) => log::debug!("QMP: cannot watch a client: {error}"),
        }
    }

    /// No descriptor is left: without this the client that waits would wake this thread for ever.
    fn turn_away(&mut self, listener: usize, error: &io::Error) {
        log::debug!("QMP: cannot accept a client: {error}");
        self.reserve = None;
        drop(self.listeners[listener].accept());
        self.reserve = reserve();
    }

    fn serve(&mut self, token: u32, set: EventSet, ops: &mut EventOps) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        let received = match set.contains(EventSet::IN) {
            true => connection.receive(),
            // The other end is closed, and nothing can be read that is wanted.
            false if set.intersects(EventSet::HANG_UP | EventSet::ERROR) => {
                Err(ErrorKind::ConnectionReset.into())
            }
            false => Ok(()),
        };
        match received {
            Ok(()) => self.take_turn(token, ops),
            Err(error) => return self.remove(token, &error, ops),
        }
        self.see_to_others();
    }

    /// Gives each client that has something to do its turn.
    fn take_turns(&mut self, ops: &mut EventOps) {
        let due = self.connections.iter().filter(|(_, client)| client.is_due);
        for token in due.map(|(&token, _)| token).collect::<Vec<_>>() {
            self.take_turn(token, ops);
        }
        self.see_to_others();
    }

    /// Has those that have something to do get their turn after all else that waits for this thread.
    fn see_to_others(&self) {
        if self.connections.values().any(|client| client.is_due) {
            let _ = self.outbox.event.write(1);
        }
    }

    /// Carries out some of what a client has sent, sends what there is for it, and waits for what comes next.
    fn take_turn(&mut self, token: u32, ops: &mut EventOps) {
        let mut left = TURN;
        while left > 0
            && let Some(message) = self.connections.get_mut(&token).and_then(Connection::next)
        {
            self.execute(token, message);
            self.collect();
            left -= 1;
        }
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        let was_behind = connection.is_behind();
        let sent = connection.send();
        connection.is_due = left == 0 || was_behind && !connection.is_behind();
        let sent = match sent {
            Ok(()) if connection.is_over() => Err(ErrorKind::UnexpectedEof.into()),
            sent => sent,
        };
        let watched = sent.and_then(|()| {
            let events = Events::with_data(connection.stream(), token, connection.interest());
            ops.modify(events)
                .map_err(|error| io::Error::other(format!("{error}")))
        });
        if let Err(error) = watched {
            self.remove(token, &error, ops);
        }
    }

    fn remove(&mut self, token: u32, why: &io::Error, ops: &mut EventOps) {
        if let Some(connection) = self.connections.remove(&token) {
            log::debug!("QMP: a client is gone: {why}");
            let events = Events::with_data(connection.stream(), token, EventSet::empty());
            let _ = ops.remove(events);
        }
    }

    fn execute(&mut self, token: u32, message: Result<Message, Rejected>) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        connection.is_busy = true;
        let reply = |id| Reply {
            outbox: Arc::clone(&self.outbox),
            connection: token,
            id,
            is_sent: false,
        };
        let Message { request, id } = match message {
            Ok(message) => message,
            Err(Rejected { error, id }) => return reply(id).fail(error),
        };
        match (connection.negotiated, request.name.as_str()) {
            (false, "qmp_capabilities") => {
                connection.negotiated = true;
                reply(id).send(Ok(json!({})));
            }
            (false, _) => reply(id).fail(message::not_negotiated()),
            (true, "qmp_capabilities") => {
                let error = QmpError {
                    desc: "Capabilities negotiation is already complete, command ignored".into(),
                    ..QmpError::not_found("")
                };
                reply(id).fail(error);
            }
            (true, _) if Arc::strong_count(&self.outbox) > MOST_PENDING => {
                reply(id).fail(QmpError::new("Too many commands wait for their results"));
            }
            (true, _) => self.executor.execute(request, reply(id)),
        }
    }

    /// Gives the clients what has come for them: events first, since what a command has brought about comes before its
    /// result.
    fn collect(&mut self) {
        let (events, lost) = self.events.take();
        if lost > 0 {
            log::warn!("QMP: {lost} events are lost");
        }
        for message in events.iter().filter_map(message::event) {
            let connections = self.connections.values_mut();
            for connection in connections.filter(|connection| connection.negotiated) {
                connection.push(&message);
            }
        }
        for (token, message) in self.outbox.take() {
            // Or its client has gone meanwhile.
            if let Some(connection) = self.connections.get_mut(&token) {
                connection.is_busy = false;
                connection.push(&message);
            }
        }
    }
}

/// A descriptor that can be spared.
fn reserve() -> Option<File> {
    File::open("/dev/null").ok()
}

impl MutEventSubscriber for Server {
    fn init(&mut self, ops: &mut EventOps) {
        let listeners = (LISTENER..).zip(&self.listeners);
        let listeners = listeners.map(|(token, listener)| (listener.as_raw_fd(), token));
        let own = [
            (self.events.event().as_raw_fd(), EVENTS),
            (self.outbox.event.as_raw_fd(), RESULTS),
        ];
        for (fd, token) in listeners.chain(own) {
            if let Err(error) = ops.add(Events::with_data_raw(fd, token, EventSet::IN)) {
                log::warn!("cannot serve QMP: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            EVENTS | RESULTS => {
                let _ = self.outbox.event.read();
                self.collect();
                self.take_turns(ops);
            }
            token @ LISTENER..CONNECTION => self.accept((token - LISTENER) as usize, ops),
            token => self.serve(token, events.event_set(), ops),
        }
    }
}

/// The last events and results reach the clients that read.
impl Drop for Server {
    fn drop(&mut self) {
        self.collect();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let connections = &mut self.connections;
            connections
                .retain(|_, connection| connection.send().is_ok() && connection.has_output());
            let left = deadline.saturating_duration_since(Instant::now());
            if connections.is_empty() || left.is_zero() {
                break;
            }
            let streams = connections.values().map(Connection::stream);
            let mut ready: Vec<_> = streams
                .map(|stream| PollFd::new(stream, PollFlags::OUT))
                .collect();
            let _ = poll(&mut ready, Timespec::try_from(left).ok().as_ref());
        }
    }
}
