//! Recognises a kernel image and loads it.
//!
//! Everything about the image is checked before the first byte of it reaches guest memory, so that a wrong
//! file gets a sentence of its own instead of a guest that never says anything.

mod bzimage;
mod elf;
mod foreign;
pub(crate) mod kaslr;
#[cfg(test)]
mod tests;
pub mod unpack;

use std::error::Error as _;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;

use linux_loader::loader::bootparam::setup_header;
use thiserror::Error as ThisError;
use vm_memory::{GuestAddress, GuestMemoryError, GuestMemoryMmap};

use self::kaslr::Choice;
use crate::{Protocol, layout};

/// What is wrong with a kernel image.
#[derive(Debug, ThisError)]
pub enum Error {
    /// The path leads to a directory.
    #[error("it is a directory; give the path of the image itself, such as /boot/vmlinuz-...")]
    Directory,
    /// The file cannot be seeked or its metadata not be read.
    #[error("cannot find out its size; it must be a regular file")]
    Size(#[source] io::Error),
    /// Reading fails.
    #[error("cannot read it")]
    Read(#[source] io::Error),
    /// The file has no content.
    #[error("the file is empty; copy it again")]
    Empty,
    /// The file ends before the image does.
    #[error("the image is truncated: it needs {expected} bytes and has {actual}; copy it again")]
    Truncated {
        /// The bytes that the image says it has.
        expected: u64,
        /// The bytes of the file.
        actual: u64,
    },
    /// The whole file is compressed; a bzImage only has a compressed payload.
    #[error("it is {0}, not a bzImage or vmlinux; decompress it first")]
    Compressed(&'static str),
    /// Some other kind of file.
    #[error("it is {0}, not a kernel; give a bzImage or an ELF vmlinux for x86-64")]
    NotKernel(&'static str),
    /// A kernel or program for another kind of processor.
    #[error("it is made for {0}; give a kernel for x86-64")]
    OtherMachine(&'static str),
    /// An ELF file of class 32.
    #[error("it is a 32-bit ELF file; give a 64-bit kernel")]
    Elf32,
    /// An ELF file that is no executable with fixed addresses.
    #[error("it is an ELF {0}; a vmlinux is an executable linked at fixed addresses (-no-pie)")]
    ElfType(&'static str),
    /// A bzImage without the 64-bit entry point.
    #[error(
        "it is a bzImage without a 64-bit entry point; give a 64-bit kernel, Linux 3.8 or newer"
    )]
    Bzimage32,
    /// The image contradicts itself.
    #[error("the image is damaged: {0}")]
    Damaged(&'static str),
    /// The image overlaps memory that belongs to the boot data.
    #[error(
        "it is linked at {0:#x}, and the memory below 0x100000 is taken; link it at 1 MiB or above"
    )]
    TooLow(u64),
    /// The image needs memory that no guest has.
    #[error("it reaches up to {0:#x}, and a kernel must end below 0xc0000000; link it lower")]
    TooHigh(u64),
    /// The RAM ends before the kernel does.
    #[error(
        "it needs {} of memory to start, and the guest has {}; give it more memory",
        crate::mib_up(*.needs), crate::mib(*.ram_end)
    )]
    DoesNotFit {
        /// The end of the memory that the kernel uses until it manages memory by itself.
        needs: u64,
        /// The end of the RAM below 4 GiB.
        ram_end: u64,
    },
    /// Copying it into guest memory fails.
    #[error("cannot copy it into guest memory")]
    Copy(#[source] linux_loader::loader::Error),
    /// Guest memory refuses it.
    #[error("cannot write it to guest memory")]
    Write(#[source] GuestMemoryError),
}

/// How a kernel came into guest memory; for the log.
#[derive(Debug)]
pub enum Loaded {
    /// A vmlinux, which is as it runs.
    AsItIs,
    /// A bzImage that was unpacked here.
    Unpacked {
        /// It was moved to random addresses (KASLR).
        is_random: bool,
    },
    /// A bzImage that is left to its own decompressor, and why.
    UnpacksItself(unpack::Error),
}

impl fmt::Display for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AsItIs => f.write_str("loaded where it is linked"),
            Self::Unpacked { is_random: true } => {
                f.write_str("unpacked, at random addresses (KASLR)")
            }
            Self::Unpacked { is_random: false } => f.write_str("unpacked, where it is linked"),
            Self::UnpacksItself(why) => {
                write!(f, "left to unpack itself: {why}")?;
                why.source()
                    .map_or(Ok(()), |source| write!(f, ": {source}"))
            }
        }
    }
}

