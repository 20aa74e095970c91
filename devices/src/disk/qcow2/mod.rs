//! qcow2 images: imago reads and writes them, from one thread at a time.
//!
//! Around it stand three things that it leaves to its user: [`header`] judges what an image says of
//! itself, [`chain`] opens the files below it, and [`order`] has what is written reach the disk in an
//! order that survives a power cut.

mod chain;
mod file;
mod header;
mod order;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{FormatAccess, ShallowMapping, Storage as _};
use vm_memory::VolatileSlice;

use super::{BlockSizes, Image, SECTOR};
use crate::lock;
use crate::virtio::Segments;
use file::HostFile;
use header::Header;

pub(super) use chain::open;
pub use header::HeaderError;
pub(super) use header::MAGIC;

/// The most that is written as zeros at once where an image has no zero clusters.
const ZEROS: u64 = 64 << 10;

/// The most that is written at once.
const MOST: u64 = 1 << 20;
/// Clusters may be this far outside a file that has not been written to its end.
const SLACK: u64 = 64 << 20;

/// An open qcow2 image with the files below it.
pub(super) struct Qcow2Image {
    state: Mutex<State>,
    file: HostFile,
    size: AtomicU64,
    cluster_size: u64,
    /// Bytes of the disk that an L2 table describes.
    bytes_of_l2_table: u64,
    /// Where the file's clusters end: it was longer than that less [`SLACK`] at some time.
    file_length: AtomicU64,
    writable: bool,
}

struct State {
    image: FormatAccess<HostFile>,
    header: Header,
    /// Size of the disk in the backing file, if there is one.
    backing_size: Option<u64>,
}

