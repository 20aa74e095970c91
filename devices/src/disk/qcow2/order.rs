//! The order in which what imago writes reaches the disk.
//!
//! After a power cut nothing may point to what is not there: no entry of an L2 table to a cluster
//! whose data or reference count is older, no entry of the L1 table to such an L2 table, none of the
//! refcount table to such a refcount block. What is counted and not pointed to is only lost space.
//!
//! imago writes refcount blocks before L2 tables when it has allocated clusters, and after them when
//! it has freed some. So a sync where the one kind follows the other, or an L2 table follows data or
//! precedes it, is enough between those. Entries of the L1 table and the refcount table it writes at once, before
//! the reference counts of what they point to: these wait here, until the image has had its tables
//! written.

use std::collections::HashSet;
use std::io;
use std::ops::Range;

use super::header::{Header, HeaderError, MAX_TABLE};

/// What a write is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Header,
    L1Entries,
    ReftableEntries,
    L2Table,
    Refblock,
    /// Data, or a table that nothing points to yet.
    Other,
}

/// Where an image's tables are, and what has been written since the last sync.
#[derive(Debug)]
pub(super) struct Order {
    header: Header,
    l2_tables: HashSet<u64>,
    refblocks: HashSet<u64>,
    /// Written since the last sync: refcount blocks, L2 tables, others.
    unsynced: [bool; 3],
    /// Whether a refcount block was written since the first of the waiting entries.
    refblock_written: bool,
    l1_waits: Vec<(u64, Vec<u8>)>,
    reftable_waits: Vec<(u64, Vec<u8>)>,
}

/// Reads bytes of the image at an offset.
pub(super) trait ReadAt: Fn(&mut [u8], u64) -> io::Result<()> {}
impl<F: Fn(&mut [u8], u64) -> io::Result<()>> ReadAt for F {}

