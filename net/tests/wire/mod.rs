//! Ethernet frames through a macvtap queue.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

/// Size of the header before each frame, as the driver has it by default.
const HEADER: usize = 10;

/// How long a frame may take, and how long silence must last to count as such.
const PATIENCE: Duration = Duration::from_millis(700);

/// A minimal frame of an experimental type.
pub fn frame(to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    let mut frame = [to.as_slice(), &from, &[0x88, 0xb5]].concat();
    frame.resize(60, 0x55);
    frame
}

/// The question "who has `target`?" (RFC 826).
pub fn arp_request(mac: [u8; 6], own: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, 1];
    [
        &[0xff; 6],
        mac.as_slice(),
        &[8, 6],
        &head,
        &mac,
        &own,
        &[0; 6],
        &target,
        &[0; 18],
    ]
    .concat()
}

/// Writes one frame.
pub fn send(queue: BorrowedFd<'_>, frame: &[u8]) {
    let sent = rustix::io::write(queue, &[&[0; HEADER], frame].concat()).unwrap();
    assert_eq!(sent, HEADER + frame.len());
}

/// Sends a frame, again and again (a fresh link may drop the first), until a fitting answer comes.
pub fn exchange(queue: BorrowedFd<'_>, question: &[u8], fits: impl Fn(&[u8]) -> bool) -> bool {
    (0..5).any(|_| {
        send(queue, question);
        receives(queue, &fits)
    })
}

/// Whether a fitting frame comes in time.
pub fn receives(queue: BorrowedFd<'_>, fits: impl Fn(&[u8]) -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    std::iter::from_fn(|| next(queue, deadline)).any(|frame| fits(&frame))
}

/// All frames that come within `time`.
pub fn collect(queue: BorrowedFd<'_>, time: Duration) -> Vec<Vec<u8>> {
    let deadline = Instant::now() + time;
    std::iter::from_fn(|| next(queue, deadline)).collect()
}

fn next(queue: BorrowedFd<'_>, deadline: Instant) -> Option<Vec<u8>> {
    let left = deadline.checked_duration_since(Instant::now())?;
    let timeout = Timespec {
        tv_sec: left.as_secs() as i64,
        tv_nsec: left.subsec_nanos().into(),
    };
    let mut ready = [PollFd::new(&queue, PollFlags::IN)];
    if rustix::event::poll(&mut ready, Some(&timeout)).unwrap() == 0 {
        return None;
    }
    let mut buffer = vec![0; 65_562];
    let length = rustix::io::read(queue, &mut buffer).unwrap();
    Some(buffer[HEADER..length].to_vec())
}
