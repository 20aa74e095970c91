//! Finds room for the initrd and reads it there.

use std::fs::File;
use std::io;
use std::ops::Range;

use thiserror::Error as ThisError;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::kernel::Plan;
use crate::layout;

/// The initrd begins on a page of its own: the kernel frees it by pages.
const PAGE: u64 = 4096;

/// Why an initrd cannot be used.
#[derive(Debug, ThisError)]
pub enum Error {
    /// The path leads to a directory.
    #[error("it is a directory; pack it first: find . | cpio -o -H newc")]
    Directory,
    /// The file cannot be seeked or its metadata not be read.
    #[error("cannot find out its size; it must be a regular file")]
    Size(#[source] io::Error),
    /// The file has no content.
    #[error("the file is empty; omit the initrd if none is needed")]
    Empty,
    /// No gap in the RAM is large enough.
    #[error(
        "it has {} and the kernel takes {} of the guest's {} of memory below 4 GiB; \
         give the guest more memory",
        crate::mib_up(*.size), crate::mib_up(*.kernel), crate::mib(*.ram_end)
    )]
    DoesNotFit {
        /// The bytes of the initrd.
        size: u64,
        /// The bytes that the kernel takes.
        kernel: u64,
        /// The end of the RAM below 4 GiB.
        ram_end: u64,
    },
    /// Copying it into guest memory fails.
    #[error("cannot read it into guest memory")]
    Read(#[source] GuestMemoryError),
}

/// An initrd in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// Its first byte, on a page boundary.
    pub start: GuestAddress,
    /// Its length in bytes.
    pub size: u64,
}

impl Initrd {
    /// The memory it takes.
    pub(crate) fn range(&self) -> Range<u64> {
        self.start.0..self.start.0 + self.size
    }
}

/// Finds a place for the initrd in `file`, outside of the memory of `kernel`.
pub(crate) fn place(
    memory: &GuestMemoryMmap,
    file: &mut File,
    kernel: &Plan,
) -> Result<Initrd, Error> {
    let size = crate::rewind(file).map_err(Error::Size)?;
    let size = size.ok_or(Error::Directory)?;
    if size == 0 {
        return Err(Error::Empty);
    }
    let ram_end = layout::low_ram_end(memory);
    let highest = ram_end.min(kernel.initrd_end_max());
    let occupied = kernel.occupied();
    let start = highest_place(size, highest, occupied).ok_or(Error::DoesNotFit {
        size,
        kernel: occupied.end - occupied.start,
        ram_end,
    })?;
    let start = GuestAddress(start);
    Ok(Initrd { start, size })
}

/// Reads the initrd from `file`, which is at its start, straight to its place.
pub(crate) fn read(memory: &GuestMemoryMmap, mut file: &File, to: Initrd) -> Result<(), Error> {
    memory
        .read_exact_volatile_from(to.start, &mut file, to.size as usize)
        .map_err(Error::Read)
}

/// The highest place for `size` bytes that ends at or below `highest`, outside of `kernel`: above it if there is room,
/// else below it.
fn highest_place(size: u64, highest: u64, kernel: &Range<u64>) -> Option<u64> {
    let below = |end: u64| Some(end.checked_sub(size)? & !(PAGE - 1));
    let above_kernel = below(highest).filter(|&start| start >= kernel.end);
    let below_kernel =
        || below(highest.min(kernel.start)).filter(|&s| s >= layout::HIGH_RAM_START.0);
    above_kernel.or_else(below_kernel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::images::{bzimage, file_with, memory};
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn load(memory: &GuestMemoryMmap, file: &mut File) -> Result<Initrd, Error> {
        let mut kernel = file_with(&bzimage());
        let kernel = Plan::new(memory, &mut kernel).unwrap();
        let initrd = place(memory, file, &kernel)?;
        read(memory, file, initrd)?;
        Ok(initrd)
    }

    #[test]
    fn place_room_above_goes_to_the_top() {
        assert_eq!(
            highest_place(5 * MIB, 64 * MIB, &(16 * MIB..32 * MIB)),
            Some(59 * MIB)
        );
    }

    #[test]
    fn place_no_room_above_goes_just_below_the_kernel() {
        assert_eq!(
            highest_place(5 * MIB, 34 * MIB, &(16 * MIB..32 * MIB)),
            Some(11 * MIB)
        );
    }

    #[test]
    fn place_no_room_anywhere_is_none() {
        assert_eq!(
            highest_place(16 * MIB, 34 * MIB, &(16 * MIB..32 * MIB)),
            None
        );
    }

    #[test]
    fn load_file_is_copied_byte_for_byte() {
        let memory = memory(64);
        let content: Vec<u8> = (0..10_001u32).map(|n| n as u8).collect();
        let initrd = load(&memory, &mut file_with(&content)).unwrap();
        let mut copy = vec![0; content.len()];
        memory.read_slice(&mut copy, initrd.start).unwrap();
        assert_eq!(copy, content);
        assert_eq!(initrd.size, 10_001);
        assert_eq!(initrd.start.0 % PAGE, 0);
    }

    #[test]
    fn load_empty_file_is_refused() {
        let memory = memory(64);
        let error = load(&memory, &mut file_with(&[])).unwrap_err();
        assert!(matches!(error, Error::Empty));
    }

    #[test]
    fn load_directory_is_refused() {
        let memory = memory(64);
        let mut directory = File::open(std::env::temp_dir()).unwrap();
        let error = load(&memory, &mut directory).unwrap_err();
        assert!(matches!(error, Error::Directory));
    }

    #[test]
    fn load_larger_than_memory_names_the_sizes() {
        let memory = memory(64);
        let mut file = file_with(&[]);
        file.set_len(200 * MIB).unwrap(); // sparse
        let error = load(&memory, &mut file).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("200 MiB") && text.contains("64 MiB"),
            "{text}"
        );
    }

    proptest! {
        #[test]
        fn place_any_sizes_never_overlaps(
            size in 1..200 * MIB,
            highest in 0..256 * MIB,
            start in MIB..128 * MIB,
            length in 0..128 * MIB,
        ) {
            let kernel = start..start + length;
            if let Some(place) = highest_place(size, highest, &kernel) {
                prop_assert!(place >= MIB && place + size <= highest);
                prop_assert!(place >= kernel.end || place + size <= kernel.start);
                prop_assert_eq!(place % PAGE, 0);
            }
        }
    }
}
