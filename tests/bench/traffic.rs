//! The far end of the wire: floods a macvtap, and sends the pings of a guest back.

use std::cell::Cell;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::harness::netns::Netns;

/// Ethernet types for experiments (IEEE 802): of a flood, of a ping-pong (tests/guest/src/flood).
const FLOOD: u16 = 0x88b5;
pub const PING: u16 = 0x88b6;
/// Who floods, and where a guest's frames go: no link there has that address.
pub const SENDER: [u8; 6] = [0x02, 0, 0, 0, 0x0b, 0x01];
pub const UNUSED: [u8; 6] = [0x02, 0, 0, 0, 0x0b, 0x02];
/// The header in front of each frame of a packet socket (packet(7), PACKET_VNET_HDR).
const HEADER: usize = 10;
/// Not in the crate `libc` (linux/if_packet.h).
const PACKET_QDISC_BYPASS: libc::c_int = 20;
const PACKET_VNET_HDR: libc::c_int = 15;
/// The most frames sent by one system call, how long it may take, and how long a paced sender sleeps.
pub const BURST: usize = 32;
const PATIENCE: Duration = Duration::from_millis(20);
/// More than the frames that can wait at a macvtap: 500 of the largest ones.
const SEND_BUFFER: libc::c_int = 128 << 20;
const PACE: Duration = Duration::from_micros(100);
/// The largest frame of an Ethernet link.
const LARGEST: usize = 1514;

/// What is sent to a macvtap.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// The length of a frame; beyond an Ethernet frame's one of TCP that is to be cut.
    pub size: usize,
    /// Frames a second; as many as possible without.
    pub rate: Option<u32>,
    /// How many frames at most are sent by one system call. After each of them the host may run
    /// the reader; so a neighbour's frames come one by one, and those of a busy NIC in bursts.
    pub burst: usize,
    /// Whether the sender waits while about 90 of its frames are on their way, as one with a window
    /// does. Else what the reader does not take in time is lost, as on a wire.
    pub waits: bool,
}

/// A thread that sends, and reflects pings, until it is dropped or its time is over.
#[derive(Debug)]
pub struct FarEnd {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FarEnd {
    /// Starts it on the link `wire` over there, with a load on the macvtap with this address if there
    /// is to be one.
    pub fn start(far: &Netns, to: [u8; 6], load: Option<Load>, limit: Duration) -> Self {
        let (sender, reflector) = far
            .enter(|| {
                let sender = packet_socket(0)?;
                for option in [PACKET_VNET_HDR, PACKET_QDISC_BYPASS] {
                    set(&sender, libc::SOL_PACKET, option, 1)?;
                }
                // Frames that wait count against the sender's buffer.
                if load.is_none_or(|load| !load.waits) {
                    set(&sender, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, SEND_BUFFER)?;
                }
                set_socket_timeout(&sender, Timeout::Send, Some(PATIENCE))?;
                Ok::<_, io::Error>((sender, packet_socket(PING)?))
            })
            .expect("packet sockets");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let end = Instant::now() + limit;
        let run = move || {
            let more = || !stopped.load(Ordering::Relaxed) && Instant::now() < end;
            match load {
                Some(load) => flood(&sender, &reflector, to, load, more),
                None => {
                    while more() {
                        wait(&reflector);
                        reflect(&reflector);
                    }
                }
            }
        };
        Self {
            stop,
            thread: Some(thread::spawn(run)),
        }
    }
}

impl Drop for FarEnd {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Its panic has been printed.
            let _ = thread.join();
        }
    }
}

/// Pings macvtaps whose users send frames back.
#[derive(Debug)]
pub struct Pinger {
    socket: OwnedFd,
    number: Cell<u32>,
}

impl Pinger {
    /// One at the far end, on its link `wire`.
    pub fn new(far: &Netns) -> Self {
        let socket = far.enter(|| packet_socket(PING)).expect("a packet socket");
        Self {
            socket,
            number: Cell::new(0),
        }
    }

