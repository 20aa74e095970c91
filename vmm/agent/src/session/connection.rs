//! A connection of which the host has not yet said what it is for.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use agent_protocol::session::{Hello, Request};
use agent_protocol::{AGENT_PORT, Inbox, MessageError, VERSION};

/// How long the host may take to say it, and to open the streams of a command.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The longest line of a Unix socket's: the word, the longest port and the line's end.
const LONGEST_LINE: usize = 19;

/// A connection that has just been accepted.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// The line that comes first on a Unix socket, as far as it has come.
    line: Option<Vec<u8>>,
    inbox: Inbox,
    /// When it is closed.
    pub deadline: Instant,
}

/// What has come of a connection.
#[derive(Debug)]
pub enum Heard {
    /// More is to come.
    Nothing(Connection),
    /// What it is for. The stream does not block.
    Request(Request, UnixStream, Inbox),
    /// It has ended, or something else talks.
    Closed,
}

impl Connection {
    /// Greets the host, on a Unix socket after its line.
    ///
    /// # Errors
    ///
    /// The host has gone already.
    pub fn new(stream: UnixStream, has_line: bool) -> Result<Self, MessageError> {
        stream.set_nonblocking(true)?;
        let connection = Self {
            stream,
            line: has_line.then(Vec::new),
            inbox: Inbox::default(),
            deadline: Instant::now() + PATIENCE,
        };
        if !has_line {
            connection.greet()?;
        }
        Ok(connection)
    }

    /// The socket, to wait for what it says.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn greet(&self) -> Result<(), MessageError> {
        agent_protocol::write(&self.stream, &Hello { version: VERSION })
    }

    /// Takes what has come.
    pub fn listen(mut self) -> Heard {
        match self.read() {
            Ok(Some(request)) => Heard::Request(request, self.stream, self.inbox),
            Ok(None) => Heard::Nothing(self),
            Err(_) => Heard::Closed,
        }
    }

    fn read(&mut self) -> Result<Option<Request>, MessageError> {
        let mut bytes = [0; 16 << 10];
        let length = match self.stream.read(&mut bytes) {
            Ok(0) => return Err(MessageError::Closed),
            Ok(length) => length,
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => return Ok(None),
                _ => return Err(error.into()),
            },
        };
        let mut bytes = &bytes[..length];
        if let Some(line) = &mut self.line {
            let end = bytes.iter().position(|byte| *byte == b'\n');
            let (part, rest) = bytes.split_at(end.map_or(length, |end| end + 1));
            line.extend(part);
            if end.is_none() && line.len() < LONGEST_LINE {
                return Ok(None);
            }
            if *line != format!("CONNECT {AGENT_PORT}\n").as_bytes() {
                return Err(io::Error::from(ErrorKind::InvalidData).into());
            }
            self.line = None;
            let answer = format!("OK {AGENT_PORT}\n");
            self.stream.write_all(answer.as_bytes())?;
            self.greet()?;
            bytes = rest;
        }
        self.inbox.add(bytes);
        self.inbox.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is heard of a host that writes this, in pieces of one byte and in one piece.
    fn hear(has_line: bool, sent: &[u8]) -> [Heard; 2] {
        [1, sent.len().max(1)].map(|size| {
            let (mut host, stream) = UnixStream::pair().unwrap();
            let mut heard = Heard::Nothing(Connection::new(stream, has_line).unwrap());
            for piece in sent.chunks(size) {
                let Heard::Nothing(connection) = heard else {
                    break;
                };
                host.write_all(piece).unwrap();
                heard = connection.listen();
            }
            heard
        })
    }

    fn request() -> Vec<u8> {
        let mut sent = b"CONNECT 28022\n".to_vec();
        let request = Request::Pack {
            path: b"/x".to_vec(),
            directory: b"/".to_vec(),
            follows: false,
        };
        agent_protocol::write(&mut sent, &request).unwrap();
        sent
    }

    #[test]
    fn request_is_heard_in_whatever_pieces_it_comes() {
        for heard in hear(true, &request()) {
            assert!(
                matches!(heard, Heard::Request(Request::Pack { path, .. }, ..) if path == b"/x")
            );
        }
        for heard in hear(false, &request()[14..]) {
            assert!(matches!(heard, Heard::Request(Request::Pack { .. }, ..)));
        }
    }

    #[test]
    fn what_follows_a_request_is_kept() {
        let sent = [&request()[..], b"data"].concat();
        let [_, heard] = hear(true, &sent);
        let Heard::Request(_, _, inbox) = heard else {
            panic!("{heard:?}");
        };
        assert_eq!(inbox.into_rest(), b"data");
    }

    #[test]
    fn other_ports_lines_and_messages_close_it() {
        for sent in [
            &b"CONNECT 22\n"[..],
            b"CONNECT 4294967295\n",
            b"GET / HTTP/1.1\r\nHost: x\r\n",
            b"\n",
            b"CONNECT 28022\n\xff\xff\xff\xff",
        ] {
            for heard in hear(true, sent) {
                assert!(matches!(heard, Heard::Closed), "{sent:?}");
            }
        }
    }

    #[test]
    fn host_that_goes_closes_it() {
        let (host, stream) = UnixStream::pair().unwrap();
        let connection = Connection::new(stream, true).unwrap();
        drop(host);
        assert!(matches!(connection.listen(), Heard::Closed));
    }
}
