//! The header of a qcow2 image, read and judged before anything else looks at the file.
//!
//! imago believes much of what stands there: it would show an encrypted disk's ciphertext, take as
//! much memory as the header asks for, and open what it names. So what it gets has passed here. The
//! format is QEMU's docs/interop/qcow2.txt.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::disk::SECTOR;

/// The most that a table of the first level takes, the L1 table or the refcount table.
pub(super) const MAX_TABLE: u64 = 4 << 20;
/// The most that tables of the second level take when they are all in imago's caches.
const MAX_CACHES: u64 = 64 << 20;
/// How many of them its caches hold.
const CACHED_L2_TABLES: u64 = 128;
const CACHED_REFBLOCKS: u64 = 32;
/// Where the header and its extensions have to end. QEMU's take less than 1 KiB.
const MAX_HEADER: usize = 64 << 10;

/// "QFI" and a byte that no text has.
pub(in crate::disk) const MAGIC: u32 = 0x5146_49fb;
const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;
/// Where the version 3 header has its automatically cleared features.
pub(super) const AUTOCLEAR_AT: u64 = 88;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const FEATURE_NAME_LENGTH: usize = 48;

/// Why a qcow2 image is not used.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The file cannot be read.
    #[error("cannot read its header")]
    Read(#[source] io::Error),
    /// It is no qcow2 image.
    #[error("it does not begin as a qcow2 image does")]
    Magic,
    /// A version that is neither 2 nor 3.
    #[error("it is qcow2 of version {0}, not 2 or 3")]
    Version(u32),
    /// Its data are encrypted.
    #[error("it is encrypted")]
    Encrypted,
    /// It was not closed properly, and keeps its reference counts only then.
    #[error("it was not closed properly (its header is marked dirty)")]
    Dirty,
    /// A program found it damaged.
    #[error("it is marked as damaged")]
    Corrupt,
    /// Its data are in another file.
    #[error("its data are in another file (an external data file)")]
    ExternalData,
    /// Its clusters are compressed by something else than deflate.
    #[error("its clusters are compressed by zstd")]
    Compression,
    /// It has subclusters.
    #[error("it has extended L2 entries (subclusters)")]
    ExtendedL2,
    /// It has features that no program may ignore, and which are unknown here.
    #[error("it has unknown incompatible features (bits {0:#x})")]
    Unknown(u64),
    /// It has internal snapshots, and is to be written.
    #[error("it has internal snapshots ({0}), and can only be read")]
    Snapshots(u32),
    /// The disk's size is no multiple of 512 bytes, or 0.
    #[error("its disk has {0} bytes, which is not a multiple of 512 larger than 0")]
    Size(u64),
    /// Its tables would take too much memory.
    #[error("its {0} would take more memory than is allowed")]
    Memory(&'static str),
    /// O_DIRECT needs larger clusters.
    #[error("its clusters are smaller than 4 KiB, which direct I/O cannot write")]
    DirectClusters,
    /// What it says makes no sense.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
}

impl HeaderError {
    /// What the user can do, with the image's name put in for IMAGE.
    pub fn remedy(&self) -> Option<&'static str> {
        Some(match self {
            Self::Read(_) | Self::Version(_) => return None,
            Self::Magic => "format=raw is for images whose bytes are the disk's",
            Self::Encrypted => {
                "decrypt it with qemu-img convert, or use encryption inside the guest"
            }
            Self::Dirty => "qemu-img check -r all IMAGE repairs it",
            Self::Corrupt | Self::Damaged(_) => {
                "qemu-img check -r all IMAGE repairs what can be repaired"
            }
            Self::ExternalData | Self::Compression | Self::ExtendedL2 | Self::Unknown(_) => {
                "qemu-img convert -O qcow2 IMAGE NEW makes one without"
            }
            Self::Snapshots(_) => {
                "readonly=on or ephemeral=on leaves it as it is; qemu-img convert -O qcow2 IMAGE NEW \
                 makes one without, qemu-img snapshot -d deletes them"
            }
            Self::Size(_) => "qemu-img resize rounds it up",
            Self::Memory(_) | Self::DirectClusters => {
                "qemu-img convert -O qcow2 -o cluster_size=64k IMAGE NEW makes one with ordinary clusters"
            }
        })
    }
}

/// The file below an image, as its header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BackingName {
    pub path: PathBuf,
    pub format: Option<String>,
}

