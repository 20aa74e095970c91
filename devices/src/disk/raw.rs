//! Raw images: files and block devices whose bytes are the disk's.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::direct::{Alignment, Bounce};
use super::{BlockSizes, Image, SECTOR};
use crate::virtio::Segments;
use crate::virtio::iovec::{gather, scatter};

// Not in the libc crate (linux/fs.h). All of them are on whole devices or ranges in bytes.
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKZEROOUT: libc::Ioctl = 0x127f;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;

/// An open file or block device.
///
/// A host whose file system cannot give space back, or zero a range by itself, is helped out: the
/// discard is left, zeros are written.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    size: AtomicU64,
    blocks: BlockSizes,
    is_device: bool,
    /// What O_DIRECT asks of buffers; none where the page cache is between.
    direct: Option<Alignment>,
    /// The file system knows no read that does not wait (tmpfs).
    waits_always: AtomicBool,
}

impl RawFile {
    /// The image in `file`, opened as it is to be used: with O_DIRECT or without.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for what is neither a regular file nor a block device, and the host's.
    pub fn new(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let is_device = metadata.file_type().is_block_device();
        if !is_device && !metadata.is_file() {
            let text = "neither a regular file nor a block device";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let mut blocks = BlockSizes::default();
        if is_device {
            blocks.logical = device_number::<u32>(&file, libc::BLKSSZGET)?;
            blocks.physical = device_number(&file, libc::BLKPBSZGET)?;
        }
        let direct = Alignment::of(&file, blocks.logical)?;
        if let Some(alignment) = direct {
            blocks.logical = blocks.logical.max(alignment.len as u32);
        }
        blocks.physical = blocks.physical.max(blocks.logical);
        blocks.discard = blocks.discard.max(blocks.physical);
        if !is_device && let Ok(block) = u32::try_from(metadata.blksize()) {
            blocks.discard = blocks.discard.max(block);
        }
        let size = size_of(&file, is_device)?;
        Ok(Self {
            size: AtomicU64::new(size - size % SECTOR),
            file,
            blocks,
            is_device,
            direct,
            waits_always: AtomicBool::new(false),
        })
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// Whether it circumvents the host's page cache (O_DIRECT).
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Whether the kernel can transfer these pieces as they lie. [`Image::read`] and [`Image::write`]
    /// take others too, and copy them.
    pub fn takes(&self, segments: Segments<'_>) -> bool {
        self.direct
            .is_none_or(|alignment| segments.iovecs().iter().all(|piece| alignment.fits(piece)))
    }

    /// Fills `into` as [`Image::read`] does, if the page cache holds all of it. Where the file system
    /// cannot say, it is just read.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn read_now(&self, offset: u64, into: Segments<'_>) -> io::Result<bool> {
        if self.waits_always.load(Ordering::Relaxed) || !self.takes(into) {
            return self.read(offset, into).map(|()| true);
        }
        let iovecs = into.iovecs();
        let count = iovecs.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
        let (fd, at) = (self.as_raw_fd(), signed(offset)?);
        // SAFETY: `Segments` vouches for what the iovecs describe.
        let done = unsafe { libc::preadv2(fd, iovecs.as_ptr(), count, at, libc::RWF_NOWAIT) };
        if usize::try_from(done).is_ok_and(|done| done == into.bytes()) {
            return Ok(true);
        }
        if done < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP) {
            self.waits_always.store(true, Ordering::Relaxed);
            return self.read_now(offset, into);
        }
        // Whatever it is, it is met again by whoever may wait.
        Ok(false)
    }

    /// Writes as [`Image::write`] does; if `durable`, what was written survives a power cut of the
    /// host once this returns.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn write_with(&self, offset: u64, from: Segments<'_>, durable: bool) -> io::Result<()> {
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        if self.takes(from) {
            return transfer(offset, from, |iovecs, count, offset| {
                // SAFETY: `Segments` vouches for what the iovecs describe.
                unsafe { libc::pwritev2(self.as_raw_fd(), iovecs, count, offset, flags) }
            });
        }
        let len = from.bytes();
        let mut bounce = Bounce::new(len, self.blocks.logical as usize);
        for at in (0..len).step_by(bounce.len()) {
            let piece = bounce.part(len - at);
            // SAFETY: `Segments` vouches for what the iovecs describe, and `piece` is memory of ours.
            unsafe { gather(from.iovecs(), at, piece) };
            self.file.write_all_at(piece, offset + at as u64)?;
        }
        if durable { self.flush() } else { Ok(()) }
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
        let (offset, len) = (signed(offset)?, signed(len)?);
        // SAFETY: fallocate takes plain numbers besides an open descriptor, which `self` owns.
        check(unsafe { libc::fallocate(self.as_raw_fd(), mode, offset, len) })
    }

    /// Makes a request of a block device about a range.
    fn range_ioctl(&self, request: libc::Ioctl, offset: u64, len: u64) -> io::Result<()> {
        let range = [offset, len];
        // SAFETY: BLKDISCARD and BLKZEROOUT read two numbers of 64 bits, which `range` is.
        check(unsafe { libc::ioctl(self.as_raw_fd(), request, range.as_ptr()) })
    }

    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut zeros = Bounce::new(usize::try_from(len).unwrap_or(usize::MAX), 4096);
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let piece = zeros.part(usize::try_from(end - at).unwrap_or(usize::MAX));
            self.file.write_all_at(piece, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    }
}

