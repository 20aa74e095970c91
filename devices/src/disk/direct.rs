//! Transfers past the page cache (O_DIRECT): what the kernel asks of buffers, and buffers that meet
//! it.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// The most that is copied at once, in bytes: a multiple of every block size.
const MOST: usize = 256 << 10;
/// What no file asks more of.
const PAGE: usize = 4096;

/// What the kernel asks of each piece of memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Its address is a multiple of this.
    pub address: usize,
    /// Its length, and the offset in the file.
    pub len: usize,
}

impl Alignment {
    /// That of `file`, unless the page cache is between. A device's blocks are of `block` bytes.
    pub fn of(file: &File, block: u32) -> io::Result<Option<Self>> {
        // SAFETY: fcntl takes an open descriptor, which `file` owns, and F_GETFL no argument.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(io::Error::last_os_error());
        }
        if flags & libc::O_DIRECT == 0 {
            return Ok(None);
        }
        if let Some(alignment) = said(file) {
            return Ok(Some(alignment));
        }
        // Before Linux 6.1, or where the file system does not say: try.
        let mut bounce = Bounce::new(PAGE, PAGE);
        let mut works = |len: &usize| file.read_at(bounce.part(*len), 0).is_ok();
        let lens = [block as usize, PAGE];
        let len = lens.into_iter().find(|len| works(len)).unwrap_or(PAGE);
        Ok(Some(Self { address: len, len }))
    }

    /// Whether a piece is as the kernel asks.
    pub fn fits(self, piece: &libc::iovec) -> bool {
        (piece.iov_base as usize).is_multiple_of(self.address)
            && piece.iov_len.is_multiple_of(self.len)
    }
}

/// What the file system says (STATX_DIOALIGN).
fn said(file: &File) -> Option<Alignment> {
    let mut statx = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: statx fills the structure; the path is empty and ends with a 0.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            statx.as_mut_ptr(),
        )
    };
    // SAFETY: it consists of numbers, which were zero, and may be anything.
    let statx = unsafe { statx.assume_init() };
    let (address, len) = (statx.stx_dio_mem_align, statx.stx_dio_offset_align);
    let is_said = result == 0
        && statx.stx_mask & libc::STATX_DIOALIGN != 0
        && address.is_power_of_two()
        && len.is_power_of_two();
    is_said.then_some(Alignment {
        address: address as usize,
        len: len as usize,
    })
}

/// Memory, all zeros, that is aligned for any file.
#[derive(Debug)]
pub(super) struct Bounce {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Bounce {
    /// Room for `wanted` bytes, in multiples of `block`, but no more than is copied at once.
    pub fn new(wanted: usize, block: usize) -> Self {
        let len = wanted.clamp(1, MOST).next_multiple_of(block.max(1));
        let align = block.max(PAGE);
        let bytes = vec![0; len + align];
        let start = bytes.as_ptr().align_offset(align).min(align);
        Self { bytes, start, len }
    }

    /// How much it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// As much of it as `wanted`, or all.
    pub fn part(&mut self, wanted: usize) -> &mut [u8] {
        &mut self.bytes[self.start..][..wanted.min(self.len)]
    }
}
