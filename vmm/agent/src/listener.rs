//! Accepts the host's connections.

use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use agent_protocol::AGENT_PORT;
use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::children::Children;
use crate::{session, vsock};

/// The stack of a thread that serves a connection.
const STACK: usize = 128 << 10;
/// How long to wait for descriptors or memory before the next connection is accepted.
const PAUSE: Duration = Duration::from_millis(20);
/// How long a program may take to name the port.
const LINE_PATIENCE: Duration = Duration::from_secs(30);

/// A socket that the host connects to.
#[derive(Debug)]
pub enum Listener {
    /// By vsock, on [`AGENT_PORT`].
    Vsock(OwnedFd),
    /// By a Unix socket, in the convention of a vsock device's: the line `CONNECT PORT` comes first.
    Unix(UnixListener),
}

impl Listener {
    /// Listens on vsock.
    ///
    /// # Errors
    ///
    /// Those of [`vsock::listen`].
    pub fn vsock() -> io::Result<Self> {
        vsock::listen(AGENT_PORT).map(Self::Vsock)
    }

    /// Listens on a Unix socket, which is made.
    ///
    /// # Errors
    ///
    /// Those of bind(2) and listen(2).
    pub fn unix(path: &Path) -> io::Result<Self> {
        UnixListener::bind(path).map(Self::Unix)
    }

    /// Serves each connection in a thread of its own.
    ///
    /// # Errors
    ///
    /// Those of accept(2) that do not end by themselves.
    pub fn serve(&self, children: &Arc<Children>) -> io::Result<Infallible> {
        loop {
            let Some(stream) = self.accept()? else {
                continue;
            };
            let named = matches!(self, Self::Vsock(_));
            let children = children.clone();
            let serve = move || {
                if named || read_port(&stream).is_ok_and(|port| port == AGENT_PORT) {
                    session::serve(stream, &children);
                }
            };
            // Without memory or processes for a thread the connection is closed, which the host sees.
            let _ = thread::Builder::new().stack_size(STACK).spawn(serve);
        }
    }

    fn accept(&self) -> io::Result<Option<UnixStream>> {
        let accepted = match self {
            Self::Vsock(socket) => rustix::net::accept_with(socket, SocketFlags::CLOEXEC),
            Self::Unix(socket) => rustix::net::accept_with(socket, SocketFlags::CLOEXEC),
        };
        match accepted {
            Ok(stream) => Ok(Some(stream.into())),
            Err(Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                thread::sleep(PAUSE);
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Reads the line `CONNECT PORT` and answers `OK PORT`.
fn read_port(mut stream: &UnixStream) -> io::Result<u32> {
    stream.set_read_timeout(Some(LINE_PATIENCE))?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        // One by one: what follows the line is the session's.
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
        if line.len() > "CONNECT 4294967295\n".len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    let port = str::from_utf8(&line)
        .ok()
        .and_then(|line| line.trim_end().strip_prefix("CONNECT ")?.parse().ok())
        .ok_or(io::ErrorKind::InvalidData)?;
    stream.set_read_timeout(None)?;
    stream.write_all(format!("OK {port}\n").as_bytes())?;
    Ok(port)
}
