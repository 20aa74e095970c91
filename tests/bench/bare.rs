//! The limit: loops on the queue of a macvtap, without a monitor or a guest.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read, write};
use rustix::mm::{Advice, madvise};

use super::traffic::{PING, SENDER, UNUSED, frame};
use super::usage::Usage;
use super::wire::Tap;

/// As minivmm has it: the virtio header's size, offloads, room for the largest frame.
const HEADER: usize = 12;
const ROOM: usize = HEADER + 65_562;
const RING: usize = 256;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
/// TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6.
const OFFLOADS: u64 = 1 | 2 | 4;
/// How long a frame may be away, as in the guest.
const LOST: Duration = Duration::from_millis(200);
/// Without a sender.
const NOTHING: Duration = Duration::from_secs(10);

/// What a loop did.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    /// Frames, and their bytes.
    pub frames: u64,
    /// Without headers.
    pub bytes: u64,
    /// From the first frame to the last.
    pub time: Duration,
    /// What the thread used.
    pub usage: Usage,
}

/// Sends frames of a size for so long, from as many buffers as a guest has, in one piece of memory
/// as the guest's: a single one would stay in the cache.
pub fn send(tap: &Tap, size: usize, time: Duration) -> Counted {
    let queue = prepare(tap);
    let bytes = frame(HEADER, UNUSED, tap.mac, 0x88b5, size);
    let buffers = in_huge_pages(&bytes, RING);
    let (start, usage) = (Instant::now(), Usage::of_this_thread());
    let mut frames = 0;
    while start.elapsed() < time {
        // All of them before a look at the clock, which costs time too.
        let buffers = buffers.chunks_exact(bytes.len());
        let sent = buffers.filter(|bytes| write(queue, bytes).is_ok());
        frames += sent.count() as u64;
    }
    counted(frames, frames * size as u64, start, usage)
}

/// So many copies one after the other, in huge pages, as a guest's memory is.
fn in_huge_pages(bytes: &[u8], copies: usize) -> Vec<u8> {
    const PAGE: usize = 4096;
    let mut all: Vec<u8> = Vec::with_capacity(copies * bytes.len() + PAGE);
    let start = all.as_mut_ptr();
    let start = start.map_addr(|address| address.next_multiple_of(PAGE));
    let len = (copies * bytes.len()).next_multiple_of(PAGE) - PAGE;
    // SAFETY: the pages lie within the vector's memory, whose contents this does not change. A kernel
    // without huge pages refuses it.
    let _ = unsafe { madvise(start.cast(), len, Advice::LinuxHugepage) };
    (0..copies).for_each(|_| all.extend_from_slice(bytes));
    all
}

/// A page, as O_DIRECT wants its buffers aligned.
#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

/// Zeroed memory in huge pages, as far as it fills any.
pub struct HugePages {
    pages: Vec<Page>,
}

impl HugePages {
    /// At least `len` bytes.
    pub fn new(len: usize) -> Self {
        let count = len.div_ceil(size_of::<Page>());
        let mut pages: Vec<Page> = Vec::with_capacity(count);
        let size = count * size_of::<Page>();
        // SAFETY: the pages are the vector's own, whose contents this does not change. A kernel
        // without huge pages refuses it.
        let _ = unsafe { madvise(pages.as_mut_ptr().cast(), size, Advice::LinuxHugepage) };
        pages.resize(count, Page([0; 4096]));
        Self { pages }
    }

    /// Its bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        let size = size_of_val(&*self.pages);
        // SAFETY: the pages follow one another without gaps, and any bits are a byte.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_mut_ptr().cast(), size) }
    }
}