impl Qcow2Image {
    fn new(
        image: FormatAccess<HostFile>,
        file: HostFile,
        header: Header,
        backing_size: Option<u64>,
        writable: bool,
    ) -> Self {
        Self {
            size: AtomicU64::new(header.size),
            cluster_size: header.cluster_size(),
            bytes_of_l2_table: header.bytes_of_l2_table(),
            file_length: AtomicU64::new(0),
            state: Mutex::new(State {
                image,
                header,
                backing_size,
            }),
            file,
            writable,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Changes the image, and has pointers to new tables follow.
    fn change(
        &self,
        change: impl FnOnce(&mut FormatAccess<HostFile>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut state = self.state();
        let changed = change(&mut state.image);
        let settled = self.settle(&state.image);
        changed.and(settled)
    }

    /// Writes the tables that waiting pointers point to, and then these.
    fn settle(&self, image: &FormatAccess<HostFile>) -> io::Result<()> {
        if self.file.has_pending() {
            image.flush()?;
            self.file.write_pending()?;
        }
        Ok(())
    }

    /// Frees or zeroes the whole clusters of a range by `clear`, and the rest by `rest`, piece by
    /// piece: all of a piece is mapped alike in this image. What reads as zeros takes no new table.
    ///
    /// Afterwards the tables are written: before what has become free is used anew, pointers to it
    /// are to be gone ([`order`]). imago sees to that for data and not for tables.
    fn clear(
        &self,
        range: Range<u64>,
        unmap: bool,
        clear: impl Fn(&mut FormatAccess<HostFile>, u64, u64) -> io::Result<()>,
        rest: impl Fn(&FormatAccess<HostFile>, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        self.change(|image| {
            let mut at = range.start;
            let mut changed = None;
            while at < range.end {
                let (mapping, len) = image.get_shallow_mapping(at, range.end - at)?;
                let end = at + len;
                let host = match mapping {
                    ShallowMapping::Zero { .. } if len > 0 => {
                        at = end;
                        continue;
                    }
                    ShallowMapping::Eof { .. } => return Err(io::ErrorKind::UnexpectedEof.into()),
                    ShallowMapping::Raw {
                        offset,
                        writable: true,
                        ..
                    } if unmap => Some(offset),
                    _ => None,
                };
                self.look(image, at, len)?;
                // A piece lies within one L2 table. The next may need a new table, which could take
                // a cluster that has become free.
                let table = at / self.bytes_of_l2_table;
                if changed.replace(table).is_some_and(|last| last != table) {
                    image.flush()?;
                }
                let whole = self.whole_clusters(at..end);
                if whole.is_empty() {
                    rest(image, at, len)?;
                } else {
                    rest(image, at, whole.start - at)?;
                    if let Some(host) = host {
                        self.punch(host + (whole.start - at), whole.clone())?;
                    }
                    clear(image, whole.start, whole.end - whole.start)?;
                    rest(image, whole.end, end - whole.end)?;
                }
                at = end;
            }
            image.flush()
        })
    }

    /// Whether there are compressed clusters in a range that is to be written.
    ///
    /// A cluster that the image has far outside its file is an error: imago would take the clusters
    /// next to it, and count all of those up to there.
    fn look(&self, image: &FormatAccess<HostFile>, mut at: u64, mut len: u64) -> io::Result<bool> {
        let mut has_compressed = false;
        while len > 0 {
            let (mapping, piece) = image.get_shallow_mapping(at, len)?;
            match mapping {
                ShallowMapping::Special { .. } => has_compressed = true,
                ShallowMapping::Raw { offset, .. } => self.check_inside(offset)?,
                _ => {}
            }
            if piece == 0 {
                break;
            }
            at += piece;
            len -= piece;
        }
        Ok(has_compressed)
    }

    fn check_inside(&self, host: u64) -> io::Result<()> {
        if host < self.file_length.load(Ordering::Relaxed) {
            return Ok(());
        }
        let length = self.file.size()?.saturating_add(SLACK);
        self.file_length.store(length, Ordering::Relaxed);
        match host < length {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::EIO)),
        }
    }

    /// The whole clusters in a range; what the disk has of its last one is a whole one too.
    fn whole_clusters(&self, range: Range<u64>) -> Range<u64> {
        let end = match range.end == self.size() {
            true => range.end,
            false => range.end - range.end % self.cluster_size,
        };
        range.start.next_multiple_of(self.cluster_size)..end
    }

    /// Gives the space of clusters back to the host's file system, which imago does not. They are
    /// the image's until it has entered them as zeros or free, and if it comes not so far they read
    /// as zeros, as they may.
    fn punch(&self, host: u64, clusters: Range<u64>) -> io::Result<()> {
        let len = clusters.end - clusters.start;
        self.file.punch(host, len).map(drop)
    }
}

impl Image for Qcow2Image {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn blocks(&self) -> BlockSizes {
        let blocks = BlockSizes::default();
        BlockSizes {
            // No image has clusters of more than 2 MiB.
            discard: blocks.discard.max(self.cluster_size as u32),
            ..blocks
        }
    }

    fn read(&self, offset: u64, into: Segments<'_>) -> io::Result<()> {
        let slices = slices(into);
        let (vector, _guard) = IoVectorMut::from_volatile_slice(&slices);
        self.state().image.readv(vector, offset)
    }

    fn write(&self, offset: u64, from: Segments<'_>) -> io::Result<()> {
        let slices = slices(from);
        let (mut vector, _guard) = IoVector::from_volatile_slice(&slices);
        self.change(|image| {
            let mut at = offset;
            while !vector.is_empty() {
                let left = self.bytes_of_l2_table - at % self.bytes_of_l2_table;
                let len = vector.len().min(left).min(MOST);
                let has_compressed = self.look(image, at, len)?;
                let (piece, rest) = vector.split_at(len);
                image.writev(piece, at)?;
                if has_compressed {
                    // Their clusters are free now: as in `clear`.
                    image.flush()?;
                }
                at += len;
                vector = rest;
            }
            Ok(())
        })
    }

    fn flush(&self) -> io::Result<()> {
        let state = self.state();
        state.image.flush()?;
        self.file.write_pending()?;
        self.file.sync_now()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let discard = |image: &mut FormatAccess<HostFile>, at, len| {
            match image.discard_to_any(at, len) {
                // Version 2 has no zero clusters to put in their place.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                done => done,
            }
        };
        self.clear(offset..offset + len, true, discard, |_, _, _| Ok(()))
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let zero = |image: &mut FormatAccess<HostFile>, at, len| {
            let done = match may_unmap {
                true => image.discard_to_zero(at, len),
                false => image.write_zeroes(at, len),
            };
            match done {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    write_zeros(image, at, len)
                }
                done => done,
            }
        };
        self.clear(offset..offset + len, may_unmap, zero, write_zeros)
    }

    /// Grows the disk as far as the image's L1 table has room in its clusters: with clusters of
    /// 64 KiB to the next multiple of 4 TiB.
    fn grow(&self, size: u64) -> io::Result<()> {
        let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        let mut state = self.state();
        let now = state.header.size;
        if !size.is_multiple_of(SECTOR) {
            return refuse("the size is no multiple of 512 bytes");
        }
        if size < now {
            return refuse("an image does not shrink");
        }
        if size == now {
            return Ok(());
        }
        if !self.writable {
            return refuse("the image is open for reading alone");
        }
        if state.backing_size.is_some_and(|backing| backing > now) {
            return refuse("its backing file is larger, and would show in what is new");
        }
        let Some(grown) = state.header.grown(size) else {
            return refuse(
                "its L1 table has no room; qemu-img resize makes it while no guest runs",
            );
        };
        state.image.flush()?;
        self.file.write_pending()?;
        self.file.grow(&state.header, &grown)?;
        // SAFETY: all that was cached has been written above, while `state` keeps others out.
        unsafe { state.image.invalidate_cache() }?;
        state.header = grown;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}

impl Drop for Qcow2Image {
    fn drop(&mut self) {
        if self.writable
            && let Err(error) = self.flush()
        {
            log::error!("A disk image's tables cannot be written at its end: {error}");
        }
    }
}

impl fmt::Debug for Qcow2Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2Image")
            .field("file", &self.file)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

/// The pieces as imago takes them.
fn slices(segments: Segments<'_>) -> Vec<VolatileSlice<'_>> {
    let pieces = segments.iovecs().iter().filter(|piece| piece.iov_len > 0);
    pieces
        // SAFETY: `Segments` vouches that each piece can be accessed for its lifetime.
        .map(|piece| unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) })
        .collect()
}

fn write_zeros(image: &FormatAccess<HostFile>, offset: u64, len: u64) -> io::Result<()> {
    let zeros = vec![0; len.min(ZEROS) as usize];
    let mut at = offset;
    while at < offset + len {
        let piece = (offset + len - at).min(ZEROS);
        image.write(&zeros[..piece as usize], at)?;
        at += piece;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
