//! The files under imago: an image's own and those of its backing files.
//!
//! imago writes an image's tables in an order in which a crash of the monitor does little harm, but
//! has the disk's cache between them, which a power cut empties in any order. And it enters a new
//! table where the image has its pointers before it has written the table's reference count. So the
//! image's own file is written through [`Order`].

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use imago::Storage;
use imago::io_buffers::{IoBuffer, IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;

use super::header::Header;
use super::order::{Kind, Order};
use crate::disk::raw::advance;
use crate::lock;

/// Of an image, or of a file that is only read.
#[derive(Clone)]
pub(super) struct HostFile(Arc<Inner>);

struct Inner {
    file: File,
    /// What offsets, lengths and buffers are multiples of.
    alignment: usize,
    /// For an image that is written.
    order: Option<Mutex<Order>>,
    helper: CommonStorageHelper,
    #[cfg(test)]
    log: Mutex<Vec<Logged>>,
    /// Writes until the file system is full, and how many it refuses then.
    #[cfg(test)]
    full: Mutex<(u64, u64)>,
}

/// What went to the disk, for tests that cut its power.
#[cfg(test)]
#[derive(Clone, Debug)]
pub(super) enum Logged {
    Write(u64, Vec<u8>),
    Punch(u64, u64),
    Sync,
}

impl HostFile {
    /// A file, opened as it is to be used: with O_DIRECT if `alignment` is more than 1.
    pub fn new(file: File, alignment: usize, order: Option<Order>) -> Self {
        Self(Arc::new(Inner {
            file,
            alignment,
            order: order.map(Mutex::new),
            helper: CommonStorageHelper::default(),
            #[cfg(test)]
            log: Mutex::default(),
            #[cfg(test)]
            full: Mutex::new((u64::MAX, 0)),
        }))
    }

    /// Whether there are pointers that wait for what they point to.
    pub fn has_pending(&self) -> bool {
        let order = self.0.order.as_ref();
        order.is_some_and(|order| lock(order).has_pending())
    }

    /// Writes the pointers that waited. What they point to, and its reference counts, has to be
    /// written by now.
    pub fn write_pending(&self) -> io::Result<()> {
        let Some(order) = &self.0.order else {
            return Ok(());
        };
        let mut order = lock(order);
        self.write_reftable_entries(&mut order)?;
        self.barrier(&mut order)?;
        let entries = order.l1_entries();
        self.write_entries(entries)?;
        entries.clear();
        order.wrote(Kind::Other);
        Ok(())
    }

    /// What was written survives a power cut of the host.
    pub fn sync_now(&self) -> io::Result<()> {
        #[cfg(test)]
        lock(&self.0.log).push(Logged::Sync);
        self.0.file.sync_data()?;
        if let Some(order) = &self.0.order {
            lock(order).synced();
        }
        Ok(())
    }

    /// Gives the space of a range back to the host, as far as its file system can. It reads as
    /// zeros then; false if it cannot.
    pub fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        let (Ok(at), Ok(bytes)) = (libc::off_t::try_from(offset), libc::off_t::try_from(len))
        else {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        };
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: fallocate takes plain numbers besides an open descriptor, which `file` owns.
        if unsafe { libc::fallocate(self.0.file.as_raw_fd(), mode, at, bytes) } != 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) => Ok(false),
                _ => Err(error),
            };
        }
        #[cfg(test)]
        lock(&self.0.log).push(Logged::Punch(offset, len));
        if let Some(order) = &self.0.order {
            lock(order).wrote(Kind::Other);
        }
        Ok(true)
    }

    /// Writes a header that says that the disk has grown, from `old` to `new`.
    pub fn grow(&self, old: &Header, new: &Header) -> io::Result<()> {
        let added = (new.l1_entries - old.l1_entries) * 8;
        self.update(&vec![0; added as usize], old.l1_offset + old.l1_entries * 8)?;
        self.sync_now()?;
        // The size, the encryption method (none), the entries of the L1 table: in one sector.
        let fields = [new.size.to_be_bytes(), new.l1_entries.to_be_bytes()];
        self.update(fields.as_flattened(), 24)?;
        self.sync_now()?;
        if let Some(order) = &self.0.order {
            lock(order).set_header(new);
        }
        Ok(())
    }

    /// Reads bytes of our own.
    fn read_own(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let (start, mut block) = self.block(bytes.len(), offset)?;
        let skipped = (offset - start) as usize;
        bytes.copy_from_slice(&block.as_mut().into_slice()[skipped..skipped + bytes.len()]);
        Ok(())
    }

    /// Writes bytes of our own that may be any part of a block.
    fn update(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let (start, mut block) = self.block(bytes.len(), offset)?;
        let skipped = (offset - start) as usize;
        block.as_mut().into_slice()[skipped..skipped + bytes.len()].copy_from_slice(bytes);
        self.write_own(block.as_ref().into_slice(), start)
    }

    /// The whole blocks with `len` bytes at `offset` in them, and where they begin.
    fn block(&self, len: usize, offset: u64) -> io::Result<(u64, IoBuffer)> {
        let alignment = self.0.alignment;
        let start = offset - offset % alignment as u64;
        let len = (len + (offset - start) as usize).next_multiple_of(alignment);
        let mut block = IoBuffer::new(len, alignment)?;
        let mut iovecs = vec![libc::iovec {
            iov_base: block.as_mut().as_ptr().cast(),
            iov_len: len,
        }];
        self.read_iovecs(&mut iovecs, start)?;
        Ok((start, block))
    }

    fn write_own(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        self.record(offset, bytes.to_vec())?;
        self.0.file.write_all_at(bytes, offset)
    }

    fn read_iovecs(&self, left: &mut Vec<libc::iovec>, mut offset: u64) -> io::Result<()> {
        advance(left, 0);
        while !left.is_empty() {
            let at = signed(offset)?;
            let count = left.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
            // SAFETY: the iovecs describe memory that the caller's buffers lend for writing.
            let done = unsafe { libc::preadv(self.0.file.as_raw_fd(), left.as_ptr(), count, at) };
            match usize::try_from(done) {
                Ok(0) => {
                    zero(left);
                    return Ok(());
                }
                Ok(done) => {
                    advance(left, done);
                    offset += done as u64;
                }
                Err(_) => retry_if_interrupted()?,
            }
        }
        Ok(())
    }

    fn write_iovecs(&self, iovecs: &[libc::iovec], mut offset: u64) -> io::Result<()> {
        #[cfg(test)]
        self.record(offset, bytes_of(iovecs))?;
        let mut left = iovecs.to_vec();
        advance(&mut left, 0);
        while !left.is_empty() {
            let at = signed(offset)?;
            let count = left.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
            // SAFETY: the iovecs describe memory that the caller's buffers lend for reading.
            let done = unsafe { libc::pwritev(self.0.file.as_raw_fd(), left.as_ptr(), count, at) };
            match usize::try_from(done) {
                Ok(done) => {
                    advance(&mut left, done);
                    offset += done as u64;
                }
                Err(_) => retry_if_interrupted()?,
            }
        }
        Ok(())
    }

    /// A write of imago's, in its place in the order.
    fn write_ordered(&self, order: &mut Order, iovecs: &[libc::iovec], at: u64) -> io::Result<()> {
        let len = iovecs.iter().map(|iovec| iovec.iov_len).sum::<usize>() as u64;
        let kind = order.kind(at, len);
        if !order.allows(kind, len, || bytes_of(iovecs)) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        match kind {
            Kind::L1Entries | Kind::ReftableEntries => {
                order.wait(kind, at, bytes_of(iovecs));
                return Ok(());
            }
            Kind::L2Table => {
                if order.refblocks_precede() {
                    self.write_reftable_entries(order)?;
                }
                if order.before_l2_table() {
                    self.barrier(order)?;
                }
            }
            Kind::Refblock | Kind::Other if order.after_l2_table() => self.barrier(order)?,
            Kind::Header => self.barrier(order)?,
            Kind::Refblock | Kind::Other => {}
        }
        self.write_iovecs(iovecs, at)?;
        order.wrote(kind);
        if kind == Kind::Header {
            self.barrier(order)?;
            // imago moves the refcount table when it is full; entries for the old one are in the new
            // one already.
            order.find_reftable(|bytes, at| self.read_own(bytes, at))?;
        }
        Ok(())
    }

    fn write_reftable_entries(&self, order: &mut Order) -> io::Result<()> {
        if order.reftable_entries().is_empty() {
            return Ok(());
        }
        self.barrier(order)?;
        self.write_entries(order.reftable_entries())?;
        order.reftable_entries().clear();
        order.wrote(Kind::Other);
        self.barrier(order)
    }

    fn write_entries(&self, entries: &[(u64, Vec<u8>)]) -> io::Result<()> {
        for (at, bytes) in entries {
            let mut aligned = IoBuffer::new(bytes.len(), self.0.alignment)?;
            aligned.as_mut().into_slice().copy_from_slice(bytes);
            self.write_own(aligned.as_ref().into_slice(), *at)?;
        }
        Ok(())
    }

    fn barrier(&self, order: &mut Order) -> io::Result<()> {
        if order.is_synced() {
            return Ok(());
        }
        #[cfg(test)]
        lock(&self.0.log).push(Logged::Sync);
        self.0.file.sync_data()?;
        order.synced();
        Ok(())
    }

    #[cfg(test)]
    fn record(&self, offset: u64, bytes: Vec<u8>) -> io::Result<()> {
        let mut full = lock(&self.0.full);
        match *full {
            (0, 0) => {}
            (0, refused) => {
                *full = (0, refused - 1);
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            (left, refused) => *full = (left - 1, refused),
        }
        lock(&self.0.log).push(Logged::Write(offset, bytes));
        Ok(())
    }

    /// Refuses writes: after how many, and how many.
    #[cfg(test)]
    pub fn fill(&self, after: u64, refused: u64) {
        *lock(&self.0.full) = (after, refused);
    }

    #[cfg(test)]
    pub fn take_log(&self) -> Vec<Logged> {
        std::mem::take(&mut lock(&self.0.log))
    }
}

