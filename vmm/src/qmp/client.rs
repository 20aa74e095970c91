//! A client of a QMP server, for minivmm's own commands: it blocks, for as long as it is allowed to.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

/// The longest message that is waited for.
const LONGEST: usize = 16 << 20;

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no server.
    #[error("cannot connect to {0:?}")]
    Connect(PathBuf, #[source] io::Error),
    /// It has ended.
    #[error("the virtual machine has closed its QMP connection")]
    Closed,
    /// It says nothing.
    #[error("the virtual machine does not answer on its QMP socket")]
    Silent,
    /// It does not speak QMP.
    #[error("the other end of the socket does not speak QMP")]
    NoQmp,
    /// The connection fails.
    #[error("cannot speak QMP")]
    Io(#[source] io::Error),
    /// It refuses the command.
    #[error("{desc} ({class})")]
    Refused {
        /// QEMU's error class.
        class: String,
        /// Why.
        desc: String,
    },
}

/// A connection whose capabilities are negotiated.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    patience: Duration,
}

impl Client {
    /// Connects. The server may take `patience` for each answer.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, ClientError> {
        let failed = |error| ClientError::Connect(path.to_owned(), error);
        let stream = match connect(path, patience) {
            // So many wait already that the server takes no notice of.
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(ClientError::Silent),
            connected => connected.map_err(failed)?,
        };
        let mut client = Self {
            stream,
            input: Vec::new(),
            patience,
        };
        let greeting = client.message(Instant::now() + patience)?;
        if !greeting["QMP"].is_object() {
            return Err(ClientError::NoQmp);
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Has a command carried out, and returns what it returns.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub fn execute(&mut self, name: &str, arguments: Value) -> Result<Value, ClientError> {
        let command = json!({"execute": name, "arguments": arguments});
        let sent = self.stream.write_all(format!("{command}\n").as_bytes());
        sent.map_err(lost)?;
        let deadline = Instant::now() + self.patience;
        loop {
            let mut message = self.message(deadline)?;
            if message["event"].is_string() {
                continue;
            }
            if let Some(error) = message.get("error") {
                let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
                let (class, desc) = (text("class"), text("desc"));
                return Err(ClientError::Refused { class, desc });
            }
            return Ok(message["return"].take());
        }
    }

    /// The name and data of the next event, which may have come already; `None` when there is none until the
    /// deadline. Those that come while a command is carried out are left out.
    ///
    /// # Errors
    ///
    /// See [`ClientError`]; [`ClientError::Closed`] is the end of the virtual machine.
    pub fn next_event(
        &mut self,
        deadline: Instant,
    ) -> Result<Option<(String, Value)>, ClientError> {
        loop {
            // Enough to look whether one has come.
            let soon = Instant::now() + Duration::from_millis(1);
            match self.message(deadline.max(soon)) {
                Ok(mut message) => {
                    if let Some(name) = message["event"].as_str().map(str::to_owned) {
                        return Ok(Some((name, message["data"].take())));
                    }
                }
                Err(ClientError::Silent) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn message(&mut self, deadline: Instant) -> Result<Value, ClientError> {
        loop {
            let end = self.input.iter().position(|&byte| byte == b'\n');
            if let Some(end) = end {
                let line: Vec<_> = self.input.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(|_| ClientError::NoQmp);
            }
            if self.input.len() > LONGEST {
                return Err(ClientError::NoQmp);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClientError::Silent);
            }
            let waits = self.stream.set_read_timeout(Some(left));
            waits.map_err(ClientError::Io)?;
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(ClientError::Closed),
                Ok(length) => self.input.extend_from_slice(&piece[..length]),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::Interrupted => {}
                    _ => return Err(lost(error)),
                },
            }
        }
    }
}

/// Readable when the server says something, or has closed the connection.
impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A connection to `path`, on which writing waits for `patience` at most, as this does.
fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let stream = UnixStream::from(socket);
    stream.set_write_timeout(Some(patience))?;
    rustix::net::connect(&stream, &SocketAddrUnix::new(path)?)?;
    Ok(stream)
}

fn lost(error: io::Error) -> ClientError {
    match error.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => ClientError::Closed,
        ErrorKind::WouldBlock => ClientError::Silent,
        _ => ClientError::Io(error),
    }
}
