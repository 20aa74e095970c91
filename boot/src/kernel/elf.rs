//! ELF: a vmlinux, or any freestanding 64-bit program that is entered like one (System V gABI, chapters 4 and 5).

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use linux_loader::elf::{self, Elf64_Ehdr, Elf64_Phdr};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::{Error, Image, Kernel, Loaded, require_ram};
use crate::share::share;
use crate::{Protocol, layout, write_to_new};

/// Linux' COMMAND_LINE_SIZE on x86 is 2048 with the NUL; an ELF image does not say.
const CMDLINE_MAX: usize = 2047;
/// Where an initrd of a bzImage has to end as well; any 64-bit kernel reaches that far.
pub(super) const INITRD_END_MAX: u64 = 0x8000_0000;

/// A huge page.
const HUGE: u64 = 2 << 20;
/// What is read at once: little enough to stay in the processor's cache until it is where it belongs.
const BUFFER: usize = 256 << 10;
/// The most of a note segment that is looked at; Linux' has 500 bytes.
const NOTES_MAX: u64 = 64 << 10;
/// The type of the note that names the entry point for PVH (`XEN_ELFNOTE_PHYS32_ENTRY`).
const XEN_PHYS32_ENTRY: u32 = 18;

pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(elf::ELFMAG)
}

/// A vmlinux that has been checked.
#[derive(Debug)]
pub(super) struct Plan {
    pieces: Vec<Piece>,
    protocol: Protocol,
    entry: u64,
    /// The memory it uses.
    pub occupied: Range<u64>,
}

/// A part of a segment: its place in the file and in memory.
#[derive(Debug)]
struct Piece {
    file: u64,
    memory: u64,
    size: u64,
}

impl Plan {
    pub(super) fn new(memory: &GuestMemoryMmap, image: &Image) -> Result<Self, Error> {
        let header = read_header(image)?;
        let headers = program_headers(&header, image)?;
        let segments = check_segments(&headers, image)?;
        let start = segments.iter().map(|s| s.start).min();
        let end = segments.iter().map(|s| s.end).max();
        let (Some(start), Some(end)) = (start, end) else {
            return Err(Error::Damaged("it has no segment to load"));
        };
        if start < layout::HIGH_RAM_START.0 {
            return Err(Error::TooLow(start));
        }
        require_ram(memory, end)?;
        let (protocol, entry) = match pvh_entry(&headers, image)? {
            Some(entry) => (Protocol::Pvh, entry),
            None => (Protocol::Linux64, header.e_entry),
        };
        if !segments.iter().any(|s| s.contains(&entry)) {
            return Err(Error::Damaged("its entry point is in no segment"));
        }
        let loaded = headers.iter().filter(|h| h.p_type == elf::PT_LOAD);
        Ok(Self {
            pieces: loaded.flat_map(pieces).collect(),
            protocol,
            entry,
            occupied: start..end,
        })
    }

    /// Reads the segments to their places.
    pub(super) fn load(self, memory: &GuestMemoryMmap, image: &Image) -> Result<Kernel, Error> {
        let file = &*image.file;
        share(&self.pieces, |buffer: &mut Vec<u8>, piece| {
            buffer.resize(BUFFER, 0);
            piece.load(memory, file, buffer)
        })?;
        Ok(Kernel {
            protocol: self.protocol,
            entry: GuestAddress(self.entry),
            occupied: self.occupied,
            header: None,
            initrd_end_max: INITRD_END_MAX,
            cmdline_max: CMDLINE_MAX,
            loaded: Loaded::AsItIs,
        })
    }
}

impl Piece {
    /// Reads it by way of `buffer`, since two threads cannot read from one file straight into guest memory.
    fn load(&self, memory: &GuestMemoryMmap, file: &File, buffer: &mut [u8]) -> Result<(), Error> {
        for done in (0..self.size).step_by(buffer.len()) {
            let size = (self.size - done).min(buffer.len() as u64);
            let part = &mut buffer[..size as usize];
            file.read_exact_at(part, self.file + done)
                .map_err(Error::Read)?;
            let to = GuestAddress(self.memory + done);
            write_to_new(memory, part, to).map_err(Error::Write)?;
        }
        Ok(())
    }
}

/// The pieces of a segment, each of them in one huge page at most.
fn pieces(header: &Elf64_Phdr) -> impl Iterator<Item = Piece> {
    let (offset, paddr, size) = (header.p_offset, header.p_paddr, header.p_filesz);
    let first = paddr / HUGE;
    let last = (paddr + size).div_ceil(HUGE);
    (first..last).map(move |page| {
        let start = paddr.max(page * HUGE);
        let end = (paddr + size).min((page + 1) * HUGE);
        Piece {
            file: offset + (start - paddr),
            memory: start,
            size: end - start,
        }
    })
}