/// Receives the frames of a flood for so long.
pub fn receive(tap: &Tap, time: Duration) -> Counted {
    let queue = prepare(tap);
    let mut buffer = vec![0; ROOM];
    let mut frames = [0_u64; 2];
    let (mut start, mut usage) = (Instant::now(), Usage::of_this_thread());
    let mut begun = false;
    while !begun || start.elapsed() < time {
        match read(queue, &mut buffer) {
            Ok(length) if buffer[HEADER + 6..HEADER + 12] == SENDER => {
                if !begun {
                    (start, usage, begun) = (Instant::now(), Usage::of_this_thread(), true);
                }
                frames[0] += 1;
                frames[1] += (length - HEADER) as u64;
            }
            Ok(_) => {}
            Err(Errno::AGAIN) => wait(queue),
            Err(why) => panic!("the macvtap: {why}"),
        }
        assert!(begun || start.elapsed() < NOTHING, "no frame comes");
    }
    counted(frames[0], frames[1], start, usage)
}

/// What a ping-pong did.
#[derive(Debug)]
pub struct Trips {
    /// How long each frame was away that came back, the shortest first.
    pub times: Vec<Duration>,
    /// How many were sent.
    pub sent: u32,
    /// Frames of a flood meanwhile.
    pub frames: u64,
    /// How long it all took.
    pub time: Duration,
}

/// Sends a frame that comes back `count` times, each `gap` after the last. It polls as the guest
/// does.
pub fn ping_pong(tap: &Tap, size: usize, count: usize, gap: Duration, limit: Duration) -> Trips {
    let queue = prepare(tap);
    let mut bytes = frame(HEADER, UNUSED, tap.mac, PING, size);
    let number_at = HEADER + 14..HEADER + 18;
    let mut buffer = vec![0; ROOM];
    let mut trips = Trips {
        times: Vec::new(),
        sent: 0,
        frames: 0,
        time: Duration::ZERO,
    };
    let start = Instant::now();
    while trips.sent < count as u32 && start.elapsed() < limit {
        trips.sent += 1;
        bytes[number_at.clone()].copy_from_slice(&trips.sent.to_le_bytes());
        let sent = Instant::now();
        write(queue, &bytes).expect("the macvtap takes a frame");
        let mut back = None;
        // Afterwards, as in the guest, what else comes is taken.
        while back.map_or(sent.elapsed() < LOST, |back: Instant| back.elapsed() < gap) {
            if read(queue, &mut buffer).is_err() {
                continue;
            }
            trips.frames += u64::from(buffer[HEADER + 6..HEADER + 12] == SENDER);
            if buffer[HEADER + 12..HEADER + 14] == PING.to_be_bytes()
                && buffer[number_at.clone()] == bytes[number_at.clone()]
            {
                trips.times.push(sent.elapsed());
                back = Some(Instant::now());
            }
        }
    }
    trips.time = start.elapsed();
    trips.times.sort();
    trips
}

fn counted(frames: u64, bytes: u64, start: Instant, usage: Usage) -> Counted {
    Counted {
        frames,
        bytes,
        time: start.elapsed(),
        usage: Usage::of_this_thread().since(usage),
    }
}

fn wait(queue: &OwnedFd) {
    let tenth = Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    // A signal ends it early, which does no harm.
    let _ = poll(&mut [PollFd::new(queue, PollFlags::IN)], Some(&tenth));
}

/// Sets the first queue as a monitor does.
fn prepare(tap: &Tap) -> &OwnedFd {
    let queue = &tap.queues()[0];
    let fd = queue.as_raw_fd();
    let size = HEADER as libc::c_int;
    // SAFETY: the request reads one int.
    let sized = unsafe { libc::ioctl(fd, TUNSETVNETHDRSZ, &raw const size) };
    // SAFETY: the request takes a number.
    let offloads = unsafe { libc::ioctl(fd, TUNSETOFFLOAD, OFFLOADS) };
    assert!(
        sized == 0 && offloads == 0,
        "the macvtap: {}",
        io::Error::last_os_error()
    );
    rustix::io::ioctl_fionbio(queue, true).expect("the queue is open");
    queue
}
