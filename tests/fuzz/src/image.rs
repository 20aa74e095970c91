//! A disk image that is the fuzzer's too.

use std::io;
use std::sync::Mutex;

use devices::disk::{BlockSizes, Image, SECTOR};
use devices::virtio::Segments;

/// A disk image in memory, which holds its disk to what it promises its images.
#[derive(Debug)]
pub struct MemoryImage {
    bytes: Mutex<Vec<u8>>,
    readonly: bool,
}

impl MemoryImage {
    /// Bytes of it.
    const SIZE: u64 = 64 << 10;

    /// An image that is all zeros, and must not change if it is `readonly`.
    pub fn new(readonly: bool) -> Self {
        Self {
            bytes: Mutex::new(vec![0; Self::SIZE as usize]),
            readonly,
        }
    }

    /// The range that a call is about. Each seventh sector is a bad one.
    fn range(&self, offset: u64, len: u64, writes: bool) -> io::Result<std::ops::Range<usize>> {
        assert!(!(writes && self.readonly), "the disk cannot be written");
        assert!(offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR));
        assert!(offset <= Self::SIZE && len <= Self::SIZE - offset);
        match (offset / SECTOR) % 7 {
            6 => Err(io::Error::from_raw_os_error(libc::EIO)),
            _ => Ok(offset as usize..(offset + len) as usize),
        }
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let range = self.range(offset, len, true)?;
        self.bytes.lock().expect("no holder panics")[range].fill(0);
        Ok(())
    }
}

impl Image for MemoryImage {
    fn size(&self) -> u64 {
        Self::SIZE
    }

    fn blocks(&self) -> BlockSizes {
        BlockSizes::default()
    }

    fn read(&self, offset: u64, into: Segments<'_>) -> io::Result<()> {
        let mut at = self.range(offset, into.bytes() as u64, false)?.start;
        let bytes = self.bytes.lock().expect("no holder panics");
        for iovec in into.iovecs() {
            let from = &bytes[at..at + iovec.iov_len];
            // SAFETY: the caller vouches for the iovecs, and `from` is as long as this one.
            unsafe {
                std::ptr::copy_nonoverlapping(from.as_ptr(), iovec.iov_base.cast(), from.len())
            };
            at += iovec.iov_len;
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: Segments<'_>) -> io::Result<()> {
        let mut at = self.range(offset, from.bytes() as u64, true)?.start;
        let mut bytes = self.bytes.lock().expect("no holder panics");
        for iovec in from.iovecs() {
            let to = &mut bytes[at..at + iovec.iov_len];
            // SAFETY: the caller vouches for the iovecs, and `to` is as long as this one.
            unsafe {
                std::ptr::copy_nonoverlapping(iovec.iov_base.cast(), to.as_mut_ptr(), to.len())
            };
            at += iovec.iov_len;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        self.zero(offset, len)
    }

    fn grow(&self, _size: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
