//! The server: a subscriber of the control thread's that never waits for a client.
//!
//! A client that reads nothing is disconnected once much waits for it; the others notice nothing. Each client has one
//! command at a time, so that what waits is bounded.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde_json::json;
use vmm_sys_util::eventfd::EventFd;

use super::connection::Connection;
use super::message::{self, Message, Rejected};
use super::socket::Listener;
use super::{Executor, Outbox, QmpError, Reply};
use crate::events::{EventHub, Subscription};

/// The most clients at once.
const MOST: usize = 64;

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
            log::debug!("QMP: a client is turned away: there are {MOST}");
            return;
        }
        match Connection::new(stream, &self.executor.version()) {
            Ok(connection) => self.add(connection, ops),
            Err(error) => log::debug!("QMP: cannot serve a client: {error}"),
        }
    }

    fn add(&mut self, connection: Connection, ops: &mut EventOps) {
        let token = self.next;
        // After 4 billion clients the first are long gone.
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
            Ok(()) => self.go_on(token, ops),
            Err(error) => self.remove(token, &error, ops),
        }
    }

    /// Carries out what a client has sent, sends what there is for it, and waits for what comes next.
    fn go_on(&mut self, token: u32, ops: &mut EventOps) {
        while let Some(message) = self.connections.get_mut(&token).and_then(Connection::next) {
            self.execute(token, message);
            self.deliver();
        }
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        let sent = match connection.send() {
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
            (true, _) => self.executor.execute(request, reply(id)),
        }
    }

    /// Passes on the results that have come, and returns whose they are.
    fn deliver(&mut self) -> Vec<u32> {
        let mut whose = Vec::new();
        for (token, message) in self.outbox.take() {
            // Or its client has gone meanwhile.
            if let Some(connection) = self.connections.get_mut(&token) {
                connection.is_busy = false;
                connection.push(&message);
                whose.push(token);
            }
        }
        whose
    }

    /// Gives the events that have come to all clients that are to get them. Returns whether there were any.
    fn broadcast(&mut self) -> bool {
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
        !events.is_empty()
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
            EVENTS => {
                self.broadcast();
                for token in self.connections.keys().copied().collect::<Vec<_>>() {
                    self.go_on(token, ops);
                }
            }
            RESULTS => {
                let _ = self.outbox.event.read();
                // What a command has brought about comes before its result.
                let have_events = self.broadcast();
                let mut tokens = self.deliver();
                if have_events {
                    tokens = self.connections.keys().copied().collect();
                }
                for token in tokens {
                    self.go_on(token, ops);
                }
            }
            token @ LISTENER..CONNECTION => self.accept((token - LISTENER) as usize, ops),
            token => self.serve(token, events.event_set(), ops),
        }
    }
}

/// The last events and results, as far as there is room for them.
impl Drop for Server {
    fn drop(&mut self) {
        self.broadcast();
        self.deliver();
        for connection in self.connections.values_mut() {
            let _ = connection.send();
        }
    }
}