/// What an image's header says, as far as it is used here.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub cluster_bits: u32,
    /// The disk's size in bytes.
    pub size: u64,
    pub l1_entries: u64,
    pub l1_offset: u64,
    pub reftable_offset: u64,
    pub reftable_clusters: u64,
    /// Reference counts in a refcount block, as a power of two.
    pub refblock_bits: u32,
    pub snapshots: u32,
    pub autoclear: u64,
    pub backing: Option<BackingName>,
}

impl Header {
    /// Reads and checks the header of an image.
    pub fn read(file: &File) -> Result<Self, HeaderError> {
        let mut bytes = vec![0; MAX_HEADER];
        let mut len = 0;
        while len < bytes.len() {
            match file.read_at(&mut bytes[len..], len as u64) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(HeaderError::Read(error)),
            }
        }
        // What follows the end of a file reads as zeros.
        Self::parse(&bytes, len)
    }

    fn parse(bytes: &[u8], len: usize) -> Result<Self, HeaderError> {
        use HeaderError::Damaged;
        if len < V2_LENGTH || u32_at(bytes, 0) != MAGIC {
            return Err(HeaderError::Magic);
        }
        let is_v3 = match u32_at(bytes, 4) {
            2 => false,
            3 => true,
            version => return Err(HeaderError::Version(version)),
        };
        if u32_at(bytes, 32) != 0 {
            return Err(HeaderError::Encrypted);
        }
        let (mut header_length, mut refcount_order, mut autoclear) = (V2_LENGTH, 4, 0);
        if is_v3 {
            check_features(u64_at(bytes, 72))?;
            autoclear = u64_at(bytes, AUTOCLEAR_AT as usize);
            refcount_order = u32_at(bytes, 96);
            header_length = u32_at(bytes, 100) as usize;
        }
        let cluster_bits = u32_at(bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Damaged(
                "clusters of less than 512 bytes or more than 2 MiB",
            ));
        }
        if refcount_order > 6 {
            return Err(Damaged("reference counts of more than 64 bits"));
        }
        // The header and its extensions have to end in the first cluster.
        let area = &bytes[..MAX_HEADER.min(1 << cluster_bits)];
        if is_v3 && (header_length < V3_LENGTH || !header_length.is_multiple_of(8)) {
            return Err(Damaged("the length of its header"));
        }
        let (name_offset, name_length) = (u64_at(bytes, 8), u32_at(bytes, 16));
        let format = backing_format(area, header_length, is_v3, name_offset)?;
        let backing = backing_name(area, name_offset, name_length)?;
        let header = Self {
            cluster_bits,
            size: u64_at(bytes, 24),
            l1_entries: u32_at(bytes, 36).into(),
            l1_offset: u64_at(bytes, 40),
            reftable_offset: u64_at(bytes, 48),
            reftable_clusters: u32_at(bytes, 56).into(),
            refblock_bits: cluster_bits + 3 - refcount_order,
            snapshots: u32_at(bytes, 60),
            autoclear,
            backing: backing.map(|path| BackingName { path, format }),
        };
        header.check_tables()?;
        Ok(header)
    }

    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the disk that an L2 table describes.
    pub fn bytes_of_l2_table(&self) -> u64 {
        self.cluster_size() << (self.cluster_bits - 3)
    }

    /// Bytes that the refcount table takes.
    pub fn reftable_bytes(&self) -> u64 {
        self.reftable_clusters << self.cluster_bits
    }

    /// Bytes of memory that the tables take at most, with that many refcount blocks.
    pub fn memory(&self, refblocks: u64) -> u64 {
        let cached = self.l1_entries.min(CACHED_L2_TABLES) + refblocks.min(CACHED_REFBLOCKS);
        (cached << self.cluster_bits) + self.l1_entries * 8
    }

    /// Whether these many refcount blocks are what a file of that length can have, and their memory
    /// is bounded.
    pub fn check_refblocks(&self, refblocks: u64, file_length: u64) -> Result<(), HeaderError> {
        // A search for a free cluster visits all of them. A block may stand a little beyond the
        // end; a header that makes thousands of one makes searches that do not end.
        let needed = file_length >> (self.cluster_bits + self.refblock_bits);
        if refblocks > needed + 64 {
            let text = "more reference counts than its file can have clusters";
            return Err(HeaderError::Damaged(text));
        }
        if self.memory(refblocks) > MAX_CACHES + MAX_TABLE {
            return Err(HeaderError::Memory("refcount blocks"));
        }
        Ok(())
    }

    /// The header of a disk that has grown to `size`, if its L1 table has room in its clusters.
    pub fn grown(&self, size: u64) -> Option<Self> {
        let needed = size.div_ceil(self.bytes_of_l2_table());
        let room = (self.l1_entries * 8).next_multiple_of(self.cluster_size()) / 8;
        let grown = Self {
            size,
            l1_entries: self.l1_entries.max(needed),
            ..self.clone()
        };
        (needed <= room && grown.check_tables().is_ok()).then_some(grown)
    }

    pub fn check_tables(&self) -> Result<(), HeaderError> {
        use HeaderError::{Damaged, Memory};
        if self.size == 0 || !self.size.is_multiple_of(SECTOR) {
            return Err(HeaderError::Size(self.size));
        }
        if self.l1_entries * 8 > MAX_TABLE {
            return Err(Memory("L1 table"));
        }
        if self.reftable_bytes() > MAX_TABLE {
            return Err(Memory("refcount table"));
        }
        if self.memory(0) > MAX_CACHES + MAX_TABLE {
            return Err(Memory("L2 tables"));
        }
        if self.l1_entries < self.size.div_ceil(self.bytes_of_l2_table()) {
            return Err(Damaged("an L1 table that is too small for its disk"));
        }
        let outside = |offset: u64| {
            !offset.is_multiple_of(self.cluster_size()) || offset == 0 || offset >> 56 != 0
        };
        if outside(self.l1_offset) || outside(self.reftable_offset) || self.reftable_clusters == 0 {
            return Err(Damaged("tables that are not where tables can be"));
        }
        Ok(())
    }
}