/// Where the header says where the refcount table is.
const REFTABLE_AT: u64 = 48;
/// Bits of an entry that are the offset of a table, in the L1 table and the refcount table.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl Order {
    /// Finds the tables of an image with that header.
    pub fn new(header: &Header, read: impl ReadAt) -> io::Result<Self> {
        let mut order = Self {
            header: header.clone(),
            l2_tables: HashSet::new(),
            refblocks: HashSet::new(),
            unsynced: [false; 3],
            refblock_written: false,
            l1_waits: Vec::new(),
            reftable_waits: Vec::new(),
        };
        order.l2_tables = tables(&read, order.l1())?;
        order.refblocks = tables(&read, order.reftable())?;
        Ok(order)
    }

    /// How many refcount blocks there are.
    pub fn refblocks(&self) -> u64 {
        self.refblocks.len() as u64
    }

    /// The disk has grown.
    pub fn set_header(&mut self, header: &Header) {
        self.header.l1_entries = header.l1_entries;
        self.header.size = header.size;
    }

    /// Whether these refcount blocks are too many ([`Header::check_refblocks`]).
    pub fn check(&self, file_length: u64) -> Result<(), HeaderError> {
        self.header.check_refblocks(self.refblocks(), file_length)
    }

    /// What a write at that offset is of.
    pub fn kind(&self, at: u64, len: u64) -> Kind {
        let cluster = self.header.cluster_size();
        if at < cluster {
            return Kind::Header;
        }
        if self.l1().contains(&at) {
            return Kind::L1Entries;
        }
        if self.reftable().contains(&at) {
            return Kind::ReftableEntries;
        }
        if len == cluster && at.is_multiple_of(cluster) {
            if self.l2_tables.contains(&at) {
                return Kind::L2Table;
            }
            if self.refblocks.contains(&at) {
                return Kind::Refblock;
            }
        }
        Kind::Other
    }

    /// Whether imago may write that. An entry that points far outside the file makes it grow the
    /// refcount table as far; more than is read back at the next start is not written.
    pub fn allows(&self, kind: Kind, len: u64, bytes: impl FnOnce() -> Vec<u8>) -> bool {
        match kind {
            Kind::Header => self
                .moved(
                    bytes()
                        .get(REFTABLE_AT as usize..)
                        .and_then(|rest| rest.get(..12)),
                )
                .is_none_or(|moved| moved.is_ok()),
            Kind::Other => len <= MAX_TABLE,
            _ => true,
        }
    }

    /// Keeps entries back until what they point to is counted.
    pub fn wait(&mut self, kind: Kind, at: u64, bytes: Vec<u8>) {
        let (waits, known) = match kind {
            Kind::ReftableEntries => (&mut self.reftable_waits, &mut self.refblocks),
            _ => (&mut self.l1_waits, &mut self.l2_tables),
        };
        known.extend(offsets(&bytes));
        if waits.is_empty() && kind == Kind::ReftableEntries {
            self.refblock_written = false;
        }
        waits.push((at, bytes));
    }

    pub fn has_pending(&self) -> bool {
        !self.l1_waits.is_empty() || !self.reftable_waits.is_empty()
    }

    pub fn l1_entries(&mut self) -> &mut Vec<(u64, Vec<u8>)> {
        &mut self.l1_waits
    }

    pub fn reftable_entries(&mut self) -> &mut Vec<(u64, Vec<u8>)> {
        &mut self.reftable_waits
    }

    /// Whether an L2 table that is written now may point to clusters that a waiting refcount block
    /// counts: imago has allocated some if it writes the counts first.
    pub fn refblocks_precede(&self) -> bool {
        self.refblock_written
    }

    /// Whether a sync has to come before a refcount block, or data: an L2 table may have lost pointers
    /// to clusters that are counted as free now, or are used anew.
    pub fn after_l2_table(&self) -> bool {
        self.unsynced[1]
    }

    /// Whether a sync has to come before an L2 table.
    pub fn before_l2_table(&self) -> bool {
        self.unsynced[0] || self.unsynced[2]
    }

    pub fn is_synced(&self) -> bool {
        self.unsynced == [false; 3]
    }

    pub fn wrote(&mut self, kind: Kind) {
        let index = match kind {
            Kind::Refblock => 0,
            Kind::L2Table => 1,
            _ => 2,
        };
        self.unsynced[index] = true;
        self.refblock_written |= kind == Kind::Refblock;
    }

    pub fn synced(&mut self) {
        self.unsynced = [false; 3];
    }

    /// Looks where the refcount table is after the header was written, and which blocks it has.
    pub fn find_reftable(&mut self, read: impl ReadAt) -> io::Result<()> {
        let mut pointer = [0; 12];
        read(&mut pointer, REFTABLE_AT)?;
        match self.moved(Some(&pointer)) {
            Some(Ok(header)) => {
                self.reftable_waits.clear();
                self.header = header;
                self.refblocks = tables(&read, self.reftable())?;
                Ok(())
            }
            Some(Err(_)) => Err(io::Error::from_raw_os_error(libc::EIO)),
            None => Ok(()),
        }
    }

    /// The header with the refcount table that `pointer` says, if that is another one.
    fn moved(&self, pointer: Option<&[u8]>) -> Option<Result<Header, HeaderError>> {
        let (offset, clusters) = pointer?.split_at(8);
        let header = Header {
            reftable_offset: number(offset),
            reftable_clusters: number(clusters),
            ..self.header.clone()
        };
        if header.reftable_offset == self.header.reftable_offset {
            return None;
        }
        Some(header.check_tables().map(|()| header))
    }

    fn l1(&self) -> Range<u64> {
        self.header.l1_offset..self.header.l1_offset + self.header.l1_entries * 8
    }

    fn reftable(&self) -> Range<u64> {
        self.header.reftable_offset..self.header.reftable_offset + self.header.reftable_bytes()
    }
}

/// The tables that a table of the first level points to.
fn tables(read: impl ReadAt, range: Range<u64>) -> io::Result<HashSet<u64>> {
    let mut found = HashSet::new();
    let mut piece = vec![0; 64 << 10];
    let mut at = range.start;
    while at < range.end {
        let len = piece.len().min((range.end - at) as usize);
        read(&mut piece[..len], at)?;
        found.extend(offsets(&piece[..len]));
        at += len as u64;
    }
    Ok(found)
}

fn offsets(entries: &[u8]) -> impl Iterator<Item = u64> {
    let offsets = entries.chunks_exact(8).map(|entry| number(entry) & OFFSET);
    offsets.filter(|offset| *offset != 0)
}

/// A number as qcow2 has it.
fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}
