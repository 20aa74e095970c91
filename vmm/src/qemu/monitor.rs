//! minivmm's end of QEMU's monitor, and the commands on their way there. It never waits for QEMU.
//!
//! The ids of minivmm's own commands are words, those of clients' commands numbers of this connection: the clients' own
//! may be alike.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
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
/// As many bytes of them are kept for a QEMU that does not answer.
const BEHIND: usize = 1 << 20;
/// As much is read at once.
const PIECE: usize = 64 << 10;
/// The status until QEMU says one.
const STARTING: &str = "starting";
/// The id of the question whether the guest runs.
pub(super) const STATUS: &str = "run-state";
const NEGOTIATION: &str = "negotiation";

/// The connection.
#[derive(Debug)]
pub(super) struct Monitor {
    socket: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Commands that are sent once QEMU has answered those before them.
    waiting: VecDeque<Value>,
    /// The commands that QEMU has yet to answer.
    unanswered: usize,
    /// Clients' commands without an answer, and how long they are.
    pending: BTreeMap<u64, (Reply, usize)>,
    /// How long these are together.
    held: usize,
    next: u64,
    is_closed: bool,
    /// RunState of QEMU, as it last said, and what it is at first.
    status: String,
    first_status: &'static str,
}

impl Monitor {
    /// Of a guest that is in this RunState once it is there. Begins with the negotiation, before which QEMU carries nothing out.
    pub fn new(socket: UnixStream, first_status: &'static str) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let mut monitor = Self {
            socket,
            input: Vec::new(),
            output: Vec::new(),
            waiting: VecDeque::new(),
            unanswered: 0,
            pending: BTreeMap::new(),
            held: 0,
            next: 0,
            is_closed: false,
            status: STARTING.into(),
            first_status,
        };
        monitor.command("qmp_capabilities", json!({}), NEGOTIATION);
        Ok(monitor)
    }

    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sends a command of minivmm's own, whose answer has the same `id`, at once: the guest is about to end.
    pub fn command(&mut self, name: &str, arguments: Value, id: &str) {
        self.push(&json!({"execute": name, "arguments": arguments, "id": id}));
    }

    /// The same once QEMU has answered all before it. One that comes earlier may make QEMU 7.2 sleep for ever.
    pub fn command_in_turn(&mut self, name: &str, arguments: Value, id: &str) {
        let command = json!({"execute": name, "arguments": arguments, "id": id});
        self.waiting.push_back(command);
        self.go_on();
    }

    fn go_on(&mut self) {
        if self.unanswered == 0
            && let Some(command) = self.waiting.pop_front()
        {
            self.push(&command);
        }
    }

    fn ask_for_status(&mut self) {
        self.command_in_turn("query-status", json!({}), STATUS);
    }

    /// Whether QEMU has answered: the guest is there.
    pub fn has_begun(&self) -> bool {
        self.status != STARTING
    }

    /// Sends a client's command.
    fn forward(&mut self, request: Request, reply: Reply) {
        let refusal = if self.is_closed {
            "QEMU has closed its monitor"
        } else if self.pending.len() >= MOST || self.held > BEHIND {
            "QEMU does not answer on its monitor"
        } else {
            let id = self.next;
            self.next += 1;
            let Request { name, arguments } = request;
            let command = json!({"execute": name, "arguments": arguments, "id": id});
            let length = command.to_string().len();
            self.held += length;
            self.pending.insert(id, (reply, length));
            self.waiting.push_back(command);
            return self.go_on();
        };
        reply.fail(QmpError::new(refusal));
    }

    fn push(&mut self, command: &Value) {
        self.unanswered += 1;
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
        if message.get("return").or(message.get("error")).is_some() {
            self.unanswered = self.unanswered.saturating_sub(1);
            self.go_on();
        }
        let Some(id) = message["id"].as_u64() else {
            self.follow_status(&message);
            return Some(message);
        };
        if let (Some((reply, length)), Value::Object(members)) =
            (self.pending.remove(&id), &mut message)
        {
            self.held -= length;
            members.remove("id");
            reply.pass_on(message);
        }
        None
    }

    /// QEMU says when the guest stops or goes on, and asks to be asked why it has stopped. It is asked nothing more at
    /// its start: one that gets several commands then may sleep for ever (QEMU 7.2).
    fn follow_status(&mut self, message: &Value) {
        let said = match (message["event"].as_str(), message["id"].as_str()) {
            (Some("STOP"), _) => return self.ask_for_status(),
            (Some("RESUME" | "WAKEUP"), _) => Some("running"),
            (Some("SUSPEND"), _) => Some("suspended"),
            (_, Some(NEGOTIATION)) if !self.has_begun() => Some(self.first_status),
            (_, Some(STATUS)) => message["return"]["status"].as_str(),
            _ => None,
        };
        if let Some(said) = said {
            said.clone_into(&mut self.status);
        }
    }

    /// No answer comes any more.
    pub fn close(&mut self) {
        self.is_closed = true;
        self.waiting.clear();
        self.held = 0;
        for (reply, _) in std::mem::take(&mut self.pending).into_values() {
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
            user_net: false,
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
