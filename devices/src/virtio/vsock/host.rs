//! The host's side: the socket that its programs connect to, and those that the guest's connections go
//! to, in the convention of Firecracker and Cloud Hypervisor.

use std::ffi::OsString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// By which the listening socket is known in the epoll set.
pub const LISTENER: u64 = u64::MAX;
/// The longest line that asks for a connection.
const MAX_LINE: usize = 32;

/// What is the host's as long as the device lives.
#[derive(Debug)]
pub struct Host {
    listener: UnixListener,
    path: PathBuf,
    /// Its descriptor is readable while a socket in it has an event that was not taken.
    epoll: Epoll,
}

impl Host {
    /// Programs connect to `listener`, and the guest to `path` with `_` and the port at its end.
    ///
    /// # Errors
    ///
    /// Fails when the process may not have another descriptor.
    pub fn new(listener: UnixListener, path: PathBuf) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let host = Self {
            listener,
            path,
            epoll: Epoll::new()?,
        };
        // It stays silent where a client cannot be accepted for want of descriptors.
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        host.watch(host.listener.as_raw_fd(), LISTENER, events)?;
        Ok(host)
    }

    /// Readable while there are events.
    pub fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Takes events, and returns how many.
    ///
    /// # Errors
    ///
    /// Fails with EINTR.
    pub fn events(&self, events: &mut [EpollEvent]) -> io::Result<usize> {
        self.epoll.wait(0, events)
    }

    /// Watches a socket; closing it ends that.
    ///
    /// # Errors
    ///
    /// Fails where the user watches too much (fs.epoll.max_user_watches).
    pub fn watch(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        let event = EpollEvent::new(events, token);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }

    /// Watches it for something else. What is there already is an event again.
    pub fn watch_anew(&self, fd: RawFd, token: u64, events: EventSet) {
        let event = EpollEvent::new(events, token);
        if let Err(error) = self.epoll.ctl(ControlOperation::Modify, fd, event) {
            log::error!("cannot watch a connection of vsock: {error}");
        }
    }

    /// The next program that connects.
    ///
    /// # Errors
    ///
    /// WouldBlock where there is none, and what accept(2) has.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (socket, _) = self.listener.accept()?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    }

    /// Connects to the socket of this port; never waits.
    ///
    /// # Errors
    ///
    /// What socket(2) and connect(2) have: also EAGAIN where the program does not accept fast enough.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        // SAFETY: all bytes zero is a valid value of `sockaddr_un`, a C struct of integers.
        let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        if path.len() >= address.sun_path.len() {
            return Err(io::ErrorKind::InvalidFilename.into());
        }
        for (to, from) in address.sun_path.iter_mut().zip(path.as_bytes()) {
            *to = *from as libc::c_char;
        }
        let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: socket takes three numbers.
        let fd = check(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
        // SAFETY: the descriptor has just been made, and is used here alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let (address, len) = ((&raw const address).cast(), size_of::<libc::sockaddr_un>());
        // SAFETY: the address has `len` bytes.
        check(unsafe { libc::connect(fd.as_raw_fd(), address, len as libc::socklen_t) })?;
        Ok(fd.into())
    }
}

/// A program that has connected and not said yet which port it wants.
#[derive(Debug)]
pub struct Client {
    socket: UnixStream,
    line: Vec<u8>,
    /// When it is given up.
    pub deadline: Instant,
}

impl Client {
    /// One that has just connected.
    pub fn new(socket: UnixStream, deadline: Instant) -> Self {
        Self {
            socket,
            line: Vec::new(),
            deadline,
        }
    }

    /// Its socket.
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Reads on, but nothing after the line. The port, once the line is there.
    ///
    /// # Errors
    ///
    /// It is something else than `CONNECT PORT`, or the program has gone.
    pub fn port(&mut self) -> io::Result<Option<u32>> {
        let mut bytes = [0; MAX_LINE];
        loop {
            let bytes = &mut bytes[..MAX_LINE - self.line.len()];
            let seen = match self.receive(bytes, libc::MSG_PEEK) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                seen => seen?,
            };
            let end = bytes[..seen].iter().position(|&byte| byte == b'\n');
            let taken = end.map_or(seen, |end| end + 1);
            self.receive(&mut bytes[..taken], 0)?;
            self.line.extend_from_slice(&bytes[..taken]);
            if end.is_some() {
                return parse(&self.line).map(Some);
            }
            if seen == 0 || self.line.len() == MAX_LINE {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
    }

    fn receive(&self, bytes: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
        let (start, len) = (bytes.as_mut_ptr().cast(), bytes.len());
        // SAFETY: pointer and length are those of one slice.
        let n = unsafe { libc::recv(self.fd(), start, len, flags) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// The socket, for the connection.
    pub fn into_socket(self) -> UnixStream {
        self.socket
    }
}

/// The port of the line `CONNECT PORT`.
fn parse(line: &[u8]) -> io::Result<u32> {
    let words = std::str::from_utf8(line).unwrap_or_default();
    let mut words = words.split_ascii_whitespace();
    match (words.next(), words.next().map(str::parse), words.next()) {
        (Some(verb), Some(Ok(port)), None) if verb.eq_ignore_ascii_case("CONNECT") => Ok(port),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn line_that_asks_for_a_port_is_read_and_no_other() {
        for (line, port) in [
            ("CONNECT 22\n", Some(22)),
            ("connect 4294967295\n", Some(u32::MAX)),
            ("CONNECT  7 \r\n", Some(7)),
            ("CONNECT 4294967296\n", None),
            ("CONNECT -1\n", None),
            ("CONNECT 1 2\n", None),
            ("CONNECT\n", None),
            ("GET / HTTP/1.1\n", None),
            ("\n", None),
        ] {
            assert_eq!(parse(line.as_bytes()).ok(), port, "{line:?}");
        }
    }

    #[test]
    fn client_keeps_what_it_says_after_its_line() {
        let (mut program, socket) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut client = Client::new(socket, Instant::now());
        for part in ["CONN", "ECT ", "1"] {
            program.write_all(part.as_bytes()).unwrap();
            assert_eq!(client.port().unwrap(), None);
        }
        program.write_all(b"0\nhello").unwrap();
        assert_eq!(client.port().unwrap(), Some(10));
        drop(program);
        let mut rest = String::new();
        client.into_socket().read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }

    #[test]
    fn client_that_says_too_much_or_goes_is_refused() {
        for said in [&[b'x'; MAX_LINE + 1][..], b"CONNECT 1", b""] {
            let (mut program, socket) = UnixStream::pair().unwrap();
            socket.set_nonblocking(true).unwrap();
            program.write_all(said).unwrap();
            drop(program);
            assert!(Client::new(socket, Instant::now()).port().is_err());
        }
    }
}
