//! Each kind of request does what it says, or fails with the status that fits.

use std::os::fd::RawFd;

use super::super::engine::Engine;
use super::super::pending::Pending;
use super::super::request::Parts;
use super::*;
use crate::events::IoError;
use crate::virtio::queue::Buffers;

#[test]
fn file_is_read_and_written_where_the_driver_says() {
    let (mut bench, file) = Bench::raw();
    assert_eq!(bench.request(IN, 3, &[], 1024), OK);
    assert_eq!(bench.driver.read(DATA, 1024), bytes(2560)[1536..]);
    assert_eq!(bench.request(OUT, 4, &[7; 512], 0), OK);
    assert_eq!(bench.request(FLUSH, 0, &[], 0), OK);
    let mut expected = bytes(SIZE as usize);
    expected[2048..2560].fill(7);
    assert!(std::fs::read(file.path()).unwrap() == expected);
    assert_eq!(bench.request(IN, SIZE / SECTOR - 1, &[], 512), OK);
    assert_eq!(
        bench.driver.read(DATA, 512),
        expected[SIZE as usize - 512..]
    );
    let counters = bench.counters();
    assert_eq!((counters.reads, counters.read_bytes), (2, 1536));
    assert_eq!((counters.writes, counters.written_bytes), (1, 512));
    assert_eq!((counters.flushes, counters.errors), (1, 0));
}

/// A guest cannot have more read or written at once than its driver is allowed: a pause waits for it.
#[test]
fn transfer_beyond_the_limits_of_a_request_is_refused() {
    let image = Fake::new();
    image.size.store(1 << 40, Ordering::SeqCst);
    let mut header = header(IN, 0);
    // None of these is looked into, only counted.
    let piece = |iov_len| libc::iovec {
        iov_base: std::ptr::dangling_mut::<u8>().cast(),
        iov_len,
    };
    for (pieces, len, fits) in [
        (254, 1 << 18, true),
        (255, 1 << 18, false),
        (2, 1 << 32, false),
    ] {
        let mut buffers = Buffers::default();
        buffers.readable.push(libc::iovec {
            iov_base: header.as_mut_ptr().cast(),
            iov_len: header.len(),
        });
        buffers.writable.extend((0..pieces).map(|_| piece(len)));
        buffers.writable.push(piece(1));
        let parts = Parts::split(&mut buffers).unwrap();
        let request = parts.request(&buffers, image.as_ref(), false);
        assert_eq!(request.is_ok(), fits, "{pieces} of {len}: {request:?}");
    }
}

#[test]
fn buffers_may_be_cut_anywhere() {
    let (mut bench, _file) = Bench::raw();
    bench.driver.write(HEADER, &header(IN, 1));
    // The header in three pieces, the data in two, of which the second ends with the status.
    let read = [
        (HEADER, 3, 0),
        (HEADER + 3, 12, 0),
        (HEADER + 15, 1, 0),
        (DATA, 100, WRITE),
        (DATA + 100, 413, WRITE),
    ];
    assert_eq!(bench.offer(&read), 513);
    assert_eq!(bench.driver.read(DATA, 512), bytes(1024)[512..]);
    assert_eq!(bench.driver.read(DATA + 512, 1), [OK]);
    // Header and data in one.
    let mut sent = header(OUT, 2);
    sent.extend([9; 512]);
    bench.driver.write(HEADER, &sent);
    assert_eq!(bench.offer(&[(HEADER, 528, 0), (STATUS, 1, WRITE)]), 1);
    assert_eq!(bench.request(IN, 2, &[], 512), OK);
    assert_eq!(bench.driver.read(DATA, 512), [9; 512]);
}

#[test]
fn serial_is_told_as_far_as_there_is_room() {
    let (mut bench, fake) = Bench::fake();
    for room in [20, 4, 30, 0] {
        bench.driver.write(DATA, &[0xee; 30]);
        bench.driver.write(HEADER, &header(GET_ID, 0));
        let buffers = [(HEADER, 16, 0), (DATA, room, WRITE), (STATUS, 1, WRITE)];
        bench.offer(&buffers);
        let mut expected = [0xee; 30];
        let told = room.min(20) as usize;
        expected[..told].copy_from_slice(&SERIAL[..told]);
        assert_eq!(bench.driver.read(DATA, 30), expected);
        assert_eq!(bench.driver.read(STATUS, 1), [OK]);
    }
    assert_eq!(fake.calls(), [""; 0]);
}

