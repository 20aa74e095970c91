//! Accepts the host's connections.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use agent_protocol::AGENT_PORT;
use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::vsock;

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

    /// Whether the line comes first.
    pub fn has_line(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    /// Has [`Self::accept`] wait for no connection.
    ///
    /// # Errors
    ///
    /// Those of ioctl(2).
    pub fn set_nonblocking(&self) -> io::Result<()> {
        Ok(rustix::io::ioctl_fionbio(self, true)?)
    }

    /// The next connection of the host's, if there is one.
    ///
    /// # Errors
    ///
    /// Those of accept(2), but for what is over at once.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            let stream = match rustix::net::accept_with(self, SocketFlags::CLOEXEC) {
                Ok(stream) => stream,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            // Programs of the guest could run commands as root otherwise.
            if self.has_line() || vsock::is_of_host(&stream) {
                return Ok(Some(stream.into()));
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Vsock(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}
