//! What a chain asks for (virtio 1.2, 5.2.6), however the driver has cut it into buffers.

use virtio_bindings::virtio_blk as spec;

use super::device::SEG_MAX;
use crate::disk::{Image, SECTOR};
use crate::virtio::iovec::gather;
use crate::virtio::queue::Buffers;

/// The most that one range of a discard may have: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// The most ranges that one discard may have.
pub(super) const MAX_RANGES: usize = 16;
/// The most that may be made zeros at once, in one range: 128 MiB. Where the host cannot do so by
/// itself, this many zeros are written.
pub(super) const MAX_ZEROES_SECTORS: u32 = 1 << 18;

/// The most bytes that a piece of data may have. With the most pieces that a request may have it
/// bounds what a guest can keep the disk busy with, which a pause and the guest's end wait for.
pub(super) const SIZE_MAX: u32 = 1 << 18;
/// The most that is read or written at once: what a driver reaches that heeds both limits.
const MAX_TRANSFER: u64 = SEG_MAX as u64 * SIZE_MAX as u64;

/// Bytes of the header: kind, a reserved field, sector.
const HEADER_LEN: usize = 16;
/// Bytes of a range: sector, count of sectors, flags.
const RANGE_LEN: usize = 16;

/// How a request ended, as the driver reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = spec::VIRTIO_BLK_S_OK as u8,
    IoError = spec::VIRTIO_BLK_S_IOERR as u8,
    Unsupported = spec::VIRTIO_BLK_S_UNSUPP as u8,
}

/// What a disk is to do. Offsets are in bytes, and lie within the image with what follows them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Request {
    Read {
        offset: u64,
    },
    Write {
        offset: u64,
    },
    #[default]
    Flush,
    Serial,
    Discard(Vec<Range>),
    WriteZeroes {
        range: Range,
        may_unmap: bool,
    },
}

/// A part of the image, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub offset: u64,
    pub len: u64,
}

/// The buffers of a chain that has a header and room for the status: the status stands last among
/// the writable ones, in one of its own.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Parts {
    /// The header, read once: the driver could change it meanwhile.
    header: [u8; HEADER_LEN],
    /// How many of the readable buffers are the header's.
    header_buffers: usize,
}

impl Parts {
    /// Cuts header and status off; none where one of them is missing. A status that is there without
    /// a header can be set to [`Status::IoError`].
    pub fn split(buffers: &mut Buffers) -> Option<Self> {
        let status = buffers.writable.last_mut()?;
        if status.iov_len > 1 {
            status.iov_len -= 1;
            let last = status.iov_base.wrapping_byte_add(status.iov_len);
            buffers.writable.push(libc::iovec {
                iov_base: last,
                iov_len: 1,
            });
        }
        let mut header = [0; HEADER_LEN];
        // SAFETY: the iovecs are those of a chain that `Queue::pop` resolved inside guest memory,
        // which the queue keeps mapped.
        let len = unsafe { gather(&buffers.readable, 0, &mut header) };
        if len < HEADER_LEN {
            return None;
        }
        let (mut left, mut header_buffers) = (HEADER_LEN, 0);
        for buffer in buffers.readable.iter_mut() {
            if buffer.iov_len > left {
                buffer.iov_base = buffer.iov_base.wrapping_byte_add(left);
                buffer.iov_len -= left;
                break;
            }
            left -= buffer.iov_len;
            header_buffers += 1;
        }
        Some(Self {
            header,
            header_buffers,
        })
    }

