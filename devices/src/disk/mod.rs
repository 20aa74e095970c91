//! Disk images: what a virtio-blk device reads and writes, whatever the format.
//!
//! An image knows nothing of virtio. It is shared by all queues of its disk, whose threads call it at
//! the same time.

mod direct;
mod ephemeral;
mod lock;
mod open;
mod qcow2;
mod raw;
#[cfg(test)]
mod testing;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::virtio::Segments;

pub use open::{OpenError, open};
pub use qcow2::HeaderError;
pub use raw::RawFile;
pub(crate) use raw::advance;

/// Every offset and length is a multiple of this, in bytes.
pub const SECTOR: u64 = 512;

/// How an image file is to be read. It is never found out from the file's content, which a guest may
/// write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file's bytes are the disk's.
    Raw,
    /// QEMU's qcow2.
    Qcow2,
}

/// An image as it is to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSpec {
    /// Path of the image file, or of a block device.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// It is opened for reading alone, and shared with other readers.
    pub readonly: bool,
    /// What is written goes to an unlinked file, and is gone with the guest.
    pub ephemeral: bool,
    /// The host's page cache is circumvented (O_DIRECT).
    pub direct: bool,
    /// The backing file that a qcow2 image's name of one has to be, where it does not lie in the
    /// image's directory.
    pub backing: Option<PathBuf>,
}

/// What a guest is to know of an image's blocks, in bytes: powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// The least that can be read or written.
    pub logical: u32,
    /// What is written as a whole; less is read first, changed and written back.
    pub physical: u32,
    /// What discards are best aligned to.
    pub discard: u32,
}

impl Default for BlockSizes {
    fn default() -> Self {
        Self {
            logical: SECTOR as u32,
            physical: 4096,
            discard: 4096,
        }
    }
}

/// An open disk image.
///
/// Whoever calls it has checked that offset and length lie within [`Image::size`] and are multiples
/// of the logical block size. An error leaves the image usable; what the range then holds is
/// undefined, as on any disk.
pub trait Image: Send + Sync + fmt::Debug {
    /// Its size in bytes, a multiple of [`SECTOR`].
    fn size(&self) -> u64;
    /// Its blocks.
    fn blocks(&self) -> BlockSizes;
    /// Fills `into`, whole, from `offset` on.
    ///
    /// # Errors
    ///
    /// The host's, or that of a damaged image.
    fn read(&self, offset: u64, into: Segments<'_>) -> io::Result<()>;
    /// Writes `from`, whole, from `offset` on.
    ///
    /// # Errors
    ///
    /// The host's, such as ENOSPC.
    fn write(&self, offset: u64, from: Segments<'_>) -> io::Result<()>;
    /// Once it returns, what was written before the call survives a power cut of the host.
    ///
    /// # Errors
    ///
    /// The host's: what was written since the last flush may be lost.
    fn flush(&self) -> io::Result<()>;
    /// The range is not needed any more; it may read as anything that was there, or as zeros.
    ///
    /// # Errors
    ///
    /// The host's.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
    /// The range reads as zeros from now on. Only if `may_unmap` its space may be given back.
    ///
    /// # Errors
    ///
    /// The host's.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;
    /// Makes it larger; what is new reads as zeros. An image whose file has grown already, or a block
    /// device, follows that.
    ///
    /// # Errors
    ///
    /// The host's, and `InvalidInput` for a size that is smaller than the image's, or that the format
    /// cannot have.
    fn grow(&self, size: u64) -> io::Result<()>;
}

/// The images that a disk can have.
#[derive(Clone, Debug)]
pub enum Storage {
    /// A file or block device whose bytes are the disk's.
    Raw(Arc<RawFile>),
    /// One in a format of its own, which takes no calls but these.
    Image(Arc<dyn Image>),
}

impl Storage {
    /// What both have in common.
    pub fn image(&self) -> &dyn Image {
        match self {
            Self::Raw(file) => file.as_ref(),
            Self::Image(image) => image.as_ref(),
        }
    }
}