/// The entry point for PVH, if a note names one (Xen's docs/misc/pvh.pandoc; System V gABI, chapter 5, "Note Section").
fn pvh_entry(headers: &[Elf64_Phdr], image: &Image) -> Result<Option<u64>, Error> {
    for header in headers.iter().filter(|h| h.p_type == elf::PT_NOTE) {
        let mut notes = vec![0; header.p_filesz.min(NOTES_MAX) as usize];
        image
            .file
            .read_exact_at(&mut notes, header.p_offset)
            .map_err(Error::Read)?;
        let mut notes = &notes[..];
        while let Some((note, rest)) = notes.split_at_checked(size_of::<[u32; 3]>()) {
            let word = |n: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| note[4 * n + byte]));
            let [name_size, size] = [word(0), word(1)].map(|size| size as usize);
            let content = rest
                .get(name_size.next_multiple_of(4)..)
                .unwrap_or_default();
            if word(2) == XEN_PHYS32_ENTRY && rest.get(..name_size) == Some(b"Xen\0") {
                let entry = content.first_chunk().filter(|_| size >= 4);
                let entry = entry.ok_or(Error::Damaged("its note for PVH has no address"))?;
                return Ok(Some(u32::from_le_bytes(*entry).into()));
            }
            notes = content.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
    }
    Ok(None)
}

/// The header of what has to be a 64-bit executable for x86-64.
fn read_header(image: &Image) -> Result<Elf64_Ehdr, Error> {
    let mut header = Elf64_Ehdr::default();
    image.require(size_of_val(&header) as u64)?;
    let bytes = header.as_mut_slice();
    bytes.copy_from_slice(&image.head[..bytes.len()]);
    let big_endian = header.e_ident[elf::EI_DATA] == elf::ELFDATA2MSB;
    let machine = match big_endian {
        true => header.e_machine.swap_bytes(),
        false => header.e_machine,
    };
    match (machine, header.e_ident[elf::EI_CLASS]) {
        (elf::EM_X86_64, elf::ELFCLASS64) => (),
        (elf::EM_X86_64 | elf::EM_386, _) => return Err(Error::Elf32),
        (machine, _) => return Err(Error::OtherMachine(machine_name(machine))),
    }
    if big_endian {
        return Err(Error::Damaged("an x86-64 file with big-endian numbers"));
    }
    match header.e_type {
        elf::ET_EXEC => Ok(header),
        elf::ET_REL => Err(Error::ElfType("object file (.o, .ko)")),
        elf::ET_DYN => Err(Error::ElfType(
            "shared object or position-independent executable",
        )),
        elf::ET_CORE => Err(Error::ElfType("core dump")),
        _ => Err(Error::ElfType("file of an unknown type")),
    }
}

fn machine_name(machine: u16) -> &'static str {
    match machine {
        elf::EM_MIPS => "MIPS",
        elf::EM_PPC | elf::EM_PPC64 => "PowerPC",
        elf::EM_S390 => "s390",
        elf::EM_ARM => "32-bit ARM",
        elf::EM_AARCH64 => "64-bit ARM",
        elf::EM_RISCV => "RISC-V",
        elf::EM_LOONGARCH => "LoongArch",
        _ => "another processor",
    }
}

fn program_headers(header: &Elf64_Ehdr, image: &Image) -> Result<Vec<Elf64_Phdr>, Error> {
    let entry_size = usize::from(header.e_phentsize);
    if entry_size != size_of::<Elf64_Phdr>() || header.e_phoff < size_of_val(header) as u64 {
        return Err(Error::Damaged(
            "its program headers have a wrong size or place",
        ));
    }
    let mut headers = vec![Elf64_Phdr::default(); header.e_phnum.into()];
    let size = (headers.len() * entry_size) as u64;
    image.require(header.e_phoff.saturating_add(size))?;
    for (header, at) in headers
        .iter_mut()
        .zip((header.e_phoff..).step_by(entry_size))
    {
        let read = image.file.read_exact_at(header.as_mut_slice(), at);
        read.map_err(Error::Read)?;
    }
    Ok(headers)
}

/// The guest memory that the segments take, once all of them are in the file and in the address space.
fn check_segments(headers: &[Elf64_Phdr], image: &Image) -> Result<Vec<Range<u64>>, Error> {
    let mut segments = Vec::new();
    for header in headers {
        let is_segment = header.p_type == elf::PT_LOAD;
        if is_segment || header.p_type == elf::PT_NOTE {
            image.require(header.p_offset.saturating_add(header.p_filesz))?;
        }
        if !is_segment || header.p_memsz == 0 && header.p_filesz == 0 {
            continue;
        }
        if header.p_filesz > header.p_memsz {
            return Err(Error::Damaged(
                "a segment is larger in the file than in memory",
            ));
        }
        let end = header.p_paddr.checked_add(header.p_memsz);
        let end = end.ok_or(Error::Damaged("a segment reaches beyond the address space"))?;
        segments.push(header.p_paddr..end);
    }
    Ok(segments)
}