impl Storage for HostFile {
    fn mem_align(&self) -> usize {
        self.0.alignment
    }

    fn req_align(&self) -> usize {
        self.0.alignment
    }

    fn size(&self) -> io::Result<u64> {
        crate::disk::open::length(&self.0.file)
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: the iovecs are used while `bufv` lives, and only to fill it.
        let mut iovecs = unsafe { bufv.as_iovec() }.to_vec();
        self.read_iovecs(&mut iovecs, offset)
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: the iovecs are used while `bufv` lives, and only read.
        let iovecs = unsafe { bufv.as_iovec() };
        match &self.0.order {
            Some(order) => self.write_ordered(&mut lock(order), iovecs, offset),
            None => Err(io::Error::from_raw_os_error(libc::EROFS)),
        }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.punch(offset, length)? {
            return Ok(());
        }
        // SAFETY: as for this function.
        unsafe { self.pure_write_allocated_zeroes(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        // Nothing is kept here but pointers, which wait for more than that.
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_now()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.0.helper
    }
}

impl fmt::Debug for HostFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HostFile").field(&self.0.file).finish()
    }
}

impl fmt::Display for HostFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

fn signed(number: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(number).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

fn retry_if_interrupted() -> io::Result<()> {
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        error => Err(error),
    }
}

/// What follows the end of a file reads as zeros.
fn zero(iovecs: &[libc::iovec]) {
    for iovec in iovecs {
        // SAFETY: the iovec describes memory that the caller's buffer lends for writing.
        unsafe { iovec.iov_base.cast::<u8>().write_bytes(0, iovec.iov_len) };
    }
}

/// A copy of what the iovecs describe.
fn bytes_of(iovecs: &[libc::iovec]) -> Vec<u8> {
    let len = iovecs.iter().map(|iovec| iovec.iov_len).sum();
    let mut bytes = vec![0; len];
    // SAFETY: the iovecs describe memory that the caller's buffers lend for reading; `bytes` is new.
    unsafe { crate::virtio::iovec::gather(iovecs, 0, &mut bytes) };
    bytes
}
