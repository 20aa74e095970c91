//! What passed a NIC, in a pcapng file for packet analysers.
//!
//! The NIC's threads append to a buffer, and a thread of the capture's own writes it out, so that
//! a slow disk or a reader that sleeps costs frames of the capture, and never one of the guest's.
//! The buffer holds whole blocks and is written as soon as there is something in it: one by one
//! while little passes, in large batches otherwise. After each, a reader finds a valid file.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::mem;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use super::pcapng;
use crate::virtio::iovec::gather;

/// Bytes that may wait for the writer, with those that it is writing.
const MAX_WAITING: usize = 4 << 20;
/// As much is written at once, and makes room again.
const PIECE: usize = 256 << 10;
/// How long the end of a capture may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Which way a frame went, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the guest.
    Received,
    /// From the guest.
    Sent,
}

/// A capture that is being written. All queue pairs of its NIC share it.
///
/// Dropping it writes what waits and the statistics, and closes the file. A write that cannot
/// finish (a pipe whose reader does not read, a file server that is gone) cannot be cancelled
/// either: after two seconds it is no longer waited for. It ends when its write does, or
/// with the process, and until then it has the file and at most 4 MiB of frames.
pub struct Capture {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

struct Shared {
    /// The NIC's, in logs and in the file.
    name: String,
    queue: Mutex<Queue>,
    /// The queue has something for whoever waits: the writer, or the end of the capture.
    changed: Condvar,
    /// Bytes that still fit, 0 for ever once writing has failed. It shrinks under the lock only,
    /// so that room which is seen there stays.
    room: AtomicUsize,
    dropped: AtomicU64,
}

#[derive(Default)]
struct Queue {
    /// Whole blocks.
    blocks: Vec<u8>,
    /// Frames in them.
    frames: u64,
    /// The writer sleeps.
    idle: bool,
    /// No more frames will come.
    closing: bool,
    /// The writer has ended.
    ended: bool,
}

impl Capture {
    /// Captures into `file`, which is empty and open for writing, and may be a pipe. `name` is the
    /// NIC's.
    ///
    /// # Errors
    ///
    /// Fails when the system has no thread left. An error of the file is none of this call's: it
    /// is logged when it happens, and ends the capture.
    pub fn start(file: File, name: &str) -> io::Result<Self> {
        let blocks = pcapng::start(name);
        let room = MAX_WAITING.saturating_sub(blocks.len());
        let shared = Arc::new(Shared {
            name: name.into(),
            queue: Mutex::new(Queue {
                blocks,
                ..Queue::default()
            }),
            changed: Condvar::new(),
            room: AtomicUsize::new(room),
            dropped: AtomicU64::new(0),
        });
        let writer = thread::Builder::new().name(format!("{name}.pcap")).spawn({
            let shared = Arc::clone(&shared);
            move || shared.run(file)
        })?;
        Ok(Self {
            shared,
            writer: Some(writer),
        })
    }

