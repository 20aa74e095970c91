//! A program at the other end of a stream socket as the backend of a network device: passt, or
//! whatever else speaks as QEMU's `-netdev stream` does. Before each frame goes its length, 4 bytes,
//! big-endian; there is no virtio-net header, and checksums are whole.

mod loopback;

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use libc::iovec as IoVec;
use virtio_bindings::virtio_net;

use super::backend::{Backend, HEADER_LEN};
use super::device::LARGEST_FRAME;
use super::features::Offloads;
use crate::lock;
use crate::virtio::iovec::{self, Iovecs};
use loopback::{JUDGED, is_to_loopback};

/// Bytes of a length.
const PREFIX_LEN: usize = 4;
/// The most that a length may say.
const LARGEST: usize = LARGEST_FRAME - HEADER_LEN;
/// The least: the two addresses and the protocol.
const SHORTEST: usize = 14;

/// A protocol that is no one's (IEEE 802a).
const LOCAL_EXPERIMENT: u16 = 0x88b5;
/// The length of a frame that need not be padded.
const WHOLE: usize = 60;

/// A frame up to this length is copied, so that many take one system call.
const SHORT: usize = 2048;
/// How much is read beyond a frame, so that the next ones are there already, and how much is written at
/// once of short ones.
const BATCH: usize = 32 << 10;
/// How much is read beyond a frame that is followed by long ones, which would be copied for nothing.
const LITTLE: usize = 256;
/// Pieces of a frame that fit into one system call with what comes before and after it.
const MOST_PIECES: usize = 1000;

/// The header of a received frame: its checksum need not be looked at.
const HEADER: [u8; HEADER_LEN] = {
    let mut header = [0; HEADER_LEN];
    header[0] = virtio_net::VIRTIO_NET_HDR_F_DATA_VALID as u8;
    header
};

/// A frame that means nothing, with its length, by which the other end learns the guest's MAC address. passt takes it from
/// what the guest sends, and a guest that waits for connections may send nothing before the first one.
pub fn introduction(mac: [u8; 6]) -> [u8; PREFIX_LEN + WHOLE] {
    let mut bytes = [0; PREFIX_LEN + WHOLE];
    let parts = [
        &(WHOLE as u32).to_be_bytes()[..],
        &[0xff; 6],
        &mac,
        &LOCAL_EXPERIMENT.to_be_bytes(),
    ];
    let begin = parts.concat();
    bytes[..begin.len()].copy_from_slice(&begin);
    bytes
}

/// Our end of the socket.
#[derive(Debug)]
pub struct Stream {
    socket: UnixStream,
    received: Mutex<Received>,
    sent: Mutex<Sent>,
}

/// What was read and not delivered yet.
#[derive(Debug)]
struct Received {
    /// Room for a whole frame and a batch.
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// The last frame was short.
    is_short: bool,
    iovecs: Iovecs,
}

/// What was taken and not written yet. Of the first frame a part may have been.
#[derive(Debug, Default)]
struct Sent {
    bytes: Vec<u8>,
    /// The socket had no room.
    is_full: bool,
    iovecs: Iovecs,
}

