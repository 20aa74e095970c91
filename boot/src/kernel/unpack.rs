//! Unpacks a bzImage's payload to where the kernel in it runs, and moves it to a random place as its own
//! decompressor would. docs/performance.md has what it takes.

mod relocations;
mod stream;
#[cfg(test)]
mod tests;
mod vmlinux;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use thiserror::Error as ThisError;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

use self::vmlinux::{Destination, Vmlinux};
use super::kaslr::{Choice, Movable, Place};
use crate::layout;

/// Why a payload is left to the kernel's own decompressor.
#[derive(Debug, ThisError)]
pub enum Error {
    /// Its first bytes are of no format that is unpacked here.
    #[error("it is packed by {0}")]
    Format(&'static str),
    /// The setup header says that it runs at one place alone, or at an odd one.
    #[error("its header does not say that it can be moved by multiples of 2 MiB")]
    Header,
    /// It contradicts itself.
    #[error("its payload is damaged: {0}")]
    Payload(&'static str),
    /// The file cannot be read.
    #[error("cannot read its payload")]
    Read(#[source] io::Error),
    /// It is not what its first bytes say, or cannot be read.
    #[error("cannot unpack its payload")]
    Stream(#[source] io::Error),
    /// It contains something else than a kernel.
    #[error("no kernel is in its payload: {0}")]
    Elf(&'static str),
    /// The kernel cannot be moved.
    #[error("its relocations are odd: {0}")]
    Relocations(&'static str),
    /// The kernel's memory is not all there.
    #[error("cannot write to the kernel's memory")]
    Memory(#[source] GuestMemoryError),
}

/// A bzImage's payload.
#[derive(Debug)]
pub(super) struct Packed<'a> {
    file: &'a File,
    start: u64,
    /// Its length in the file, without the length of what is in it, which follows.
    packed: u64,
    /// The length of what is in it.
    unpacked: u64,
}

impl<'a> Packed<'a> {
    /// The payload of `size` bytes that begins at `start`, which has to lie within the file.
    pub(super) fn open(file: &'a File, start: u64, size: u64) -> Result<Self, Error> {
        let mut length = [0; 4];
        let packed = size.checked_sub(length.len() as u64);
        let packed = packed.ok_or(Error::Payload("it is too short"))?;
        file.read_exact_at(&mut length, start + packed)
            .map_err(Error::Read)?;
        let unpacked = u32::from_le_bytes(length).into();
        Ok(Self {
            file,
            start,
            packed,
            unpacked,
        })
    }

    /// Reads from `at` on.
    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), Error> {
        if at.saturating_add(bytes.len() as u64) > self.packed {
            return Err(Error::Payload("it is too short"));
        }
        self.file
            .read_exact_at(bytes, self.start + at)
            .map_err(Error::Read)
    }

    /// Unpacks it into what `open` makes of its beginning.
    fn unpack<'m>(
        &self,
        open: impl FnOnce(&[u8]) -> Result<Destination<'m>, Error>,
    ) -> Result<Destination<'m>, Error> {
        let mut magic = [0; 6];
        self.read(0, &mut magic)?;
        match magic.starts_with(&stream::GZIP) {
            true => stream::unpack_gzip(self, open),
            false => Err(Error::Format(name(&magic))),
        }
    }
}

/// The format that begins like this, where it has a name.
fn name(magic: &[u8]) -> &'static str {
    let names: [(&[u8], _); 7] = [
        (b"\x02\x21\x4c\x18", "LZ4"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x5d\0\0", "LZMA"),
        (b"BZh", "bzip2"),
        (b"\x89LZO", "LZO"),
        (b"\x7fELF", "nothing"),
    ];
    let mut names = names.iter();
    let found = names.find(|(begin, _)| magic.starts_with(begin));
    found.map_or("an unknown program", |(_, name)| name)
}

/// A kernel that is where it runs.
#[derive(Debug)]
pub(super) struct Unpacked {
    /// Its physical address.
    pub start: u64,
    /// Its entry point.
    pub entry: GuestAddress,
    /// It is at a random place.
    pub is_random: bool,
}

/// Unpacks the kernel. One that cannot be moved, or must not, goes where it is linked.
pub(super) fn load(
    memory: &GuestMemoryMmap,
    payload: &Packed,
    kernel: Movable,
    choice: &Choice,
    prepare: &dyn Fn(Range<u64>),
) -> Result<Unpacked, Error> {
    if payload.unpacked > kernel.size {
        return Err(Error::Payload(
            "it unpacks to more than the kernel's memory",
        ));
    }
    let ram_end = layout::low_ram_end(memory);
    let mut place = None;
    let destination = payload.unpack(|first| {
        let space = kernel.linked..kernel.linked + kernel.size;
        let vmlinux = Vmlinux::read(first, payload.unpacked, &space)?;
        if vmlinux.end < payload.unpacked {
            place = choice.place(kernel, ram_end);
        }
        let start = place.map_or(kernel.linked, |place| place.physical);
        prepare(start..start + kernel.size);
        let length = payload.unpacked;
        Ok(Destination::new(vmlinux, memory, start, length))
    })?;
    let start = place.map_or(kernel.linked, |place| place.physical);
    let entry = GuestAddress(start + destination.vmlinux.entry);
    if let Some(Place { offset, .. }) = place {
        let image = memory.get_slice(GuestAddress(start), kernel.size as usize);
        let image = image.map_err(Error::Memory)?;
        relocations::apply(&destination.rest, &image, kernel.linked, offset)?;
    }
    Ok(Unpacked {
        start,
        entry,
        is_random: place.is_some(),
    })
}