    /// Captures the frame that lies in `iovecs` from byte `skip` to byte `len`; drops it when the
    /// writer cannot keep up, or has given up.
    ///
    /// # Safety
    ///
    /// Each iovec must describe memory that may be read for as long as the call lasts.
    pub unsafe fn record(
        &self,
        direction: Direction,
        iovecs: &[libc::iovec],
        skip: usize,
        len: usize,
    ) {
        let shared = &*self.shared;
        let original = len.saturating_sub(skip);
        let needed = pcapng::packet_len(original.min(pcapng::SNAP_LEN));
        if shared.room.load(Ordering::Relaxed) < needed {
            shared.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut queue = shared.lock();
        if shared.room.load(Ordering::Relaxed) < needed {
            shared.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let before = queue.blocks.len();
        // The clock is read under the lock, so that the file is in the order of time.
        let now = SystemTime::now();
        pcapng::packet(&mut queue.blocks, now, direction, original, |to| {
            // SAFETY: the caller vouches for the iovecs; `to` is part of `blocks`, which is ours.
            unsafe { gather(iovecs, skip, to) }
        });
        queue.frames += 1;
        let block = queue.blocks.len() - before;
        shared.room.fetch_sub(block, Ordering::Relaxed);
        let wake = mem::take(&mut queue.idle);
        drop(queue);
        if wake {
            shared.changed.notify_all();
        }
    }

    /// Frames that the file lacks so far.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let shared = &*self.shared;
        let mut queue = shared.lock();
        queue.closing = true;
        shared.changed.notify_all();
        let (queue, _) = shared
            .changed
            .wait_timeout_while(queue, PATIENCE, |queue| !queue.ended)
            .unwrap_or_else(PoisonError::into_inner);
        let ended = queue.ended;
        drop(queue);
        if ended {
            // It has nothing left to do, and no result.
            let _ = self.writer.take().map(JoinHandle::join);
        } else {
            let name = &shared.name;
            log::warn!("{name}: the capture lacks its end: its file took none for {PATIENCE:?}");
        }
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture")
            .field("name", &self.shared.name)
            .field("dropped", &self.dropped())
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The writer's thread.
    fn run(&self, mut file: File) {
        let result = self.write(&mut file);
        // Whoever drops the capture may count on the file being complete.
        drop(file);
        if let Err(error) = &result {
            log::warn!("{}: the capture ends here: {error}", self.name);
        }
        let mut queue = self.lock();
        if result.is_err() {
            // Frames that come from now on find no room.
            self.room.store(0, Ordering::Relaxed);
            self.drop_frames(queue.frames);
            queue.blocks = Vec::new();
        }
        queue.ended = true;
        self.changed.notify_all();
    }

    /// Writes what comes until the capture is dropped, then the statistics.
    fn write(&self, file: &mut File) -> io::Result<()> {
        let mut written = 0;
        let mut blocks = Vec::new();
        while let Some(frames) = self.next(&mut blocks) {
            for piece in blocks.chunks(PIECE) {
                file.write_all(piece)
                    .inspect_err(|_| self.drop_frames(frames))?;
                self.room.fetch_add(piece.len(), Ordering::Relaxed);
            }
            written += frames;
        }
        let dropped = self.dropped.load(Ordering::Relaxed);
        if dropped > 0 {
            log::warn!(
                "{}: the capture lacks {dropped} of {} frames: its file could not keep up",
                self.name,
                written + dropped
            );
        }
        blocks.clear();
        pcapng::end(&mut blocks, SystemTime::now(), written + dropped, dropped);
        file.write_all(&blocks)
    }

    /// Waits for blocks, swaps them for the old ones and returns how many frames they hold, or
    /// nothing when no more will come.
    fn next(&self, blocks: &mut Vec<u8>) -> Option<u64> {
        blocks.clear();
        let mut queue = self.lock();
        queue.idle = true;
        let mut queue = self
            .changed
            .wait_while(queue, |queue| queue.blocks.is_empty() && !queue.closing)
            .unwrap_or_else(PoisonError::into_inner);
        queue.idle = false;
        if queue.blocks.is_empty() {
            return None;
        }
        mem::swap(&mut queue.blocks, blocks);
        Some(mem::take(&mut queue.frames))
    }

    fn drop_frames(&self, frames: u64) {
        self.dropped.fetch_add(frames, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt;
    use std::time::Instant;

    use super::super::pcapng::tests::{Block, Packet, parse};
    use super::*;
    use crate::virtio::iovec::tests::iovecs;

    const SKIP: usize = 12;

    /// Records this frame after a header, cut into pieces of `piece` bytes.
    fn record(capture: &Capture, direction: Direction, frame: &[u8], piece: usize) {
        let mut bytes = [&[0xaa; SKIP][..], frame].concat();
        let len = bytes.len();
        // Receive buffers go on where the frame has ended.
        bytes.extend([0xbb; 50]);
        // SAFETY: the iovecs describe parts of `bytes`.
        unsafe { capture.record(direction, &iovecs(&mut bytes, piece), SKIP, len) };
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn temporary() -> (File, File) {
        let file = tempfile::tempfile().unwrap();
        (file.try_clone().unwrap(), file)
    }

    fn pipe() -> (io::PipeReader, File) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, OwnedFd::from(writer).into())
    }

    /// The packets of a file that is complete, and its statistics: received and dropped.
    fn packets(file: &[u8]) -> (Vec<Packet>, [u64; 2]) {
        let mut blocks = parse(file);
        let Some(Block::Statistics(statistics)) = blocks.pop() else {
            panic!("no statistics at the end");
        };
        let [(4, received), (5, dropped)] = &statistics[..] else {
            panic!("{statistics:?}");
        };
        let counts = [received, dropped].map(|n| u64::from_le_bytes(n[..].try_into().unwrap()));
        let mut blocks = blocks.into_iter();
        assert!(matches!(blocks.next(), Some(Block::Section(_))));
        assert!(matches!(blocks.next(), Some(Block::Interface(_))));
        let packets = blocks.map(|block| match block {
            Block::Packet(packet) => packet,
            block => panic!("{block:?}"),
        });
        (packets.collect(), counts)
    }

    fn wait_until(what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < deadline, "{what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn frames_are_in_the_file_in_order() {
        let (view, file) = temporary();
        let before = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
        let capture = Capture::start(file, "net0").unwrap();
        for n in 0..200 {
            let direction = [Direction::Received, Direction::Sent][n % 2];
            record(&capture, direction, &vec![n as u8; n], 1_000);
        }
        drop(capture);
        let (packets, counts) = packets(&contents(&view));
        assert_eq!((packets.len(), counts), (200, [200, 0]));
        for (n, packet) in packets.iter().enumerate() {
            assert_eq!(packet.frame, vec![n as u8; n]);
            assert_eq!(packet.original as usize, n);
            assert_eq!(packet.flags() as usize, 1 + n % 2);
            let age = packet.nanos.checked_sub(before);
            assert!(age.is_some_and(|age| age < 60_000_000_000), "{age:?}");
        }
    }

    #[test]
    fn frame_in_many_pieces_is_whole() {
        let (view, file) = temporary();
        let capture = Capture::start(file, "net0").unwrap();
        let frame: Vec<u8> = (0..9_000).map(|n| (n % 251) as u8).collect();
        let pieces = [1, 5, 11, 12, 13, 4_096, 100_000];
        for piece in pieces {
            record(&capture, Direction::Sent, &frame, piece);
        }
        drop(capture);
        let (packets, _) = packets(&contents(&view));
        assert_eq!(packets.len(), pieces.len());
        assert!(packets.iter().all(|packet| packet.frame == frame));
    }

    #[test]
    fn frame_that_is_too_long_is_snapped() {
        let (view, file) = temporary();
        let capture = Capture::start(file, "net0").unwrap();
        record(&capture, Direction::Received, &[7; 70_000], 4_096);
        drop(capture);
        let (packets, counts) = packets(&contents(&view));
        assert_eq!(packets[0].frame, [7; 65_550]);
        assert_eq!((packets[0].original, counts), (70_000, [1, 0]));
    }

    #[test]
    fn iovecs_shorter_than_the_frame_give_what_they_have() {
        let (view, file) = temporary();
        let capture = Capture::start(file, "net0").unwrap();
        // SAFETY: the iovecs describe an array that outlives them.
        unsafe { capture.record(Direction::Sent, &iovecs(&mut [7; 30], 10), 12, 100) };
        // SAFETY: there is no iovec.
        unsafe { capture.record(Direction::Sent, &[], 12, 5) };
        drop(capture);
        let (packets, _) = packets(&contents(&view));
        assert_eq!(
            (&packets[0].frame[..], packets[0].original),
            (&[7; 18][..], 88)
        );
        assert_eq!((&packets[1].frame[..], packets[1].original), (&[][..], 0));
    }

    #[test]
    fn live_file_shows_what_has_passed() {
        let (view, file) = temporary();
        let capture = Capture::start(file, "net0").unwrap();
        let mut expected = pcapng::start("net0").len();
        for n in 1..=5 {
            let shown = || view.metadata().unwrap().len() as usize == expected;
            wait_until("the writer flushes when idle", shown);
            assert_eq!(parse(&contents(&view)).len(), 1 + n);
            record(&capture, Direction::Sent, &[7; 61], 100);
            expected += pcapng::packet_len(61);
        }
    }

    #[test]
    fn frames_of_several_threads_stay_whole() {
        let (view, file) = temporary();
        let capture = Capture::start(file, "net0").unwrap();
        thread::scope(|scope| {
            for n in 1..=4u8 {
                let capture = &capture;
                scope.spawn(move || {
                    for len in 0..500 {
                        record(capture, Direction::Received, &vec![n; 60 + len], 100);
                    }
                });
            }
        });
        drop(capture);
        let (packets, counts) = packets(&contents(&view));
        assert_eq!((packets.len(), counts), (2_000, [2_000, 0]));
        assert!(packets.is_sorted_by_key(|packet| packet.nanos));
        for n in 1..=4 {
            let of_one = packets.iter().filter(|packet| packet.frame[0] == n);
            let lens = of_one.map(|packet| {
                assert!(packet.frame.iter().all(|&byte| byte == n));
                packet.frame.len()
            });
            assert!(lens.eq(60..560));
        }
    }

    #[test]
    fn reader_that_sleeps_costs_frames_but_no_time() {
        let (mut reader, file) = pipe();
        let capture = Capture::start(file, "net0").unwrap();
        let start = Instant::now();
        for _ in 0..200 {
            record(&capture, Direction::Sent, &[7; 60_000], 4_096);
        }
        let (took, dropped) = (start.elapsed(), capture.dropped());
        assert!(took < Duration::from_secs(1), "{took:?}");
        // 4 MiB wait, and a pipe has 64 KiB.
        assert!((129..=132).contains(&dropped), "{dropped}");

        let start = Instant::now();
        drop(capture);
        let took = start.elapsed();
        assert!(PATIENCE <= took && took < 3 * PATIENCE, "{took:?}");

        // The writer that was not waited for finishes when the reader wakes up.
        let mut file = Vec::new();
        reader.read_to_end(&mut file).unwrap();
        let (packets, counts) = packets(&file);
        assert_eq!(
            (packets.len() as u64, counts),
            (200 - dropped, [200, dropped])
        );
    }

    #[test]
    fn reader_that_wakes_up_makes_room_again() {
        let (mut reader, file) = pipe();
        let capture = Capture::start(file, "net0").unwrap();
        while capture.dropped() == 0 {
            record(&capture, Direction::Sent, &[7; 60_000], 4_096);
        }
        let reader = thread::spawn(move || {
            let mut file = Vec::new();
            reader.read_to_end(&mut file).map(|_| file)
        });
        let room = || capture.shared.room.load(Ordering::Relaxed);
        wait_until("all has been written", || room() == MAX_WAITING);
        let dropped = capture.dropped();
        record(&capture, Direction::Sent, b"the last", 4_096);
        drop(capture);
        let (packets, counts) = packets(&reader.join().unwrap().unwrap());
        assert_eq!(packets.last().unwrap().frame, b"the last");
        assert_eq!(counts, [packets.len() as u64 + dropped, dropped]);
    }

    #[test]
    fn error_of_the_file_ends_the_capture() {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let (reader, deserted) = pipe();
        drop(reader);
        for file in [full, deserted] {
            let capture = Capture::start(file, "net0").unwrap();
            wait_until("the writer gives up", || capture.shared.lock().ended);
            let before = capture.dropped();
            for n in 1..=10 {
                record(&capture, Direction::Sent, &[7; 60], 100);
                assert_eq!(capture.dropped(), before + n);
            }
            assert!(capture.shared.lock().blocks.is_empty());
            let start = Instant::now();
            drop(capture);
            assert!(start.elapsed() < PATIENCE);
        }
    }

    #[test]
    fn reader_that_leaves_ends_the_capture_and_each_frame_is_counted() {
        let (reader, file) = pipe();
        let capture = Capture::start(file, "net0").unwrap();
        for _ in 0..20 {
            record(&capture, Direction::Sent, &[7; 60_000], 4_096);
        }
        drop(reader);
        wait_until("the writer gives up", || capture.shared.lock().ended);
        record(&capture, Direction::Sent, &[7; 60], 100);
        // Some of them may be with the reader that left.
        assert!((1..=21).contains(&capture.dropped()), "{capture:?}");
    }
}