#[test]
fn discards_and_zeros_reach_the_image() {
    let (mut bench, fake) = Bench::fake();
    let ranges = [(0, 8, 0), (16, 1, 0), (4, 0, 0)].map(range).concat();
    assert_eq!(bench.request(DISCARD, 77, &ranges, 0), OK);
    assert_eq!(fake.calls(), ["discard 0 4096", "discard 8192 512"]);
    for (flags, may_unmap) in [(0, false), (1, true)] {
        let zeros = range((1, 2, flags));
        assert_eq!(bench.request(WRITE_ZEROES, 0, &zeros, 0), OK);
        assert_eq!(fake.calls(), [format!("zero 512 1024 {may_unmap}")]);
    }
    assert_eq!(bench.counters().discards, 3);
}

#[test]
fn discards_that_no_disk_could_carry_out_are_refused_whole() {
    let last = SIZE / SECTOR;
    let good = (0, 1, 0);
    for (kind, ranges, status) in [
        (DISCARD, vec![good, (last, 1, 0)], IOERR),
        (DISCARD, vec![good, (u64::MAX, 1, 0)], IOERR),
        (DISCARD, vec![good, (u64::MAX / 512, u32::MAX, 0)], IOERR),
        (DISCARD, vec![good, (0, u32::MAX, 0)], IOERR),
        (DISCARD, vec![good, (0, 1, 1)], UNSUPP),
        (DISCARD, vec![good; 17], IOERR),
        (DISCARD, vec![good; 300], IOERR),
        (WRITE_ZEROES, vec![good; 2], IOERR),
        (WRITE_ZEROES, vec![(0, 1, 2)], UNSUPP),
        (WRITE_ZEROES, vec![(0, 1, u32::MAX)], UNSUPP),
        (WRITE_ZEROES, vec![(last - 1, 2, 0)], IOERR),
    ] {
        let (mut bench, fake) = Bench::fake();
        let sent: Vec<u8> = ranges.into_iter().flat_map(range).collect();
        assert_eq!(bench.request(kind, 0, &sent, 0), status, "{sent:?}");
        assert_eq!(bench.request(kind, 0, &sent[..15], 0), IOERR);
        assert_eq!(bench.request(kind, 0, &[], 0), IOERR);
        assert_eq!(fake.calls(), [""; 0]);
        assert_eq!(bench.counters().refused, 3);
    }
}

#[test]
fn what_lies_past_the_end_or_between_sectors_is_refused() {
    let last = SIZE / SECTOR;
    for (sector, len) in [
        (last, 512),
        (last - 1, 1024),
        (u64::MAX, 512),
        (1 << 55, 512),
        (u64::MAX / 512, 1024),
        (0, 511),
        (0, 513),
    ] {
        let (mut bench, fake) = Bench::fake();
        assert_eq!(bench.request(IN, sector, &[], len), IOERR, "{sector} {len}");
        let sent = vec![1; len as usize];
        assert_eq!(bench.request(OUT, sector, &sent, 0), IOERR);
        assert_eq!(fake.calls(), [""; 0]);
        assert_eq!(bench.request(IN, 0, &[], 512), OK);
    }
}

#[test]
fn unknown_kinds_are_unsupported() {
    for kind in [2, 3, 14, 15, 24, 0x100, u32::MAX] {
        let (mut bench, fake) = Bench::fake();
        assert_eq!(bench.request(kind, 0, &[], 512), UNSUPP);
        assert_eq!(fake.calls(), [""; 0]);
    }
}

#[test]
fn readonly_disk_refuses_whatever_writes() {
    let fake = Fake::new();
    let mut bench = Bench::with(Storage::Image(fake.clone()), true, UNLIMITED);
    let zeros = range((0, 1, 0));
    assert_eq!(bench.request(OUT, 0, &[1; 512], 0), IOERR);
    assert_eq!(bench.request(DISCARD, 0, &zeros, 0), IOERR);
    assert_eq!(bench.request(WRITE_ZEROES, 0, &zeros, 0), IOERR);
    assert_eq!(fake.calls(), [""; 0]);
    assert_eq!(bench.request(IN, 0, &[], 512), OK);
    assert_eq!(bench.request(FLUSH, 0, &[], 0), OK);
}