impl Stream {
    /// The backend by `socket`.
    ///
    /// # Errors
    ///
    /// Fails when the socket cannot be made non-blocking.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let received = Received {
            // Pages of zeros that are not written to take no memory.
            bytes: vec![0; PREFIX_LEN + LARGEST + BATCH],
            start: 0,
            end: 0,
            is_short: true,
            iovecs: Iovecs::default(),
        };
        Ok(Self {
            socket,
            received: Mutex::new(received),
            sent: Mutex::default(),
        })
    }

    /// Nothing more can come or go. Whoever polls the socket finds it hung up.
    fn hang_up(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Reads into `iovecs`.
    ///
    /// # Safety
    ///
    /// Each iovec must describe memory that may be written for as long as the call lasts.
    unsafe fn read(&self, iovecs: &mut [IoVec]) -> io::Result<usize> {
        let mut message = message(iovecs);
        // SAFETY: `message` has no more than the iovecs, for which the caller vouches.
        let n = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &mut message, 0) };
        match usize::try_from(n) {
            Ok(0) => {
                self.hang_up();
                Err(io::ErrorKind::WouldBlock.into())
            }
            Ok(n) => Ok(n),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// Writes what lies in `iovecs`, or as much of it as there is room for.
    ///
    /// # Safety
    ///
    /// Each iovec must describe memory that may be read for as long as the call lasts.
    unsafe fn write(&self, iovecs: &mut [IoVec]) -> io::Result<usize> {
        let message = message(iovecs);
        // SAFETY: `message` has no more than the iovecs, for which the caller vouches.
        let n = unsafe { libc::sendmsg(self.socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Writes what was taken.
    fn write_taken(&self, sent: &mut Sent) -> io::Result<()> {
        let Sent { bytes, is_full, .. } = sent;
        let mut done = 0;
        while done < bytes.len() {
            // SAFETY: the iovec describes the rest of `bytes`, which is only read.
            match unsafe { self.write(&mut [to_iovec(&bytes[done..])]) } {
                Ok(n) => done += n,
                Err(error) => {
                    *is_full = error.kind() == io::ErrorKind::WouldBlock;
                    // Of what is lost nothing must be written later.
                    let gone = if *is_full { done } else { bytes.len() };
                    bytes.drain(..gone);
                    return Err(error);
                }
            }
        }
        bytes.clear();
        *is_full = false;
        Ok(())
    }
}

impl Received {
    fn held(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Of the first frame its length, and how much of it is here.
    fn first(&self) -> io::Result<Option<(usize, usize)>> {
        let Some((prefix, rest)) = self.held().split_first_chunk() else {
            return Ok(None);
        };
        let len = u32::from_be_bytes(*prefix) as usize;
        if !(SHORTEST..=LARGEST).contains(&len) {
            let text = format!("a frame of {len} bytes is announced, which none can have");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Some((len, len.min(rest.len()))))
    }

    /// Has the first frame, which is whole, at offset `at` of the guest's `iovecs`.
    ///
    /// # Safety
    ///
    /// Each iovec must describe memory that may be written.
    unsafe fn deliver(&mut self, iovecs: &[IoVec], len: usize) {
        let start = self.start + PREFIX_LEN;
        // SAFETY: as for this function.
        unsafe { iovec::scatter(iovecs, 0, &HEADER) };
        // SAFETY: as for this function.
        unsafe { iovec::scatter(iovecs, HEADER_LEN, &self.bytes[start..start + len]) };
        self.start = start + len;
        self.is_short = len <= SHORT;
    }

    /// Room for what is read next, behind what is held.
    fn room(&mut self) -> &mut [u8] {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let ahead = if self.is_short { BATCH } else { LITTLE };
        let most = self.bytes.len().min(self.end + ahead);
        &mut self.bytes[self.end..most]
    }
}

impl Sent {
    /// What was taken up to `begin`, a frame's length and beginning behind that and the rest of the frame
    /// have been written, or a part of them. Returns how much of the rest was.
    ///
    /// # Errors
    ///
    /// Those of writing; `WouldBlock` also if nothing of the frame or its length was written.
    fn written(&mut self, begin: usize, written: io::Result<usize>) -> io::Result<usize> {
        let (n, error) = match written {
            Ok(n) => (n, io::ErrorKind::WouldBlock.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => (0, error),
            // Of what is lost nothing must be written later.
            Err(error) => (begin, error),
        };
        let held = self.bytes.len();
        self.is_full = error.kind() == io::ErrorKind::WouldBlock;
        if n <= begin {
            self.bytes.truncate(begin);
            self.bytes.drain(..n);
            return Err(error);
        }
        self.bytes.drain(..n.min(held));
        Ok(n.saturating_sub(held))
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn to_iovec(bytes: &[u8]) -> IoVec {
    IoVec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

fn message(iovecs: &mut [IoVec]) -> libc::msghdr {
    // SAFETY: all bytes zero is a valid value of `msghdr`, a C struct of integers and pointers.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len();
    message
}

impl Backend for Stream {
    unsafe fn read_frame(&self, iovecs: &[IoVec]) -> io::Result<usize> {
        let mut received = lock(&self.received);
        let received = &mut *received;
        let room: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
        loop {
            let first = received.first().inspect_err(|_| self.hang_up())?;
            if let Some((len, _)) = first.filter(|(len, here)| len == here) {
                // SAFETY: the caller vouches for the iovecs.
                unsafe { received.deliver(iovecs, len) };
                return Ok(room.min(HEADER_LEN + len));
            }
            let behind = received.room();
            let behind = IoVec {
                iov_base: behind.as_mut_ptr().cast(),
                iov_len: behind.len(),
            };
            received.iovecs.clear();
            // What is missing goes straight to the guest, where there is room for the whole frame.
            let missing = first.filter(|(len, _)| HEADER_LEN + len <= room);
            let missing = missing.map(|(len, here)| (HEADER_LEN + here, len - here));
            if let Some((at, left)) = missing.filter(|_| iovecs.len() <= MOST_PIECES) {
                iovec::part(iovecs, at, left, &mut received.iovecs);
            }
            let direct: usize = received.iovecs.iter().map(|iovec| iovec.iov_len).sum();
            received.iovecs.push(behind);
            // SAFETY: the caller vouches for the iovecs; the last one is that of free room in `bytes`.
            let n = unsafe { self.read(&mut received.iovecs) }?;
            let Some((at, left)) = missing.filter(|_| direct > 0) else {
                received.end += n;
                continue;
            };
            if n < left {
                // Nothing of a frame that is not whole stays with the guest, which may be reset.
                let to = &mut received.bytes[received.end..];
                // SAFETY: as above. `behind` may lie where this goes, but nothing was read into it.
                unsafe { iovec::gather(iovecs, at, &mut to[..n]) };
                received.end += n;
                continue;
            }
            let here = at - HEADER_LEN;
            // SAFETY: as above.
            unsafe { iovec::scatter(iovecs, 0, &HEADER) };
            let held = &received.bytes[PREFIX_LEN..PREFIX_LEN + here];
            // SAFETY: as above.
            unsafe { iovec::scatter(iovecs, HEADER_LEN, held) };
            received.start = received.end;
            received.end += n - left;
            received.is_short = here + left <= SHORT;
            return Ok(HEADER_LEN + here + left);
        }
    }

    unsafe fn write_frame(&self, iovecs: &[IoVec]) -> io::Result<usize> {
        let mut sent = lock(&self.sent);
        let sent = &mut *sent;
        let whole: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
        let len = whole.saturating_sub(HEADER_LEN);
        if !(SHORTEST..=LARGEST).contains(&len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let is_copied = len <= SHORT || iovecs.len() > MOST_PIECES;
        if sent.is_full || is_copied && sent.bytes.len() + PREFIX_LEN + len > BATCH {
            self.write_taken(sent)?;
        }
        let begin = sent.bytes.len();
        sent.bytes.extend((len as u32).to_be_bytes());
        // What is judged is what is written, whatever the guest changes meanwhile.
        let mut done = if is_copied { len } else { JUDGED };
        let frame = sent.bytes.len();
        sent.bytes.resize(frame + done, 0);
        // SAFETY: the caller vouches for the iovecs.
        unsafe { iovec::gather(iovecs, HEADER_LEN, &mut sent.bytes[frame..]) };
        if is_to_loopback(&sent.bytes[frame..]) {
            sent.bytes.truncate(begin);
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if !is_copied {
            sent.iovecs.clear();
            sent.iovecs.push(to_iovec(&sent.bytes));
            iovec::part(iovecs, HEADER_LEN + done, len - done, &mut sent.iovecs);
            // SAFETY: the caller vouches for the iovecs; the first one describes `bytes`, which is only
            // read.
            let written = unsafe { self.write(&mut sent.iovecs) };
            done += sent.written(begin, written)?;
            let rest = sent.bytes.len();
            sent.bytes.resize(rest + len - done, 0);
            // SAFETY: as above.
            unsafe { iovec::gather(iovecs, HEADER_LEN + done, &mut sent.bytes[rest..]) };
        }
        sent.is_full &= !sent.bytes.is_empty();
        Ok(whole)
    }

    fn flush(&self) -> io::Result<()> {
        self.write_taken(&mut lock(&self.sent))
    }

    fn known_offloads(&self) -> Offloads {
        // Of checksums it need only be said that they are right.
        Offloads::CSUM
    }

    fn write_offloads(&self) -> Offloads {
        Offloads::empty()
    }

    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_enabled(&self, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn set_mac(&self, mac: [u8; 6]) -> io::Result<()> {
        let mut sent = lock(&self.sent);
        // Behind much that is not read it is left out: the next frame says the same.
        if sent.bytes.len() <= BATCH {
            sent.bytes.extend(introduction(mac));
            // What finds no room is written later, and another end that is gone need not know.
            let _ = self.write_taken(&mut sent);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