    /// What the driver sends besides the header.
    pub fn sent<'a>(&self, buffers: &'a Buffers) -> &'a [libc::iovec] {
        &buffers.readable[self.header_buffers..]
    }

    /// Where the driver wants an answer, but for the status.
    pub fn wanted<'a>(&self, buffers: &'a Buffers) -> &'a [libc::iovec] {
        let (_, wanted) = buffers.writable.split_last().unwrap_or((&EMPTY, &[]));
        wanted
    }

    /// What the driver asks of `image`.
    pub fn request(
        &self,
        buffers: &Buffers,
        image: &dyn Image,
        readonly: bool,
    ) -> Result<Request, Status> {
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = self.header;
        let (kind, sector) = (
            u32::from_le_bytes([k0, k1, k2, k3]),
            u64::from_le_bytes(sector),
        );
        let writes = matches!(
            kind,
            spec::VIRTIO_BLK_T_OUT | spec::VIRTIO_BLK_T_DISCARD | spec::VIRTIO_BLK_T_WRITE_ZEROES
        );
        if writes && readonly {
            return Err(Status::IoError);
        }
        let offset = |data| {
            let range = range(image, sector, bytes(data))?;
            let small = range.len <= MAX_TRANSFER;
            small.then_some(range.offset).ok_or(Status::IoError)
        };
        match kind {
            spec::VIRTIO_BLK_T_IN => {
                let offset = offset(self.wanted(buffers))?;
                Ok(Request::Read { offset })
            }
            spec::VIRTIO_BLK_T_OUT => {
                let offset = offset(self.sent(buffers))?;
                Ok(Request::Write { offset })
            }
            spec::VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
            spec::VIRTIO_BLK_T_GET_ID => Ok(Request::Serial),
            spec::VIRTIO_BLK_T_DISCARD => discard(self.sent(buffers), image),
            spec::VIRTIO_BLK_T_WRITE_ZEROES => write_zeroes(self.sent(buffers), image),
            _ => Err(Status::Unsupported),
        }
    }
}

const EMPTY: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// Bytes in all of them.
pub(super) fn bytes(iovecs: &[libc::iovec]) -> u64 {
    iovecs.iter().map(|iovec| iovec.iov_len as u64).sum()
}

/// The part of the image that begins there, if it is one that the image can be asked for.
fn range(image: &dyn Image, sector: u64, len: u64) -> Result<Range, Status> {
    let block = u64::from(image.blocks().logical);
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
    let end = offset.checked_add(len).ok_or(Status::IoError)?;
    let fits = end <= image.size() && offset.is_multiple_of(block) && len.is_multiple_of(block);
    fits.then_some(Range { offset, len }).ok_or(Status::IoError)
}

/// Of one range: sector, count of sectors, flags.
fn fields(bytes: &[u8; RANGE_LEN]) -> (u64, u32, u32) {
    let [sector @ .., c0, c1, c2, c3, f0, f1, f2, f3] = *bytes;
    (
        u64::from_le_bytes(sector),
        u32::from_le_bytes([c0, c1, c2, c3]),
        u32::from_le_bytes([f0, f1, f2, f3]),
    )
}

/// The ranges that `iovecs` hold, of which there may be so many. They are read once, before any of
/// them is looked at.
fn ranges(iovecs: &[libc::iovec], most: usize) -> Result<Vec<(u64, u32, u32)>, Status> {
    let mut raw = vec![0; RANGE_LEN * most + 1];
    // SAFETY: the iovecs are those of a chain that `Queue::pop` resolved inside guest memory, which
    // the queue keeps mapped.
    let len = unsafe { gather(iovecs, 0, &mut raw) };
    match raw[..len].as_chunks() {
        (ranges, []) if !ranges.is_empty() => Ok(ranges.iter().map(fields).collect()),
        _ => Err(Status::IoError),
    }
}

fn discard(iovecs: &[libc::iovec], image: &dyn Image) -> Result<Request, Status> {
    let ranges = ranges(iovecs, MAX_RANGES)?;
    // A discard has no flags (5.2.6.2).
    if ranges.iter().any(|&(.., flags)| flags != 0) {
        return Err(Status::Unsupported);
    }
    let checked = ranges.into_iter().map(|(sector, count, _)| {
        let small = count <= MAX_DISCARD_SECTORS;
        let range = range(image, sector, u64::from(count) * SECTOR)?;
        small.then_some(range).ok_or(Status::IoError)
    });
    checked.collect::<Result<_, _>>().map(Request::Discard)
}

fn write_zeroes(iovecs: &[libc::iovec], image: &dyn Image) -> Result<Request, Status> {
    let ranges = ranges(iovecs, 1)?;
    let &[(sector, count, flags)] = &ranges[..] else {
        return Err(Status::IoError);
    };
    if flags & !spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
        return Err(Status::Unsupported);
    }
    if count > MAX_ZEROES_SECTORS {
        return Err(Status::IoError);
    }
    Ok(Request::WriteZeroes {
        range: range(image, sector, u64::from(count) * SECTOR)?,
        may_unmap: flags != 0,
    })
}