#[test]
fn without_a_write_cache_nothing_completes_before_it_is_durable() {
    let (mut bench, fake) = Bench::fake();
    let zeros = range((0, 1, 0));
    for (writeback, flushes) in [(false, 1), (true, 0)] {
        bench.disk.set_writeback(writeback);
        for (kind, sent) in [
            (OUT, &[1; 512][..]),
            (DISCARD, &zeros),
            (WRITE_ZEROES, &zeros),
        ] {
            assert_eq!(bench.request(kind, 0, sent, 0), OK);
            let calls = fake.calls();
            assert_eq!(calls[1..], vec!["flush"; flushes], "{kind}");
        }
        assert_eq!(bench.request(IN, 0, &[], 512), OK);
        assert_eq!(fake.calls(), ["read 0 512"]);
    }
    let (mut bench, _file) = Bench::raw();
    bench.disk.set_writeback(false);
    assert_eq!(bench.request(OUT, 0, &[1; 512], 0), OK);
}

/// Has written what it gets, and says so when it is asked the second time.
#[derive(Debug, Default)]
struct Slow {
    pending: Option<Pending>,
    asked: u32,
}

impl Engine for Slow {
    fn start(&mut self, pending: Pending) -> Option<Pending> {
        self.pending.replace(pending)
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn completed(&mut self) -> Option<(Pending, io::Result<()>)> {
        let pending = self.pending.take()?;
        self.asked += 1;
        if self.asked == 1 {
            self.pending = Some(pending);
            return None;
        }
        Some((pending, Ok(())))
    }

    fn under_way(&self) -> usize {
        self.pending.iter().count()
    }

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn event(&self) -> RawFd {
        -1
    }
}

#[test]
fn write_that_was_under_way_when_the_write_cache_went_off_is_durable_too() {
    for (writeback, calls) in [(true, &[][..]), (false, &["flush"])] {
        let (bench, fake) = Bench::fake();
        let Bench {
            mut driver,
            disk,
            queue,
            ..
        } = bench;
        let mut queue = queue.with_engine(Some(Box::new(Slow::default())));
        driver.write(HEADER, &header(OUT, 0));
        driver.offer_chain(0, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
        queue.handle(10);
        assert_eq!(driver.take_used(), []);
        disk.set_writeback(writeback);
        queue.handle(10);
        assert_eq!(driver.take_used(), [(0, 1)]);
        assert_eq!(fake.calls(), calls);
    }
}

#[test]
fn error_of_the_host_reaches_the_driver_and_the_disk_lives_on() {
    let (mut bench, fake) = Bench::fake();
    fake.errno.store(libc::ENOSPC, Ordering::SeqCst);
    let zeros = range((0, 1, 0));
    assert_eq!(bench.request(IN, 0, &[], 512), IOERR);
    assert_eq!(bench.request(OUT, 0, &[1; 512], 0), IOERR);
    assert_eq!(bench.request(FLUSH, 0, &[], 0), IOERR);
    assert_eq!(bench.request(DISCARD, 0, &zeros, 0), IOERR);
    assert_eq!(bench.request(WRITE_ZEROES, 0, &zeros, 0), IOERR);
    assert_eq!(bench.counters().errors, 5);
    let seen = std::mem::take(&mut *bench.events.lock().unwrap());
    assert_eq!(seen.len(), 5);
    let error = |is_write, reason: &str| {
        DeviceEvent::IoError(IoError {
            is_write,
            no_space: true,
            reason: format!("{reason}: No space left on device (os error 28)"),
        })
    };
    assert_eq!(seen[0], error(false, "cannot read at 0"));
    assert_eq!(seen[2], error(true, "cannot flush"));
    for _ in 0..1000 {
        bench.request(IN, 0, &[], 512);
    }
    let seen = bench.events.lock().unwrap().len();
    assert!(seen < 1000 / 2, "{seen}");
    fake.errno.store(0, Ordering::SeqCst);
    assert_eq!(bench.request(OUT, 0, &[1; 512], 0), OK);
}

#[test]
fn rate_limit_counts_requests_and_what_they_move() {
    // A request is paid for when it has passed: the first leaves a debt of minutes.
    for (bits, frames, passed) in [(Some(8), None, 1), (None, Some(0), 0)] {
        let limit = RateLimit {
            bits,
            frames,
            ..UNLIMITED
        };
        let mut bench = Bench::with(Storage::Image(Fake::new()), false, limit);
        bench.driver.write(HEADER, &header(IN, 0));
        for _ in 0..5 {
            let buffers = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
            bench.driver.offer_chain(0, &buffers);
        }
        let (stop, _) = bench.queue.handle(10);
        assert!(matches!(stop, Stop::Limited(_)), "{stop:?}");
        assert_eq!(bench.driver.take_used().len(), passed);
        assert_eq!(bench.counters().limited, 1);
    }
}
