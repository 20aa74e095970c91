//! Connections to the agent of a guest.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_protocol::session::{Hello, Request};
use agent_protocol::{AGENT_PORT, MessageError, VERSION};

use crate::cli::Target;
use crate::instance::{self, FindError, Record};

/// How long the VM and the agent may take for their first words. The VM gives the guest's kernel 10 s.
const PATIENCE: Duration = Duration::from_secs(12);
/// The most bytes of a VM's answer: `OK`, a port and the line's end.
const LONGEST_ANSWER: usize = 16;

/// Why there is no connection to an agent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no such VM.
    #[error(transparent)]
    Find(#[from] FindError),
    /// Its guest has no such device.
    #[error("{0} has no sockets to its guest: it was started without --vsock")]
    NoSockets(String),
    /// The VM's socket does not take a connection.
    #[error("cannot connect to {0:?}")]
    Connect(PathBuf, #[source] io::Error),
    /// The guest refuses.
    #[error("no agent listens in the guest")]
    NoAgent,
    /// Nothing comes.
    #[error("the agent in the guest does not answer")]
    Silent,
    /// It has as many connections as it can have, or ends.
    #[error("the agent in the guest has closed the connection")]
    Closed,
    /// It is another program, or talks so.
    #[error("what answers in the guest is no agent of minivmm's")]
    Other(#[source] MessageError),
    /// It belongs to another minivmm.
    #[error("the agent in the guest speaks version {0} of its protocol, and minivmm {VERSION}")]
    Version(u32),
}

impl ConnectError {
    /// What to do about it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::NoAgent => Some("start minivmm-agent in it".into()),
            Self::Version(_) => Some("install the agent of this minivmm in the guest".into()),
            _ => None,
        }
    }
}

/// The agent of a guest.
#[derive(Clone, Debug)]
pub struct Agent {
    socket: PathBuf,
}

impl Agent {
    /// That to which a socket of `--vsock`, or of `minivmm-agent --unix`, leads.
    pub fn at(socket: &Path) -> Self {
        let socket = socket.to_owned();
        Self { socket }
    }

    /// That of a running VM, or at the socket.
    ///
    /// # Errors
    ///
    /// [`ConnectError::Find`] and [`ConnectError::NoSockets`].
    pub fn of(target: &Target) -> Result<Self, ConnectError> {
        let name = match target {
            Target::Socket(path) => return Ok(Self::at(path)),
            Target::Vm(name) => name,
        };
        Self::of_record(&instance::find(name)?.record)
    }

    /// That of a running VM.
    ///
    /// # Errors
    ///
    /// [`ConnectError::NoSockets`].
    pub fn of_record(record: &Record) -> Result<Self, ConnectError> {
        let no_sockets = || ConnectError::NoSockets(record.name.to_string());
        let socket = record.vsock.as_ref().ok_or_else(no_sockets)?;
        Ok(Self::at(socket))
    }

    /// Waits for this long at most for its first words.
    ///
    /// # Errors
    ///
    /// See [`ConnectError`].
    pub fn greet(&self, patience: Duration) -> Result<(), ConnectError> {
        self.connect(patience).map(drop)
    }

    /// Opens a connection and makes the request.
    ///
    /// # Errors
    ///
    /// See [`ConnectError`].
    pub fn request(&self, request: &Request) -> Result<UnixStream, ConnectError> {
        let failed = |error| ConnectError::Connect(self.socket.clone(), error);
        let stream = self.connect(PATIENCE)?;
        agent_protocol::write(&stream, request).map_err(of_message)?;
        stream.set_read_timeout(None).map_err(failed)?;
        stream.set_write_timeout(None).map_err(failed)?;
        Ok(stream)
    }