/// Refuses what has to be understood and is not.
fn check_features(mut incompatible: u64) -> Result<(), HeaderError> {
    let known = [
        HeaderError::Dirty,
        HeaderError::Corrupt,
        HeaderError::ExternalData,
        HeaderError::Compression,
        HeaderError::ExtendedL2,
    ];
    // Damage first: it is what the user has to see to.
    for (bit, error) in known.into_iter().enumerate() {
        if incompatible & 1 << bit != 0 {
            return Err(error);
        }
    }
    incompatible &= !0x1f;
    match incompatible {
        0 => Ok(()),
        bits => Err(HeaderError::Unknown(bits)),
    }
}

/// The backing file's format, among the header's extensions.
fn backing_format(
    area: &[u8],
    header_length: usize,
    is_v3: bool,
    name_offset: u64,
) -> Result<Option<String>, HeaderError> {
    let damaged = Err(HeaderError::Damaged("the extensions of its header"));
    let mut format = None;
    let mut at = header_length;
    loop {
        // Version 2 need not mark their end: the backing file's name or the cluster ends them.
        if !is_v3 && (at + 8 > area.len() || (name_offset != 0 && at as u64 >= name_offset)) {
            return Ok(format);
        }
        let Some(head) = area.get(at..at + 8) else {
            return damaged;
        };
        let (kind, length) = (u32_at(head, 0), u32_at(head, 4) as usize);
        if kind == EXTENSION_END {
            return Ok(format);
        }
        let Some(data) = area.get(at + 8..).and_then(|rest| rest.get(..length)) else {
            return damaged;
        };
        match kind {
            // imago would panic at a part of a name.
            EXTENSION_FEATURE_NAMES if !length.is_multiple_of(FEATURE_NAME_LENGTH) => {
                return damaged;
            }
            EXTENSION_BACKING_FORMAT => {
                format = Some(String::from_utf8_lossy(data).into_owned());
            }
            _ => {}
        }
        at += 8 + length.next_multiple_of(8);
    }
}

fn backing_name(area: &[u8], offset: u64, length: u32) -> Result<Option<PathBuf>, HeaderError> {
    if offset == 0 {
        return Ok(None);
    }
    let place = usize::try_from(offset)
        .ok()
        .and_then(|offset| area.get(offset..)?.get(..length as usize));
    match place {
        // A name ends at 1023 bytes, and the kernel's at a 0.
        Some(name) if (1..=1023).contains(&name.len()) && !name.contains(&0) => {
            Ok(Some(OsString::from_vec(name.to_vec()).into()))
        }
        _ => Err(HeaderError::Damaged("the name of its backing file")),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(number)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

#[cfg(test)]
mod tests;
