//! Requests to a server, and its replies, each of which has a deadline. The front end of the crate
//! `vhost` waits for one as long as the server likes.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::mem::{size_of, size_of_val};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::FrontendReq;
use vm_memory::ByteValued;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The protocol's version, in a header's flags.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// Descriptors that a reply may come with.
const MAX_FDS: usize = 1;

/// Request, flags, and bytes that follow.
type Header = [u32; 3];
const HEADER_LEN: usize = size_of::<Header>();

/// The connection with a server. A request that it refuses changes nothing; after any other failure it is
/// closed, and everything fails.
#[derive(Debug)]
pub(super) struct Channel {
    socket: UnixStream,
    limit: Duration,
    /// The server acknowledges requests that have no reply of their own.
    pub acknowledges: bool,
    is_broken: bool,
}

impl Channel {
    /// A server has so long for each reply.
    pub fn new(socket: UnixStream, limit: Duration) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        // Of what is sent, nothing is larger than a socket's buffer.
        socket.set_write_timeout(Some(limit))?;
        Ok(Self {
            socket,
            limit,
            acknowledges: false,
            is_broken: false,
        })
    }

    /// Whether nothing can be had of the server any more.
    pub fn is_broken(&self) -> bool {
        self.is_broken
    }

    /// How long the server has for a reply.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Closes it, which the server sees as its client's end.
    pub fn close(&mut self) {
        self.is_broken = true;
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Makes a request that has a reply, and returns that.
    pub fn ask<T: ByteValued + Default>(
        &mut self,
        request: FrontendReq,
        body: &[u8],
    ) -> io::Result<T> {
        Ok(self.ask_file(request, body, &[])?.0)
    }

    /// The same with descriptors, where a file may come with the reply.
    pub fn ask_file<T: ByteValued + Default>(
        &mut self,
        request: FrontendReq,
        body: &[u8],
        fds: &[RawFd],
    ) -> io::Result<(T, Option<File>)> {
        self.guarded(|channel| {
            channel.send(request, VERSION, body, fds)?;
            channel.receive(request)
        })
    }

    /// Makes a request that has no reply of its own, with these descriptors, and waits until the server
    /// has done it.
    pub fn order(&mut self, request: FrontendReq, body: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let acknowledges = self.acknowledges;
        let code = self.guarded(|channel| {
            if !acknowledges {
                return channel.send(request, VERSION, body, fds).map(|()| 0);
            }
            channel.send(request, VERSION | NEED_REPLY, body, fds)?;
            Ok(channel.receive::<u64>(request)?.0)
        });
        match code? {
            0 => Ok(()),
            code => Err(io::Error::other(format!("it refuses that ({code})"))),
        }
    }

    fn guarded<T>(&mut self, work: impl FnOnce(&Self) -> io::Result<T>) -> io::Result<T> {
        if self.is_broken {
            return Err(ErrorKind::NotConnected.into());
        }
        let result = work(self);
        if result.is_err() {
            self.close();
        }
        result
    }

    fn send(&self, request: FrontendReq, flags: u32, body: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let header: Header = [u32::from(request), flags, body.len() as u32];
        let parts = [ByteValued::as_slice(&header), body];
        let sent = self.socket.send_with_fds(&parts, fds)?;
        match sent == HEADER_LEN + body.len() {
            true => Ok(()),
            false => Err(timed_out(self.limit)),
        }
    }

    fn receive<T: ByteValued + Default>(
        &self,
        request: FrontendReq,
    ) -> io::Result<(T, Option<File>)> {
        let deadline = Instant::now() + self.limit;
        let (mut header, mut body) = (Header::default(), T::default());
        let file = self.fill(ByteValued::as_mut_slice(&mut header), deadline)?;
        let [code, flags, len] = header;
        let is_reply = flags & REPLY != 0 && code == u32::from(request);
        if !is_reply || len as usize != size_of_val(&body) {
            let what = format!("its reply to {request:?} is another message");
            return Err(io::Error::new(ErrorKind::InvalidData, what));
        }
        self.fill(body.as_mut_slice(), deadline)?;
        Ok((body, file))
    }

    /// Fills `bytes`, and returns the file that came with the first.
    fn fill(&self, mut bytes: &mut [u8], deadline: Instant) -> io::Result<Option<File>> {
        let mut file = None;
        while !bytes.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(timed_out(self.limit));
            }
            self.socket.set_read_timeout(Some(left))?;
            let (len, came) = match receive(&self.socket, bytes) {
                Ok((0, _)) => return Err(ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                received => received?,
            };
            file = file.or(came);
            bytes = &mut bytes[len..];
        }
        Ok(file)
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn timed_out(limit: Duration) -> io::Error {
    let what = format!("it has not replied in {limit:?}");
    io::Error::new(ErrorKind::TimedOut, what)
}

fn receive(socket: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Option<File>)> {
    let mut iovec = [libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }];
    let mut fds = [-1; MAX_FDS];
    // SAFETY: the iovec is of `bytes`, which is borrowed until the call is over.
    let (len, count) = unsafe { socket.recv_with_fds(&mut iovec, &mut fds) }?;
    let fd = fds[..count].first().map(|&fd| {
        // SAFETY: the kernel has just made this descriptor, and nothing else has it.
        unsafe { OwnedFd::from_raw_fd(fd) }
    });
    Ok((len, fd.map(File::from)))
}
