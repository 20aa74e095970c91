//! Requests through a ring in memory to images of the tests' own.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk as spec;

use super::counters::BlkCounters;
use super::disk::Disk;
use super::queue::{BlkQueue, Stop};
use crate::disk::{BlockSizes, Image, RawFile, SECTOR, Storage};
use crate::events::DeviceEvent;
use crate::events::tests::record;
use crate::virtio::Segments;
use crate::virtio::iovec::{gather, scatter};
use crate::virtio::rate::RateLimit;
use crate::virtio::tests::{Buffer, Driver, WRITE};

mod device;
mod engines;
mod hostile;
mod requests;

/// Bytes of the images.
const SIZE: u64 = 64 << 10;
const SERIAL: [u8; 20] = *b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
const UNLIMITED: RateLimit = RateLimit {
    bits: None,
    frames: None,
    burst: Duration::ZERO,
};

const OK: u8 = spec::VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = spec::VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = spec::VIRTIO_BLK_S_UNSUPP as u8;

const IN: u32 = spec::VIRTIO_BLK_T_IN;
const OUT: u32 = spec::VIRTIO_BLK_T_OUT;
const FLUSH: u32 = spec::VIRTIO_BLK_T_FLUSH;
const GET_ID: u32 = spec::VIRTIO_BLK_T_GET_ID;
const DISCARD: u32 = spec::VIRTIO_BLK_T_DISCARD;
const WRITE_ZEROES: u32 = spec::VIRTIO_BLK_T_WRITE_ZEROES;

// Where the driver of the tests keeps its buffers.
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x8000;
const STATUS: u64 = 0x5000;

/// Bytes that tell where they stand.
fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n / 3 % 251) as u8).collect()
}

/// An image in memory that records what is asked of it, and fails when it has to.
#[derive(Debug)]
struct Fake {
    bytes: Mutex<Vec<u8>>,
    size: AtomicU64,
    calls: Mutex<Vec<String>>,
    /// Errno of every call, 0 for none.
    errno: AtomicI32,
}

impl Fake {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes(SIZE as usize)),
            size: AtomicU64::new(SIZE),
            calls: Mutex::default(),
            errno: AtomicI32::new(0),
        })
    }

    fn record(&self, call: String) -> io::Result<()> {
        self.calls.lock().unwrap().push(call);
        match self.errno.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// What has been asked of it since the last call.
    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl Image for Fake {
    fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    fn blocks(&self) -> BlockSizes {
        BlockSizes::default()
    }

    fn read(&self, offset: u64, into: Segments<'_>) -> io::Result<()> {
        self.record(format!("read {offset} {}", into.bytes()))?;
        let bytes = self.bytes.lock().unwrap();
        // SAFETY: the caller vouches for the segments.
        unsafe { scatter(into.iovecs(), 0, &bytes[offset as usize..][..into.bytes()]) };
        Ok(())
    }

    fn write(&self, offset: u64, from: Segments<'_>) -> io::Result<()> {
        self.record(format!("write {offset} {}", from.bytes()))?;
        let mut bytes = self.bytes.lock().unwrap();
        let part = &mut bytes[offset as usize..][..from.bytes()];
        // SAFETY: the caller vouches for the segments.
        unsafe { gather(from.iovecs(), 0, part) };
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.record("flush".into())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.record(format!("discard {offset} {len}"))
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.record(format!("zero {offset} {len} {may_unmap}"))
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        self.record(format!("grow {size}"))?;
        self.size.store(size, Ordering::SeqCst);
        Ok(())
    }
}

/// A header as the driver lays it out.
fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    header
}

/// A range of a discard: sector, count, flags.
fn range((sector, count, flags): (u64, u32, u32)) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(count.to_le_bytes());
    range.extend(flags.to_le_bytes());
    range
}

/// A queue without its device.
struct Bench {
    driver: Driver,
    disk: Arc<Disk>,
    queue: BlkQueue,
    events: Arc<Mutex<Vec<DeviceEvent>>>,
}

impl Bench {
    fn with(storage: Storage, readonly: bool, limit: RateLimit) -> Self {
        let disk = Disk::new("disk0".into(), storage, readonly, SERIAL, limit, true);
        let (sink, events) = record();
        let disk = Arc::new(disk.with_events(sink));
        let driver = Driver::new();
        Self {
            queue: BlkQueue::new(driver.queue(false), Arc::clone(&disk)),
            driver,
            disk,
            events,
        }
    }

    fn fake() -> (Self, Arc<Fake>) {
        let fake = Fake::new();
        let storage = Storage::Image(fake.clone());
        (Self::with(storage, false, UNLIMITED), fake)
    }

    /// On a file, which holds [`bytes`].
    fn raw() -> (Self, NamedTempFile) {
        let file = NamedTempFile::new().unwrap();
        let content = bytes(SIZE as usize);
        file.as_file().write_all_at(&content, 0).unwrap();
        let raw = RawFile::new(file.reopen().unwrap()).unwrap();
        let storage = Storage::Raw(Arc::new(raw));
        (Self::with(storage, false, UNLIMITED), file)
    }

    /// Makes a chain of `buffers` available and has it handled. Returns the length that came back.
    fn offer(&mut self, buffers: &[Buffer]) -> u32 {
        self.driver.offer_chain(0, buffers);
        assert_eq!(self.queue.handle(10), (Stop::Idle, true));
        let used = self.driver.take_used();
        let &[(0, len)] = &used[..] else {
            panic!("one chain was offered: {used:?}");
        };
        len
    }

    /// Has a request handled that sends `sent` and wants `wanted` bytes at [`DATA`], and returns its
    /// status.
    fn request(&mut self, kind: u32, sector: u64, sent: &[u8], wanted: u32) -> u8 {
        self.driver.write(HEADER, &header(kind, sector));
        self.driver.write(DATA, sent);
        self.driver.write(STATUS, &[0xff]);
        let mut buffers = vec![(HEADER, 16, 0)];
        if !sent.is_empty() {
            buffers.push((DATA, sent.len() as u32, 0));
        }
        if wanted > 0 {
            buffers.push((DATA, wanted, WRITE));
        }
        buffers.push((STATUS, 1, WRITE));
        assert_eq!(self.offer(&buffers), wanted + 1);
        self.driver.read(STATUS, 1)[0]
    }

    fn counters(&self) -> BlkCounters {
        self.queue.counters
    }
}