/// A kernel in guest memory.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub protocol: Protocol,
    pub entry: GuestAddress,
    /// The memory it uses before it reads the memory map: image, decompression buffer, BSS.
    pub occupied: Range<u64>,
    /// A bzImage's setup header, to be copied to the zero page.
    pub header: Option<setup_header>,
    /// The initrd must end at or below this address.
    pub initrd_end_max: u64,
    /// The longest command line in bytes, without the terminating NUL.
    pub cmdline_max: usize,
    pub loaded: Loaded,
}

/// A kernel image that has been checked and is still to be loaded.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    image: Image<'a>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Elf(elf::Plan),
    BzImage(bzimage::Plan),
}

impl<'a> Plan<'a> {
    /// Looks at the image in `file`, whatever its kind.
    pub(crate) fn new(memory: &GuestMemoryMmap, file: &'a mut File) -> Result<Self, Error> {
        let image = Image::open(file)?;
        let kind = if elf::is_elf(&image.head) {
            Kind::Elf(elf::Plan::new(memory, &image)?)
        } else if bzimage::is_bzimage(&image.head) {
            Kind::BzImage(bzimage::Plan::new(memory, &image)?)
        } else {
            return Err(foreign::name(&image));
        };
        Ok(Self { image, kind })
    }

    /// The memory it uses, unless it goes to a random place.
    pub(crate) fn occupied(&self) -> &Range<u64> {
        match &self.kind {
            Kind::Elf(plan) => &plan.occupied,
            Kind::BzImage(plan) => &plan.occupied,
        }
    }

    /// The initrd must end at or below this address.
    pub(crate) fn initrd_end_max(&self) -> u64 {
        match &self.kind {
            Kind::Elf(_) => elf::INITRD_END_MAX,
            Kind::BzImage(plan) => plan.initrd_end_max(),
        }
    }

    /// Loads the kernel, to memory of which `prepare` is called first.
    pub(crate) fn load(
        mut self,
        memory: &GuestMemoryMmap,
        choice: &Choice,
        prepare: &dyn Fn(Range<u64>),
    ) -> Result<Kernel, Error> {
        match self.kind {
            Kind::Elf(plan) => {
                prepare(plan.occupied.clone());
                plan.load(memory, &self.image)
            }
            Kind::BzImage(plan) => plan.load(memory, &mut self.image, choice, prepare),
        }
    }
}

/// An open kernel image whose size and first bytes are known.
#[derive(Debug)]
struct Image<'a> {
    file: &'a mut File,
    size: u64,
    /// The first [`HEAD_SIZE`] bytes, or fewer if the file is shorter.
    head: Vec<u8>,
}

/// Enough for the setup header of a bzImage and for every magic number.
const HEAD_SIZE: u64 = 1024;

impl<'a> Image<'a> {
    fn open(file: &'a mut File) -> Result<Self, Error> {
        let size = crate::rewind(file).map_err(Error::Size)?;
        let size = size.ok_or(Error::Directory)?;
        if size == 0 {
            return Err(Error::Empty);
        }
        let mut head = Vec::new();
        file.by_ref()
            .take(HEAD_SIZE)
            .read_to_end(&mut head)
            .map_err(Error::Read)?;
        if (head.len() as u64) < size.min(HEAD_SIZE) {
            // Somebody just cut it off.
            let (expected, actual) = (size, head.len() as u64);
            return Err(Error::Truncated { expected, actual });
        }
        Ok(Self { file, size, head })
    }

    /// Fails unless the file has `expected` bytes.
    fn require(&self, expected: u64) -> Result<(), Error> {
        if self.size < expected {
            let actual = self.size;
            return Err(Error::Truncated { expected, actual });
        }
        Ok(())
    }
}

/// Fails unless the RAM from address 0 reaches up to `needs`.
fn require_ram(memory: &GuestMemoryMmap, needs: u64) -> Result<(), Error> {
    if needs > layout::MMIO_HOLE_START.0 {
        return Err(Error::TooHigh(needs));
    }
    let ram_end = layout::low_ram_end(memory);
    if needs > ram_end {
        return Err(Error::DoesNotFit { needs, ram_end });
    }
    Ok(())
}