impl AsRawFd for RawFile {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Image for RawFile {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn blocks(&self) -> BlockSizes {
        self.blocks
    }

    fn read(&self, offset: u64, into: Segments<'_>) -> io::Result<()> {
        if self.takes(into) {
            return transfer(offset, into, |iovecs, count, offset| {
                // SAFETY: `Segments` vouches for what the iovecs describe.
                unsafe { libc::preadv(self.as_raw_fd(), iovecs, count, offset) }
            });
        }
        let len = into.bytes();
        let mut bounce = Bounce::new(len, self.blocks.logical as usize);
        for at in (0..len).step_by(bounce.len()) {
            let piece = bounce.part(len - at);
            self.file.read_exact_at(piece, offset + at as u64)?;
            // SAFETY: `Segments` vouches for what the iovecs describe, and `piece` is memory of ours.
            unsafe { scatter(into.iovecs(), at, piece) };
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: Segments<'_>) -> io::Result<()> {
        self.write_with(offset, from, false)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let done = match self.is_device {
            true => self.range_ioctl(BLKDISCARD, offset, len),
            false => self.fallocate(PUNCH, offset, len),
        };
        ignore_unsupported(done).map(drop)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        // On a device, punching is asking for zeros that take no space, if it can.
        if may_unmap && ignore_unsupported(self.fallocate(PUNCH, offset, len))? {
            return Ok(());
        }
        let done = match self.is_device {
            true => self.range_ioctl(BLKZEROOUT, offset, len),
            false => self.fallocate(ZERO, offset, len),
        };
        match ignore_unsupported(done)? {
            true => Ok(()),
            false => self.write_zeros(offset, len),
        }
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        if !size.is_multiple_of(SECTOR) {
            return refuse("the size is no multiple of 512 bytes");
        }
        if size < self.size() {
            return refuse("an image does not shrink");
        }
        let now = size_of(&self.file, self.is_device)?;
        if now < size && self.is_device {
            return refuse("the block device is smaller");
        }
        if now < size {
            self.file.set_len(size)?;
        }
        self.size.fetch_max(size, Ordering::AcqRel);
        Ok(())
    }
}

const PUNCH: libc::c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: libc::c_int = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Moves all of `segments` by a call like preadv, which may move less each time.
fn transfer(
    offset: u64,
    segments: Segments<'_>,
    call: impl Fn(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
) -> io::Result<()> {
    let mut offset = signed(offset)?;
    let mut left = segments.bytes();
    let mut rest = std::borrow::Cow::Borrowed(segments.iovecs());
    while left > 0 {
        let count = rest.len().min(libc::UIO_MAXIOV as usize);
        let done = match call(rest.as_ptr(), count as libc::c_int, offset) {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            done => usize::try_from(done).map_err(|_| io::Error::last_os_error()),
        };
        match done {
            Ok(done) => {
                offset += done as libc::off_t;
                left = left.saturating_sub(done);
                if left > 0 {
                    advance(rest.to_mut(), done);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Takes the first `bytes` bytes out of `iovecs`.
pub(crate) fn advance(iovecs: &mut Vec<libc::iovec>, mut bytes: usize) {
    let used = iovecs.iter().take_while(|piece| {
        let fits = piece.iov_len <= bytes;
        bytes -= if fits { piece.iov_len } else { 0 };
        fits
    });
    let used = used.count();
    iovecs.drain(..used);
    if let Some(first) = iovecs.first_mut() {
        // Inside the piece, which is longer than that.
        first.iov_base = first.iov_base.wrapping_byte_add(bytes);
        first.iov_len -= bytes;
    }
}

fn size_of(file: &File, is_device: bool) -> io::Result<u64> {
    match is_device {
        true => device_number(file, BLKGETSIZE64),
        false => Ok(file.metadata()?.size()),
    }
}

/// What a block device says of itself, in a number of the type that `request` fills.
fn device_number<N: Default>(file: &File, request: libc::Ioctl) -> io::Result<N> {
    let mut number = N::default();
    // SAFETY: the requests of this module fill a number, of 32 bits or 64 as their caller says.
    check(unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut number) })?;
    Ok(number)
}

fn signed(number: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(number).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether it was done; false where the host has no such thing.
fn ignore_unsupported(result: io::Result<()>) -> io::Result<bool> {
    const UNSUPPORTED: [i32; 4] = [libc::EOPNOTSUPP, libc::ENOSYS, libc::ENOTTY, libc::ENODEV];
    match result {
        Ok(()) => Ok(true),
        Err(error)
            if error
                .raw_os_error()
                .is_some_and(|e| UNSUPPORTED.contains(&e)) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
