//! A disk whose image stays as it is: what the guest writes goes to a file without a name, and is
//! gone when that is closed.

use std::env;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::open::OpenError;
use super::{BlockSizes, Image, RawFile, SECTOR, Storage};
use crate::virtio::Segments;

/// The least that is taken over from the image: what guests' file systems write.
const MIN_BLOCK: u64 = 4096;
/// Blocks are as large as it takes to have no more of them: their bitmap takes 2 MiB then.
const MAX_BLOCKS: u64 = 16 << 20;

/// An image and what has been written over it.
///
/// A block is in one of the two. One that is written in part is taken over whole first.
#[derive(Debug)]
pub(super) struct Ephemeral {
    base: Storage,
    base_size: u64,
    over: RawFile,
    block: u64,
    size: AtomicU64,
    /// Those who read it move data, those who write it take blocks over.
    written: RwLock<Bitmap>,
}

impl Ephemeral {
    /// Puts an empty file over `base`.
    pub fn new(base: Storage) -> Result<Self, OpenError> {
        let directory = directory();
        Self::over(base, unnamed(&directory)).map_err(|e| OpenError::Ephemeral(directory, e))
    }

    fn over(base: Storage, file: io::Result<File>) -> io::Result<Self> {
        let size = base.image().size();
        let file = file?;
        file.set_len(size)?;
        let mut block = MIN_BLOCK.max(base.image().blocks().physical.into());
        while size / block > MAX_BLOCKS {
            block *= 2;
        }
        Ok(Self {
            base,
            base_size: size,
            over: RawFile::new(file)?,
            block,
            size: AtomicU64::new(size),
            written: RwLock::new(Bitmap::new(size.div_ceil(block))),
        })
    }

    fn reading(&self) -> RwLockReadGuard<'_, Bitmap> {
        self.written.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> RwLockWriteGuard<'_, Bitmap> {
        self.written.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn blocks_of(&self, offset: u64, len: u64) -> Range<u64> {
        offset / self.block..(offset + len).div_ceil(self.block)
    }

    /// Changes a range of the file above by `change`, with its blocks taken over.
    fn change(&self, offset: u64, len: u64, change: impl Fn() -> io::Result<()>) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let blocks = self.blocks_of(offset, len);
        {
            let written = self.reading();
            if blocks.clone().all(|block| written.has(block)) {
                return change();
            }
        }
        let mut written = self.writing();
        for edge in [blocks.start, blocks.end - 1] {
            let (start, end) = (edge * self.block, (edge + 1) * self.block);
            let is_partial = offset > start || offset + len < end;
            if is_partial && !written.has(edge) {
                self.take_over(edge)?;
                written.set(edge);
            }
        }
        change()?;
        blocks.for_each(|block| written.set(block));
        Ok(())
    }

    /// Copies a block from the image into the file above.
    fn take_over(&self, block: u64) -> io::Result<()> {
        let start = block * self.block;
        let len = self.block.min(self.base_size.saturating_sub(start));
        if len == 0 {
            return Ok(());
        }
        let mut bytes = vec![0; len as usize];
        let iovecs = [libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }];
        // SAFETY: the iovec describes `bytes`, which is not used before it is dropped.
        let segments = unsafe { Segments::new(&iovecs) };
        self.base.image().read(start, segments)?;
        self.over.write(start, segments)
    }
}

impl Image for Ephemeral {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn blocks(&self) -> BlockSizes {
        let blocks = self.base.image().blocks();
        BlockSizes {
            discard: blocks.discard.max(self.block as u32),
            ..blocks
        }
    }

    fn read(&self, offset: u64, into: Segments<'_>) -> io::Result<()> {
        let written = self.reading();
        let end = offset + into.bytes() as u64;
        let mut at = offset;
        while at < end {
            let first = at / self.block;
            let above = written.has(first);
            let mut next = first + 1;
            while next * self.block < end && written.has(next) == above {
                next += 1;
            }
            let piece_end = end.min(next * self.block);
            let iovecs = part(into.iovecs(), at - offset, piece_end - at);
            // SAFETY: the iovecs describe parts of `into`, which vouches for them.
            let segments = unsafe { Segments::new(&iovecs) };
            match above {
                true => self.over.read(at, segments)?,
                false => self.base.image().read(at, segments)?,
            }
            at = piece_end;
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: Segments<'_>) -> io::Result<()> {
        let len = from.bytes() as u64;
        self.change(offset, len, || self.over.write(offset, from))
    }

    fn flush(&self) -> io::Result<()> {
        // It is to survive nothing.
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // Whatever of it is in the image below stays as it is, as it may.
        self.over.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        self.change(offset, len, || self.over.write_zeroes(offset, len, true))
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        let mut written = self.writing();
        let now = self.size();
        if size > now && size.is_multiple_of(SECTOR) {
            // The block that the image ends in is part of it; those after it are above.
            let edge = now / self.block;
            if !now.is_multiple_of(self.block) && !written.has(edge) {
                self.take_over(edge)?;
                written.set(edge);
            }
            self.over.grow(size)?;
            self.size.store(size, Ordering::Release);
            return Ok(());
        }
        // The file above refuses what cannot be.
        self.over.grow(size)
    }
}

/// A bit for each block of the image; blocks after it count as written.
#[derive(Debug)]
struct Bitmap {
    blocks: u64,
    bits: Vec<u64>,
}

impl Bitmap {
    fn new(blocks: u64) -> Self {
        let bits = vec![0; blocks.div_ceil(64) as usize];
        Self { blocks, bits }
    }

    fn has(&self, block: u64) -> bool {
        block >= self.blocks || self.bits[(block / 64) as usize] & 1 << (block % 64) != 0
    }

    fn set(&mut self, block: u64) {
        if block < self.blocks {
            self.bits[(block / 64) as usize] |= 1 << (block % 64);
        }
    }
}

/// The part of `iovecs` that begins at `at` and has `len` bytes.
fn part(iovecs: &[libc::iovec], mut at: u64, mut len: u64) -> Vec<libc::iovec> {
    let mut part = Vec::new();
    for iovec in iovecs {
        let skipped = at.min(iovec.iov_len as u64);
        let here = len.min(iovec.iov_len as u64 - skipped);
        if here > 0 {
            part.push(libc::iovec {
                // Inside the iovec.
                iov_base: iovec.iov_base.wrapping_byte_add(skipped as usize),
                iov_len: here as usize,
            });
        }
        at -= skipped;
        len -= here;
    }
    part
}

/// Where what is written goes: /tmp is memory on many hosts.
fn directory() -> PathBuf {
    match env::var_os("TMPDIR") {
        Some(directory) if !directory.is_empty() => directory.into(),
        _ => "/var/tmp".into(),
    }
}

/// A file in `directory` that no other program can open.
fn unnamed(directory: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options
        .clone()
        .custom_flags(libc::O_TMPFILE | libc::O_EXCL)
        .open(directory)
    {
        // Overlay file systems before Linux 6.3, among others, have no such files.
        Err(error)
            if [Some(libc::EOPNOTSUPP), Some(libc::EISDIR)].contains(&error.raw_os_error()) => {}
        done => return done,
    }
    for number in 0.. {
        let path = directory.join(format!(".minivmm-{}-{number}", std::process::id()));
        match options.clone().create_new(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file);
            }
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests;