    /// Connects, and lets the agent say its version.
    fn connect(&self, patience: Duration) -> Result<UnixStream, ConnectError> {
        let failed = |error| ConnectError::Connect(self.socket.clone(), error);
        let stream = UnixStream::connect(&self.socket).map_err(failed)?;
        stream.set_write_timeout(Some(patience)).map_err(failed)?;
        let deadline = Instant::now() + patience;
        let mut first = Before {
            stream: &stream,
            deadline,
        };
        open_port(&mut first)?;
        let hello: Hello = agent_protocol::read(first).map_err(of_message)?;
        match hello.version {
            VERSION => Ok(stream),
            other => Err(ConnectError::Version(other)),
        }
    }
}

/// What comes on a stream before a deadline, so that one that says a byte now and then is not heard for ever.
struct Before<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl Read for Before<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer)
    }
}

/// Has the VM connect the stream to the agent's port (docs/vsock.md).
fn open_port(first: &mut Before<'_>) -> Result<(), ConnectError> {
    let line = format!("CONNECT {AGENT_PORT}\n");
    let sent = (&mut first.stream).write_all(line.as_bytes());
    sent.map_err(|error| of_message(error.into()))?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n") {
        let mut byte = [0];
        match first.read(&mut byte) {
            // The VM refuses so.
            Ok(0) => return Err(ConnectError::NoAgent),
            Ok(_) => answer.extend(byte),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                return Err(ConnectError::NoAgent);
            }
            Err(error) => return Err(of_message(error.into())),
        }
        if answer.len() > LONGEST_ANSWER {
            break;
        }
    }
    match answer.starts_with(b"OK ") && answer.ends_with(b"\n") {
        true => Ok(()),
        false => {
            let error = io::Error::new(ErrorKind::InvalidData, "it does not say OK");
            Err(ConnectError::Other(error.into()))
        }
    }
}

fn of_message(error: MessageError) -> ConnectError {
    match error {
        MessageError::Closed => ConnectError::Closed,
        MessageError::Io(error) => match error.kind() {
            ErrorKind::WouldBlock => ConnectError::Silent,
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                ConnectError::Closed
            }
            _ => ConnectError::Other(error.into()),
        },
        error => ConnectError::Other(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// What the client says of an agent that answers so.
    fn meet(answer: Vec<u8>) -> Result<UnixStream, ConnectError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let serves = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = [0; 14];
            stream.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"CONNECT 28022\n");
            stream.write_all(&answer).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let met = Agent::at(&directory.path().join("vsock")).request(&pack());
        let met = met.inspect(|stream| stream.shutdown(std::net::Shutdown::Both).unwrap());
        serves.join().unwrap();
        met
    }

    fn pack() -> Request {
        Request::Pack {
            path: b"/x".to_vec(),
            directory: b"/".to_vec(),
            follows: false,
        }
    }

    fn hello(version: u32) -> Vec<u8> {
        let mut answer = b"OK 1024\n".to_vec();
        agent_protocol::write(&mut answer, &Hello { version }).unwrap();
        answer
    }

    #[test]
    fn agent_of_the_same_version_is_connected_to() {
        meet(hello(VERSION)).unwrap();
    }

    #[test]
    fn agent_whose_first_words_have_no_end_is_silent() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let serves = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"OK 1024\n\0\0\x10\0").unwrap();
            // A byte at a time, of the million that are to come.
            while stream.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        let greeted = Agent::at(&path).greet(Duration::from_millis(200));
        assert!(matches!(greeted, Err(ConnectError::Silent)), "{greeted:?}");
        serves.join().unwrap();
    }

    #[test]
    fn what_is_no_agent_is_refused_with_the_reason() {
        let texts = [
            (Vec::new(), "no agent listens"),
            (b"OK 1024\n".to_vec(), "closed the connection"),
            (hello(VERSION + 1), "speaks version"),
            (b"OK 1024\n\xff\xff\xff\xffx".to_vec(), "is no agent"),
            (b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(), "is no agent"),
            (b"SSH\n".to_vec(), "is no agent"),
        ];
        for (answer, expected) in texts {
            let error = meet(answer).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn socket_that_is_not_there_is_named() {
        let error = Agent::at(Path::new("/nowhere/vsock"))
            .request(&pack())
            .unwrap_err();
        assert_eq!(error.to_string(), "cannot connect to \"/nowhere/vsock\"");
    }
}
