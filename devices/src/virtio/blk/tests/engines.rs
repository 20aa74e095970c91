//! Whoever carries requests out, and past the page cache or not: the image holds what was written,
//! and nothing is lost.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;

use super::device::{Guest, eventually, options};
use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::blk::{BlkOptions, IoChoice};

/// Requests that the ring of the tests holds at once.
const DEPTH: u16 = 8;
/// Bytes of each.
const LEN: usize = 4096;

/// A guest for each way to the host that there is here, and its image.
fn guests() -> Vec<(String, Guest, NamedTempFile)> {
    let choices = [IoChoice::Auto, IoChoice::Uring, IoChoice::Threads];
    let ways = choices.map(|io| [(io, 0), (io, libc::O_DIRECT)]);
    let guest = |(io, flags)| {
        let file = NamedTempFile::new().unwrap();
        let content = bytes(SIZE as usize);
        file.as_file().write_all_at(&content, 0).unwrap();
        let mut open = OpenOptions::new();
        open.read(true).write(true).custom_flags(flags);
        // Neither every file system has O_DIRECT, nor every container io_uring.
        let raw = RawFile::new(open.open(file.path()).ok()?).unwrap();
        let options = BlkOptions { io, ..options(1) };
        let mut guest = Guest::new(Storage::Raw(Arc::new(raw)), options).ok()?;
        guest.start(None);
        Some((format!("{io:?} {flags:#x}"), guest, file))
    };
    ways.into_iter().flatten().filter_map(guest).collect()
}

/// Where the request of this number has its header, its data, and its status: the data is aligned as
/// O_DIRECT wants it, or not.
fn places(n: u16, skip: u64) -> (u64, u64, u64) {
    let n = u64::from(n);
    (HEADER + 16 * n, 0x1_0000 + 0x2000 * n + skip, STATUS + n)
}

/// Makes a transfer of the block of this number available, and does not notify.
fn offer(guest: &mut Guest, n: u16, kind: u32, block: u64, skip: u64) {
    let (at, data, status) = places(n, skip);
    let driver = &mut guest.drivers[0];
    driver.write(at, &header(kind, block * LEN as u64 / SECTOR));
    driver.write(status, &[0xff]);
    // Three descriptors for a request would leave room for too few.
    let table = 0x3_0000 + 0x100 * u64::from(n);
    let is_read = u16::from(kind == IN) * WRITE;
    let chain = [(at, 16, 0), (data, LEN as u32, is_read), (status, 1, WRITE)];
    driver.offer_indirect(n, table, &chain);
}

fn statuses(guest: &Guest) -> Vec<u8> {
    guest.drivers[0].read(STATUS, DEPTH.into())
}

#[test]
fn requests_under_way_together_do_what_they_say() {
    for (way, mut guest, file) in guests() {
        let mut expected = bytes(SIZE as usize);
        for round in 0..20_u64 {
            // Buffers that are not as O_DIRECT wants them are copied.
            let skip = if round % 4 == 3 { 7 } else { 0 };
            let block = |n: u16| (u64::from(n) * 5 + round) % (SIZE / LEN as u64);
            for n in 0..DEPTH {
                let content = vec![(round as u8) ^ (n as u8) << 4; LEN];
                guest.drivers[0].write(places(n, skip).1, &content);
                expected[block(n) as usize * LEN..][..LEN].copy_from_slice(&content);
                offer(&mut guest, n, OUT, block(n), skip);
            }
            guest.finish(DEPTH);
            assert_eq!(statuses(&guest), [OK; 8], "{way}");
            for n in 0..DEPTH {
                offer(&mut guest, n, IN, block(n), skip);
            }
            guest.finish(DEPTH);
            assert_eq!(statuses(&guest), [OK; 8], "{way}");
            for n in 0..DEPTH {
                let got = guest.drivers[0].read(places(n, skip).1, LEN);
                assert!(got == expected[block(n) as usize * LEN..][..LEN], "{way}");
            }
        }
        assert!(std::fs::read(file.path()).unwrap() == expected, "{way}");
        guest.device.reset();
        let counters = guest.handle.counters();
        assert_eq!((counters.reads, counters.writes), (160, 160), "{way}");
    }
}

#[test]
fn kinds_that_move_nothing_are_carried_out_too() {
    for (way, mut guest, file) in guests() {
        // Without a write cache, too.
        for writeback in [1, 0] {
            guest.device.write_config(32, &[writeback]);
            for (n, kind) in [OUT, FLUSH, IN, FLUSH].into_iter().enumerate() {
                offer(&mut guest, n as u16, kind, 1, 0);
            }
            guest.finish(4);
            assert_eq!(statuses(&guest)[..4], [OK; 4], "{way}");
            let (at, data, status) = places(5, 0);
            let driver = &mut guest.drivers[0];
            for kind in [WRITE_ZEROES, DISCARD] {
                driver.write(at, &header(kind, 0));
                driver.write(data, &range((8, 8, 0)));
                driver.write(status, &[0xff]);
                driver.offer_chain(0, &[(at, 16, 0), (data, 16, 0), (status, 1, WRITE)]);
                guest.kicks[0].write(1).unwrap();
                eventually("a used chain", || driver.take_used() == [(0, 1)]);
                assert_eq!(driver.read(status, 1), [OK], "{way}");
            }
            let content = std::fs::read(file.path()).unwrap();
            assert_eq!(content[LEN..2 * LEN], [0; LEN], "{way}");
        }
    }
}

#[test]
fn pause_finds_each_request_done_or_still_to_do() {
    for (way, mut guest, file) in guests() {
        for round in 0..30_u64 {
            let block = |n: u16| (u64::from(n) + round) % (SIZE / LEN as u64);
            for n in 0..DEPTH {
                let content = vec![round as u8; LEN];
                guest.drivers[0].write(places(n, 0).1, &content);
                offer(&mut guest, n, OUT, block(n), 0);
            }
            guest.kicks[0].write(1).unwrap();
            let positions = guest.device.pause();
            let popped = positions[0].unwrap().wrapping_sub(DEPTH * round as u16);
            let done = guest.drivers[0]
                .used_index()
                .wrapping_sub(DEPTH * round as u16);
            assert_eq!(popped, done, "{way}: what was taken is done");
            guest.start(Some(&positions));
            guest.finish(DEPTH);
            assert_eq!(statuses(&guest), [OK; 8], "{way}");
            let content = std::fs::read(file.path()).unwrap();
            for n in 0..DEPTH {
                let at = block(n) as usize * LEN;
                assert!(content[at..at + LEN] == [round as u8; LEN], "{way}");
            }
        }
        let writes = guest.handle.counters().writes;
        guest.device.reset();
        assert!(
            writes <= 240 && guest.handle.counters().writes == 240,
            "{way}"
        );
    }
}

#[test]
fn error_of_the_host_reaches_the_driver_on_every_way() {
    for (way, mut guest, file) in guests() {
        file.as_file().set_len(SIZE / 2).unwrap();
        offer(&mut guest, 0, IN, SIZE / LEN as u64 - 1, 0);
        offer(&mut guest, 1, IN, 0, 0);
        guest.finish(2);
        assert_eq!(statuses(&guest)[..2], [IOERR, OK], "{way}");
    }
}

#[test]
fn device_ends_with_requests_under_way() {
    for (_, mut guest, _file) in guests() {
        for n in 0..DEPTH {
            offer(&mut guest, n, IN, n.into(), 0);
        }
        guest.kicks[0].write(1).unwrap();
    }
}
