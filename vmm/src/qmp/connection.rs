//! One client of the server: what it has sent and has yet to read.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use event_manager::EventSet;
use serde_json::Value;

use super::message::{self, Message, Rejected};

/// The longest command.
const LONGEST: usize = 256 << 10;
/// As many bytes may wait for a client that does not read before it gets no further results, and the same again before
/// it is disconnected, since events do not wait for it.
const BEHIND: usize = 1 << 20;
/// As much is read at once.
const PIECE: usize = 16 << 10;

/// A client.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// It has sent all that it will.
    at_end: bool,
    /// `qmp_capabilities` is done: it gets events, and commands are carried out.
    pub negotiated: bool,
    /// One of its commands has no result yet.
    pub is_busy: bool,
    /// It may have sent further commands, or there is something for it.
    pub is_due: bool,
}

impl Connection {
    /// One that gets the greeting, with this version.
    pub fn new(stream: UnixStream, version: &Value) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            input: Vec::new(),
            output: message::line(&message::greeting(version)),
            at_end: false,
            negotiated: false,
            is_busy: false,
            is_due: false,
        })
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Reads some of what has come.
    ///
    /// # Errors
    ///
    /// When the client has gone, or sends what is no command and has no end.
    pub fn receive(&mut self) -> io::Result<()> {
        let mut piece = [0; PIECE];
        match self.stream.read(&mut piece) {
            Ok(0) => self.at_end = true,
            Ok(length) => self.input.extend_from_slice(&piece[..length]),
            Err(error) if is_later(&error) => {}
            Err(error) => return Err(error),
        }
        if self.input.len() > LONGEST {
            return Err(ErrorKind::FileTooLarge.into());
        }
        Ok(())
    }

    /// The next command, unless the client has to wait for a result or to read first.
    pub fn next(&mut self) -> Option<Result<Message, Rejected>> {
        if self.is_busy || self.is_behind() {
            return None;
        }
        let spaces = self
            .input
            .iter()
            .take_while(|byte| byte.is_ascii_whitespace());
        self.input.drain(..spaces.count());
        let (message, length) = message::next(&self.input)?;
        self.input.drain(..length);
        Some(message)
    }

    /// Has a message sent.
    pub fn push(&mut self, message: &Value) {
        self.output.extend(message::line(message));
        self.is_due = true;
    }

    /// Whether it has much to read before it gets further results.
    pub fn is_behind(&self) -> bool {
        self.output.len() > BEHIND
    }

    /// Whether something is still to be sent.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Sends what there is room for.
    ///
    /// # Errors
    ///
    /// When the client has gone, or has not read for long.
    pub fn send(&mut self) -> io::Result<()> {
        let mut sent = 0;
        while sent < self.output.len() {
            match self.stream.write(&self.output[sent..]) {
                Ok(length) => sent += length,
                Err(error) if is_later(&error) => break,
                Err(error) => return Err(error),
            }
        }
        self.output.drain(..sent);
        if self.output.is_empty() {
            // What it once needed for much is not kept.
            self.output.shrink_to(PIECE);
        }
        if self.output.len() > 2 * BEHIND {
            return Err(ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    /// Whether all has been said on both sides.
    pub fn is_over(&self) -> bool {
        self.at_end && !self.is_busy && !self.is_due && self.output.is_empty()
    }

    /// What the client is waited for.
    pub fn interest(&self) -> EventSet {
        let mut interest = EventSet::empty();
        if !self.at_end && !self.is_busy && !self.is_due && !self.is_behind() {
            interest |= EventSet::IN;
        }
        if !self.output.is_empty() {
            interest |= EventSet::OUT;
        }
        interest
    }
}

fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
