//! The socket of a server in the file system.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf, absolute};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process serves it.
    #[error("{0:?} is the socket of another process: end that, or give another path")]
    Live(PathBuf),
    /// Something else is there.
    #[error("{0:?} exists and is no socket: give another path")]
    NoSocket(PathBuf),
    /// The host refuses it.
    #[error("cannot make the socket {0:?}")]
    Bind(PathBuf, #[source] io::Error),
}

/// A listening socket in the file system. Dropping it removes its file first.
#[derive(Debug)]
pub struct Listener {
    _file: SocketFile,
    socket: UnixListener,
}

/// The file of a socket, which goes with it.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Which file it is.
    id: Option<(u64, u64)>,
}

impl Listener {
    /// A listening socket that only this user may connect to, in place of one that an ended process has
    /// left.
    ///
    /// # Errors
    ///
    /// See [`SocketError`].
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |error| SocketError::Bind(path.to_owned(), error);
        let socket = match bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale(path)?;
                bind(path).map_err(failed)?
            }
            bound => bound.map_err(failed)?,
        };
        socket.set_nonblocking(true).map_err(failed)?;
        let file = SocketFile {
            // This process may go to another directory meanwhile.
            path: absolute(path).unwrap_or_else(|_| path.to_owned()),
            id: id(path),
        };
        Ok(Self {
            _file: file,
            socket,
        })
    }

    /// The next client; never waits for one.
    ///
    /// # Errors
    ///
    /// WouldBlock where there is none, and what accept(2) has.
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().map(|(stream, _)| stream)
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC;
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    let socket = rustix::net::socket_with(family, kind, flags, None)?;
    // Its file gets this mode, so that at no time another user can connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |error| SocketError::Bind(path.to_owned(), error);
    let found = fs::symlink_metadata(path).map_err(failed)?;
    if !found.file_type().is_socket() {
        return Err(SocketError::NoSocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
        Ok(_) => Err(SocketError::Live(path.to_owned())),
    }
}

fn id(path: &Path) -> Option<(u64, u64)> {
    let found = fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.id.is_some() && self.id == id(&self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
