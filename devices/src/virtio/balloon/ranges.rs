//! The memory that is given back: parts of guest memory, where they lie in this process.

use std::io;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::virtio::iovec::Iovecs;

/// A page, of the host and as the balloon counts them (virtio 1.2, 5.5.6).
pub const PAGE: usize = 4096;

/// Ranges of whole pages in guest memory, to be given back piece by piece.
#[derive(Debug, Default)]
pub struct Ranges(Iovecs);

impl Ranges {
    /// Of the pages with these numbers those that are guest memory.
    pub fn of_pages(memory: &GuestMemoryMmap, numbers: impl Iterator<Item = u32>) -> Self {
        let mut ranges = Self::default();
        for number in numbers {
            let at = GuestAddress(u64::from(number) * PAGE as u64);
            if let Ok(page) = GuestMemoryBackend::get_slice(memory, at, PAGE) {
                ranges.0.push(libc::iovec {
                    iov_base: page.ptr_guard_mut().as_ptr().cast(),
                    iov_len: PAGE,
                });
            }
        }
        ranges.merge();
        ranges
    }

    /// The whole pages in these pieces of guest memory.
    pub fn within(pieces: &[libc::iovec]) -> Self {
        let mut ranges = Self::default();
        for piece in pieces {
            let skipped = piece.iov_base.addr().wrapping_neg() % PAGE;
            let len = piece.iov_len.saturating_sub(skipped) / PAGE * PAGE;
            if len > 0 {
                ranges.0.push(libc::iovec {
                    iov_base: piece.iov_base.wrapping_byte_add(skipped),
                    iov_len: len,
                });
            }
        }
        ranges.merge();
        ranges
    }

    /// Has no byte in two of them, and as few of them as there can be: the last comes first.
    fn merge(&mut self) {
        let start = |range: &libc::iovec| range.iov_base.addr();
        self.0
            .sort_unstable_by_key(|range| std::cmp::Reverse(start(range)));
        // Each is the one before the last that has been kept, or touches it.
        self.0.dedup_by(|before, kept| {
            let end = start(before).saturating_add(before.iov_len);
            let touches = end >= start(kept);
            if touches {
                let end = end.max(start(kept) + kept.iov_len);
                *kept = libc::iovec {
                    iov_base: before.iov_base,
                    iov_len: end - start(before),
                };
            }
            touches
        });
    }

    /// Takes the next of them, or as much of it as `most` bytes.
    pub fn take(&mut self, most: usize) -> Option<libc::iovec> {
        let range = self.0.last_mut()?;
        let len = range.iov_len.min(most);
        let piece = libc::iovec {
            iov_len: len,
            ..*range
        };
        range.iov_base = range.iov_base.wrapping_byte_add(len);
        range.iov_len -= len;
        if range.iov_len == 0 {
            self.0.pop();
        }
        Some(piece)
    }

    /// Whether nothing is left to be given back.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// How guest memory is given back to the host. Whoever touches it again finds zeros.
#[derive(Clone, Copy, Debug)]
pub struct GiveBack(libc::c_int);

impl GiveBack {
    /// How this memory is: what a file holds has to be removed from it, or its pages stay.
    pub fn of(memory: &GuestMemoryMmap) -> Self {
        let is_shared = memory.iter().any(|region| region.file_offset().is_some());
        Self(if is_shared {
            libc::MADV_REMOVE
        } else {
            libc::MADV_DONTNEED
        })
    }

    /// Gives this much of it back.
    ///
    /// # Safety
    ///
    /// The piece has to be mapped memory of this process that there is no reference to, and whose
    /// content that is not needed.
    pub unsafe fn release(self, piece: &libc::iovec) -> io::Result<()> {
        // SAFETY: as for this function.
        match unsafe { libc::madvise(piece.iov_base, piece.iov_len, self.0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
