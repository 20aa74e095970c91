//! Guest memory as iovecs describe it, and copies between it and memory of our own.
//!
//! The guest's CPUs and other queues may touch the same bytes at any time, so that no reference into
//! guest memory is ever made: what is copied goes through vm-memory's volatile slices.

use std::ops::{Deref, DerefMut};

use vm_memory::VolatileSlice;

/// Iovecs that may move between threads.
#[derive(Debug, Default)]
pub struct Iovecs(Vec<libc::iovec>);

// SAFETY: an iovec is an address and a length. Reading or writing what lies there is unsafe, on
// whichever thread, and whoever does it has to make sure that the memory is there.
unsafe impl Send for Iovecs {}

impl Deref for Iovecs {
    type Target = Vec<libc::iovec>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Iovecs {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

/// Pieces of memory that others may touch at any time: a request's part of guest memory. Holding one
/// proves that they stay accessible for `'a`.
#[derive(Clone, Copy, Debug)]
pub struct Segments<'a>(&'a [libc::iovec]);

impl<'a> Segments<'a> {
    /// The pieces that `iovecs` describe, in order.
    ///
    /// # Safety
    ///
    /// Each has to be memory that may be read and written as long as `'a`, and to which there is no
    /// reference.
    pub unsafe fn new(iovecs: &'a [libc::iovec]) -> Self {
        Self(iovecs)
    }

    /// Where they lie, for the kernel.
    pub fn iovecs(self) -> &'a [libc::iovec] {
        self.0
    }

    /// Bytes in all of them.
    pub fn bytes(self) -> usize {
        self.0.iter().map(|iovec| iovec.iov_len).sum()
    }
}

/// Copies what lies from offset `at` on into `to`, and returns how much there was.
///
/// # Safety
///
/// Each iovec must describe memory that may be read, and none of it may be part of `to`.
pub(crate) unsafe fn gather(iovecs: &[libc::iovec], at: usize, to: &mut [u8]) -> usize {
    let mut done = 0;
    // SAFETY: as for this function.
    for piece in unsafe { pieces(iovecs, at, to.len()) } {
        done += piece.copy_to(&mut to[done..]);
    }
    done
}

/// Writes `bytes` from offset `at` on, as far as there is room.
///
/// # Safety
///
/// Each iovec must describe memory that may be written, and none of it may be part of `bytes`.
pub(crate) unsafe fn scatter(iovecs: &[libc::iovec], at: usize, bytes: &[u8]) {
    let mut done = 0;
    // SAFETY: as for this function.
    for piece in unsafe { pieces(iovecs, at, bytes.len()) } {
        piece.copy_from(&bytes[done..]);
        done += piece.len();
    }
}

/// Adds to `to` where the `left` bytes from offset `at` on lie, or as many of them as there are.
pub(crate) fn part(
    iovecs: &[libc::iovec],
    mut at: usize,
    mut left: usize,
    to: &mut Vec<libc::iovec>,
) {
    for iovec in iovecs {
        let here = iovec.iov_len.saturating_sub(at).min(left);
        if here > 0 {
            to.push(libc::iovec {
                iov_base: iovec.iov_base.cast::<u8>().wrapping_add(at).cast(),
                iov_len: here,
            });
        }
        at = at.saturating_sub(iovec.iov_len);
        left -= here;
        if left == 0 {
            break;
        }
    }
}

/// Where the `left` bytes from offset `at` on lie, or as many of them as there are: pieces, none of
/// them empty.
///
/// # Safety
///
/// Each iovec must describe memory that stays accessible for as long as the pieces are used.
unsafe fn pieces<'a>(
    iovecs: &'a [libc::iovec],
    mut at: usize,
    mut left: usize,
) -> impl Iterator<Item = VolatileSlice<'a>> {
    let mut iovecs = iovecs.iter();
    std::iter::from_fn(move || {
        while left > 0 {
            let iovec = iovecs.next()?;
            let here = iovec.iov_len.saturating_sub(at).min(left);
            // Inside the iovec, wherever `here` is not 0.
            let piece = iovec.iov_base.cast::<u8>().wrapping_add(at);
            at = at.saturating_sub(iovec.iov_len);
            left -= here;
            if here > 0 {
                // SAFETY: `piece` has `here` bytes, which stay accessible by the caller's word.
                return Some(unsafe { VolatileSlice::new(piece, here) });
            }
        }
        None
    })
}

/// Leaves no more than the first `len` bytes.
pub(crate) fn truncate(iovecs: &mut Vec<libc::iovec>, mut len: usize) {
    iovecs.retain_mut(|iovec| {
        iovec.iov_len = iovec.iov_len.min(len);
        len -= iovec.iov_len;
        iovec.iov_len > 0
    });
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Iovecs for `bytes`, cut into pieces of `piece` bytes with empty ones between.
    pub(crate) fn iovecs(bytes: &mut [u8], piece: usize) -> Vec<libc::iovec> {
        let empty = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        let pieces = bytes.chunks_mut(piece).map(|chunk| libc::iovec {
            iov_base: chunk.as_mut_ptr().cast(),
            iov_len: chunk.len(),
        });
        pieces.flat_map(|iovec| [empty, iovec]).collect()
    }

    proptest::proptest! {
        #[test]
        fn gather_gives_what_lies_there(
            bytes in proptest::collection::vec(0..=255u8, 0..60),
            piece in 1..20usize,
            at in 0..80usize,
            len in 0..80usize,
        ) {
            let expected: Vec<u8> = bytes.iter().skip(at).take(len).copied().collect();
            let mut lent = bytes;
            let mut to = vec![0; len];
            // SAFETY: the iovecs describe parts of `lent`.
            let done = unsafe { gather(&iovecs(&mut lent, piece), at, &mut to) };
            assert_eq!(&to[..done], expected);
        }

        #[test]
        fn part_is_what_gather_finds(
            bytes in proptest::collection::vec(0..=255u8, 0..60),
            piece in 1..20usize,
            at in 0..80usize,
            len in 0..80usize,
        ) {
            let expected: Vec<u8> = bytes.iter().skip(at).take(len).copied().collect();
            let (mut lent, mut found) = (bytes, Vec::new());
            part(&iovecs(&mut lent, piece), at, len, &mut found);
            assert!(found.iter().all(|iovec| iovec.iov_len > 0));
            let mut to = vec![0; len];
            // SAFETY: the iovecs describe parts of `lent`.
            let done = unsafe { gather(&found, 0, &mut to) };
            assert_eq!(&to[..done], expected);
        }

        #[test]
        fn scatter_writes_there_and_nowhere_else(
            written in proptest::collection::vec(1..=255u8, 0..80),
            room in 0..60usize,
            piece in 1..20usize,
            at in 0..80usize,
        ) {
            let mut expected = vec![0; room];
            for (to, byte) in expected.iter_mut().skip(at).zip(&written) {
                *to = *byte;
            }
            let mut lent = vec![0; room];
            // SAFETY: the iovecs describe parts of `lent`.
            unsafe { scatter(&iovecs(&mut lent, piece), at, &written) };
            assert_eq!(lent, expected);
        }
    }
}
