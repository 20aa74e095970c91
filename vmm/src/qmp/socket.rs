//! The sockets of a server.

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf, absolute};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::config::QmpSocket;
use crate::nic::Inherited;

/// The connections that may wait to be accepted.
const BACKLOG: i32 = 64;
/// Who may connect: this user alone.
const MODE: u32 = 0o600;
/// Bytes of a path in a socket's address (unix(7)), without the zero at its end.
pub const LONGEST: usize = 107;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// It is served.
    #[error("{0:?} is a socket that is served already: give another path, or end who serves it")]
    Live(PathBuf),
    /// Something else is there.
    #[error("{0:?} exists and is no socket: give another path")]
    NoSocket(PathBuf),
    /// It does not fit into an address.
    #[error("{0:?} is too long for a socket: the path may have {LONGEST} bytes")]
    TooLong(PathBuf),
    /// The host refuses it.
    #[error("cannot make the socket {0:?}")]
    Bind(PathBuf, #[source] io::Error),
    /// Something that was passed is something else.
    #[error("fd {0} is no Unix stream socket that listens")]
    NoListener(RawFd),
}

/// A listening socket. Dropping it removes the file that was made for it first.
#[derive(Debug)]
pub struct Listener {
    _file: Option<SocketFile>,
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
    /// The socket that the user wants.
    ///
    /// # Errors
    ///
    /// See [`SocketError`].
    pub fn open(socket: &QmpSocket, inherited: &mut Inherited) -> Result<Self, SocketError> {
        match socket {
            QmpSocket::Path(path) => Self::bind(path),
            QmpSocket::Descriptor(number) => {
                let fd = inherited.listener(*number);
                let listener = fd.and_then(|fd| Self::from_fd(fd).ok());
                listener.ok_or(SocketError::NoListener(*number))
            }
        }
    }

    /// A listening socket that only this user may connect to, in place of one that an ended process has
    /// left.
    ///
    /// # Errors
    ///
    /// See [`SocketError`].
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        if path.as_os_str().len() > LONGEST {
            return Err(SocketError::TooLong(path.to_owned()));
        }
        let failed = |error| SocketError::Bind(path.to_owned(), error);
        let _lock = lock_directory(path);
        let socket = match bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale(path)?;
                bind(path).map_err(failed)?
            }
            bound => bound.map_err(failed)?,
        };
        let file = SocketFile {
            // This process may go to another directory meanwhile.
            path: absolute(path).unwrap_or_else(|_| path.to_owned()),
            id: id(path),
        };
        Ok(Self {
            _file: Some(file),
            socket,
        })
    }

    /// One that listens already. Its file, if it has one, stays: whoever made it has use for it.
    fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let is_stream = sockopt::socket_domain(&fd)? == AddressFamily::UNIX
            && sockopt::socket_type(&fd)? == SocketType::STREAM;
        if !is_stream || !sockopt::socket_acceptconn(&fd)? {
            return Err(ErrorKind::InvalidInput.into());
        }
        let socket = UnixListener::from(fd);
        socket.set_nonblocking(true)?;
        Ok(Self {
            _file: None,
            socket,
        })
    }

    /// Another descriptor of the same socket, without its file.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn try_clone(&self) -> io::Result<UnixListener> {
        self.socket.try_clone()
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

/// Keeps two of us from replacing the same stale socket, and from taking one for stale that does not listen yet. Where
/// the directory cannot be locked, or another program has it locked for long, there is no such care.
fn lock_directory(path: &Path) -> Option<File> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let directory = File::open(parent.unwrap_or(Path::new("."))).ok()?;
    for _ in 0..100 {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => thread::sleep(Duration::from_millis(10)),
            Err(_) => break,
            Ok(()) => return Some(directory),
        }
    }
    None
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let socket = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    // Its file gets this mode but for the umask, so that at no time another user can connect.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(MODE))?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    let listening = rustix::net::listen(&socket, BACKLOG).map_err(io::Error::from);
    let ready = listening.and_then(|()| {
        if fs::symlink_metadata(path)?.mode() & 0o777 != MODE {
            fs::set_permissions(path, Permissions::from_mode(MODE))?;
        }
        Ok(())
    });
    match ready {
        Ok(()) => Ok(socket.into()),
        Err(error) => {
            let _ = fs::remove_file(path);
            Err(error)
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |error| SocketError::Bind(path.to_owned(), error);
    let found = fs::symlink_metadata(path).map_err(failed)?;
    if !found.file_type().is_socket() {
        return Err(SocketError::NoSocket(path.to_owned()));
    }
    match is_live(path) {
        Ok(false) => fs::remove_file(path).map_err(failed),
        Ok(true) => Err(SocketError::Live(path.to_owned())),
        Err(error) => Err(failed(error)),
    }
}

fn is_live(path: &Path) -> io::Result<bool> {
    let socket = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
        // Or many wait to be accepted.
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    Ok(rustix::net::socket_with(family, kind, flags, None)?)
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

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    /// A socket that an ended process has left.
    fn stale(path: &Path) {
        drop(UnixListener::bind(path).unwrap());
        assert!(path.exists());
    }

    #[test]
    fn socket_is_its_users_alone_and_goes_with_its_listener() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        stale(&path);
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, MODE);
        let second = Listener::bind(&path);
        assert!(matches!(second, Err(SocketError::Live(_))), "{second:?}");
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn file_in_the_sockets_place_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        drop(listener);
        let refused = Listener::bind(&path);
        assert!(matches!(refused, Err(SocketError::NoSocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn path_that_no_socket_can_have_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let long = directory.path().join("x".repeat(100));
        assert!(matches!(Listener::bind(&long), Err(SocketError::TooLong(path)) if path == long));
        let nowhere = directory.path().join("none/s");
        assert!(
            matches!(Listener::bind(&nowhere), Err(SocketError::Bind(path, _)) if path == nowhere)
        );
    }

    #[test]
    fn one_of_many_replaces_a_stale_socket() {
        let directory = tempfile::tempdir().unwrap();
        for round in 0..50 {
            let path = directory.path().join(round.to_string());
            stale(&path);
            let barrier = Barrier::new(8);
            let bind = || {
                barrier.wait();
                Listener::bind(&path)
            };
            let bound: Vec<_> = thread::scope(|scope| {
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(bind)).collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().unwrap())
                    .collect()
            });
            assert_eq!(bound.iter().filter(|bound| bound.is_ok()).count(), 1);
            // It is the one that clients reach.
            UnixStream::connect(&path).unwrap();
            let winner = bound.into_iter().find_map(Result::ok).unwrap();
            winner.accept().unwrap();
        }
    }

    #[test]
    fn descriptor_has_to_be_a_stream_socket_that_listens() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = Listener::from_fd(UnixListener::bind(&path).unwrap().into()).unwrap();
        drop(listener);
        assert!(path.exists());
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(Listener::from_fd(one.into()).is_err());
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(Listener::from_fd(tcp.into()).is_err());
        assert!(Listener::from_fd(File::open("/dev/null").unwrap().into()).is_err());
    }
}
