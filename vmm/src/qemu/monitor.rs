//! minivmm's end of QEMU's monitor, and the commands on their way there. It never waits for QEMU.
//!
//! The ids of minivmm's own commands are words, those of clients' commands numbers of this connection: the clients' own
//! may be alike.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::net::observe::Observer;
use event_manager::EventSet;
use net::MacAddr;
use serde_json::{Value, json};

use crate::qmp::commands::info::{Info, NicInfo, QUERY_INFO};
use crate::qmp::{Executor, QmpError, Reply, Request};

/// The longest message of QEMU's.
const LONGEST: usize = 16 << 20;
/// The most commands of clients without an answer, also of clients that have gone since.
const MOST: usize = 256;
/// As many bytes may wait for a QEMU that does not read.
const BEHIND: usize = 1 << 20;
/// As much is read at once.
const PIECE: usize = 64 << 10;
/// The status until QEMU says one.
const STARTING: &str = "starting";
/// The id of the question whether the guest runs.
const STATUS: &str = "run-state";

/// The connection.
#[derive(Debug)]
pub(super) struct Monitor {
    socket: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Clients' commands without an answer.
    pending: BTreeMap<u64, Reply>,
    next: u64,
    is_closed: bool,
    /// RunState of QEMU, as it last said.
    status: String,
}

impl Monitor {
    /// Begins with the negotiation, before which QEMU carries nothing out.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let mut monitor = Self {
            socket,
            input: Vec::new(),
            output: Vec::new(),
            pending: BTreeMap::new(),
            next: 0,
            is_closed: false,
            status: STARTING.into(),
        };
        monitor.command("qmp_capabilities", json!({}), "nothing");
        monitor.ask_for_status();
        Ok(monitor)
    }

    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sends a command of minivmm's own, whose answer has the same `id`.
    pub fn command(&mut self, name: &str, arguments: Value, id: &str) {
        self.push(&json!({"execute": name, "arguments": arguments, "id": id}));
    }

    fn ask_for_status(&mut self) {
        self.command("query-status", json!({}), STATUS);
    }

    /// Whether QEMU has said what the guest does: it has begun.
    pub fn has_status(&self) -> bool {
        self.status != STARTING
    }

    /// Sends a client's command.
    fn forward(&mut self, request: Request, reply: Reply) {
        let refusal = if self.is_closed {
            "QEMU has closed its monitor"
        } else if self.pending.len() >= MOST || self.output.len() > BEHIND {
            "QEMU does not answer on its monitor"
        } else {
            let id = self.next;
            self.next += 1;
            self.pending.insert(id, reply);
            let Request { name, arguments } = request;
            return self.push(&json!({"execute": name, "arguments": arguments, "id": id}));
        };
        reply.fail(QmpError::new(refusal));
    }

    fn push(&mut self, command: &Value) {
        self.output
            .extend_from_slice(format!("{command}\n").as_bytes());
        self.send();
    }

    /// Sends what there is room for.
    pub fn send(&mut self) {
        let mut sent = 0;
        while sent < self.output.len() {
            match self.socket.write(&self.output[sent..]) {
                Ok(length) => sent += length,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // QEMU has gone, which reading shows.
                Err(_) => sent = self.output.len(),
            }
        }
        self.output.drain(..sent);
    }

    /// Reads some of what QEMU has sent, and returns what is for minivmm itself: its events, and the answers to own
    /// commands. Those to clients' commands are passed on. `None` when nothing has come.
    pub fn receive(&mut self) -> Option<Vec<Value>> {
        let mut piece = [0; PIECE];
        match self.socket.read(&mut piece) {
            Ok(0) => {}
            Ok(length) => {
                let messages = self.split(&piece[..length]);
                if self.input.len() <= LONGEST {
                    return Some(messages.into_iter().filter_map(|m| self.route(m)).collect());
                }
                log::warn!("QEMU's monitor sends a message without an end: it is left alone");
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => return Some(Vec::new()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            Err(_) => {}
        }
        self.close();
        None
    }

    /// The messages that are complete, each of which is a line.
    fn split(&mut self, piece: &[u8]) -> Vec<Value> {
        let mut messages = Vec::new();
        for line in piece.split_inclusive(|&byte| byte == b'\n') {
            self.input.extend_from_slice(line);
            if line.ends_with(b"\n") {
                messages.extend(serde_json::from_slice(&self.input));
                self.input.clear();
            }
        }
        messages
    }

    fn route(&mut self, mut message: Value) -> Option<Value> {
        let Some(id) = message["id"].as_u64() else {
            self.follow_status(&message);
            return Some(message);
        };
        if let (Some(reply), Value::Object(members)) = (self.pending.remove(&id), &mut message) {
            members.remove("id");
            reply.pass_on(message);
        }
        None
    }

    /// QEMU says when the guest stops or goes on, and not always why.
    fn follow_status(&mut self, message: &Value) {
        if let Some("STOP" | "RESUME" | "SUSPEND" | "WAKEUP") = message["event"].as_str() {
            self.ask_for_status();
        }
        if let (Some(STATUS), Some(status)) =
            (message["id"].as_str(), message["return"]["status"].as_str())
        {
            status.clone_into(&mut self.status);
        }
    }

    /// No answer comes any more.
    pub fn close(&mut self) {
        self.is_closed = true;
        for reply in std::mem::take(&mut self.pending).into_values() {
            let error = QmpError::new("QEMU has closed its monitor before it has answered");
            reply.fail(error);
        }
    }

    /// What QEMU is waited for; nothing once it has closed its end.
    pub fn interest(&self) -> Option<EventSet> {
        let mut interest = EventSet::IN;
        if !self.output.is_empty() {
            interest |= EventSet::OUT;
        }
        (!self.is_closed).then_some(interest)
    }
}

/// Has clients' commands carried out by QEMU, and says itself what minivmm knows.
#[derive(Debug)]
pub(super) struct Forward {
    pub monitor: Rc<RefCell<Monitor>>,
    pub version: Value,
    /// How long the guest may take to power off.
    pub grace: Duration,
    /// The NICs' MAC addresses, and what is learnt of them.
    pub nics: Vec<(MacAddr, Arc<Observer>)>,
}

impl Forward {
    /// Also while QEMU hangs.
    fn info(&self) -> Info {
        let nic = |(mac, observer): &(MacAddr, Arc<Observer>)| NicInfo {
            mac: Some(*mac),
            addresses: observer.addresses(),
        };
        Info {
            status: self.monitor.borrow().status.clone(),
            stop_timeout: self.grace.as_secs(),
            nics: self.nics.iter().map(nic).collect(),
        }
    }
}

impl Executor for Forward {
    fn execute(&mut self, request: Request, reply: Reply) {
        match request.name.as_str() {
            QUERY_INFO => reply.send(Ok(self.info())),
            _ => self.monitor.borrow_mut().forward(request, reply),
        }
    }

    fn version(&self) -> Value {
        self.version.clone()
    }
}