    /// Pings an address; how long the frame was away, unless that was too long.
    pub fn ping(&self, to: [u8; 6], patience: Duration) -> Option<Duration> {
        let number = self.number.get() + 1;
        self.number.set(number);
        let mut bytes = frame(0, to, UNUSED, PING, 60);
        bytes[14..18].copy_from_slice(&number.to_le_bytes());
        let start = Instant::now();
        rustix::net::send(&self.socket, &bytes, rustix::net::SendFlags::empty()).ok()?;
        let mut answer = [0; LARGEST];
        loop {
            let left = patience.checked_sub(start.elapsed())?;
            set_socket_timeout(&self.socket, Timeout::Recv, Some(left.max(PACE))).ok()?;
            rustix::net::recv(&self.socket, &mut answer, rustix::net::RecvFlags::empty()).ok()?;
            if answer[6..12] == to && answer[14..18] == bytes[14..18] {
                return Some(start.elapsed());
            }
        }
    }
}

/// A frame with the header of `header` bytes that asks for what it needs.
pub fn frame(header: usize, to: [u8; 6], from: [u8; 6], kind: u16, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; header + size];
    let (head, frame) = bytes.split_at_mut(header);
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    frame[12..14].copy_from_slice(&kind.to_be_bytes());
    if size > LARGEST {
        // A checksum is needed; TCP over IPv4, headers of 54 bytes, segments of 1448 (virtio 1.2, 5.1.6).
        head[..10].copy_from_slice(&[1, 1, 54, 0, 0xa8, 0x05, 34, 0, 16, 0]);
        let length = ((size - 14) as u16).to_be_bytes();
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        frame[14..24].copy_from_slice(&[0x45, 0, length[0], length[1], 0, 0, 0, 0, 64, 6]);
        frame[46..48].copy_from_slice(&[5 << 4, 0x10]);
    }
    bytes
}

fn flood(sender: &OwnedFd, reflector: &OwnedFd, to: [u8; 6], load: Load, more: impl Fn() -> bool) {
    let bytes = frame(HEADER, to, SENDER, FLOOD, load.size);
    let part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all bytes zero is a value of mmsghdr.
    let mut message: libc::mmsghdr = unsafe { zeroed() };
    message.msg_hdr.msg_iov = (&raw const part).cast_mut();
    message.msg_hdr.msg_iovlen = 1;
    let mut batch = [message; BURST];
    let start = Instant::now();
    let mut sent = 0.0;
    while more() {
        let due = load.rate.map_or(load.burst as f64, |rate| {
            f64::from(rate) * start.elapsed().as_secs_f64() - sent
        });
        let count = (due as usize).min(load.burst);
        if count > 0 {
            // SAFETY: each message points to one part, and that to `bytes`, which are only read;
            // all of them outlive the call.
            let done =
                unsafe { libc::sendmmsg(sender.as_raw_fd(), batch.as_mut_ptr(), count as u32, 0) };
            sent += f64::from(done.max(0));
        }
        reflect(reflector);
        if load.rate.is_some() && count < load.burst {
            thread::sleep(PACE);
        }
    }
}

/// Sends back every ping that has come, its addresses exchanged.
fn reflect(socket: &OwnedFd) {
    let mut frame = [0; LARGEST];
    // Nothing there, or a link that is gone: both end it.
    while let Ok((length, _)) =
        rustix::net::recv(socket, &mut frame, rustix::net::RecvFlags::DONTWAIT)
    {
        let (to, from) = frame.split_at_mut(6);
        to.swap_with_slice(&mut from[..6]);
        let _ = rustix::net::send(socket, &frame[..length], rustix::net::SendFlags::empty());
    }
}

fn wait(socket: &OwnedFd) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let tenth = Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    // A signal ends it early, which does no harm.
    let _ = poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&tenth));
}

/// A packet socket at the link `wire` of this thread's namespace, that hears one Ethernet type.
fn packet_socket(kind: u16) -> io::Result<OwnedFd> {
    let protocol = kind.to_be();
    let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes plain numbers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, flags, protocol.into()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: the name is a string that ends with 0.
    let index = unsafe { libc::if_nametoindex(c"wire".as_ptr()) };
    // SAFETY: all bytes zero is a value of sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index as i32;
    let length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: bind reads `length` bytes of the address.
    let done = unsafe { libc::bind(fd, (&raw const address).cast(), length) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

fn set(
    socket: &OwnedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as u32;
    let value = (&raw const value).cast();
    let fd = socket.as_raw_fd();
    // SAFETY: setsockopt reads one int.
    let done = unsafe { libc::setsockopt(fd, level, option, value, length) };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
