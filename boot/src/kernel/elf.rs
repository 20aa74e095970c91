//! ELF: a vmlinux, or any freestanding 64-bit program that is entered like one (System V gABI, chapters 4 and 5).

use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{Error, Image, Kernel, require_ram};
use crate::{Protocol, layout};

const HEADER_SIZE: u64 = 64;
const PROGRAM_HEADER_SIZE: u16 = 56;
const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// Linux' COMMAND_LINE_SIZE on x86 is 2048 with the NUL; an ELF image does not say.
const CMDLINE_MAX: usize = 2047;
/// Where an initrd of a bzImage has to end as well; any 64-bit kernel reaches that far.
const INITRD_END_MAX: u64 = 0x8000_0000;

pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
}

pub(super) fn load(memory: &GuestMemoryMmap, image: &mut Image) -> Result<Kernel, Error> {
    check_header(image)?;
    let segments = check_segments(&program_headers(image)?, image)?;
    let start = segments.iter().map(|s| s.start).min();
    let end = segments.iter().map(|s| s.end).max();
    let (Some(start), Some(end)) = (start, end) else {
        return Err(Error::Damaged("it has no segment to load"));
    };
    if start < layout::HIGH_RAM_START.0 {
        return Err(Error::TooLow(start));
    }
    require_ram(memory, end)?;

    let loaded = Elf::load(memory, None, image.file, None).map_err(Error::Copy)?;
    let (protocol, entry) = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => (Protocol::Pvh, entry),
        _ => (Protocol::Linux64, loaded.kernel_load),
    };
    if !segments.iter().any(|s| s.contains(&entry.0)) {
        return Err(Error::Damaged("its entry point is in no segment"));
    }
    Ok(Kernel {
        protocol,
        entry: GuestAddress(entry.0),
        occupied: start..end,
        header: None,
        initrd_end_max: INITRD_END_MAX,
        cmdline_max: CMDLINE_MAX,
    })
}

/// Fails unless this is a 64-bit executable for x86-64.
fn check_header(image: &Image) -> Result<(), Error> {
    image.require(HEADER_SIZE)?;
    let class = image.head[4];
    let big_endian = image.head[5] == 2;
    let half = |at: usize| {
        let bytes = [image.head[at], image.head[at + 1]];
        match big_endian {
            true => u16::from_be_bytes(bytes),
            false => u16::from_le_bytes(bytes),
        }
    };
    match (half(18), class) {
        (EM_X86_64, 2) => (),
        (EM_X86_64 | 3, _) => return Err(Error::Elf32),
        (machine, _) => return Err(Error::OtherMachine(machine_name(machine))),
    }
    if big_endian {
        return Err(Error::Damaged("an x86-64 file with big-endian numbers"));
    }
    match half(16) {
        ET_EXEC => Ok(()),
        1 => Err(Error::ElfType("object file (.o, .ko)")),
        3 => Err(Error::ElfType(
            "shared object or position-independent executable",
        )),
        4 => Err(Error::ElfType("core dump")),
        _ => Err(Error::ElfType("file of an unknown type")),
    }
}

fn machine_name(machine: u16) -> &'static str {
    match machine {
        8 => "MIPS",
        20 | 21 => "PowerPC",
        22 => "s390",
        40 => "32-bit ARM",
        183 => "64-bit ARM",
        243 => "RISC-V",
        258 => "LoongArch",
        _ => "another processor",
    }
}

/// The fields of a program header that matter to a loader.
struct ProgramHeader {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

fn program_headers(image: &mut Image) -> Result<Vec<ProgramHeader>, Error> {
    let offset = le_u64(&image.head, 32);
    let entry_size = le_u16(&image.head, 54);
    let count = le_u16(&image.head, 56);
    if entry_size != PROGRAM_HEADER_SIZE || offset < HEADER_SIZE {
        return Err(Error::Damaged(
            "its program headers have a wrong size or place",
        ));
    }
    let size = u64::from(count) * u64::from(entry_size);
    image.require(offset.saturating_add(size))?;
    let mut table = vec![0; size as usize];
    image
        .file
        .seek(SeekFrom::Start(offset))
        .and_then(|_| image.file.read_exact(&mut table))
        .map_err(Error::Read)?;
    let headers = table.chunks_exact(entry_size.into());
    Ok(headers
        .map(|bytes| ProgramHeader {
            kind: le_u32(bytes, 0),
            offset: le_u64(bytes, 8),
            address: le_u64(bytes, 24),
            file_size: le_u64(bytes, 32),
            memory_size: le_u64(bytes, 40),
        })
        .collect())
}

/// The guest memory that the segments take, once all of them are in the file and in the address space.
fn check_segments(headers: &[ProgramHeader], image: &Image) -> Result<Vec<Range<u64>>, Error> {
    let mut segments = Vec::new();
    for header in headers {
        if header.kind == PT_LOAD || header.kind == PT_NOTE {
            image.require(header.offset.saturating_add(header.file_size))?;
        }
        if header.kind != PT_LOAD || header.memory_size == 0 && header.file_size == 0 {
            continue;
        }
        if header.file_size > header.memory_size {
            return Err(Error::Damaged(
                "a segment is larger in the file than in memory",
            ));
        }
        let end = header.address.checked_add(header.memory_size);
        let end = end.ok_or(Error::Damaged("a segment reaches beyond the address space"))?;
        segments.push(header.address..end);
    }
    Ok(segments)
}

// The callers know that the bytes are there.
fn le_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from(le_u16(bytes, at)) | u32::from(le_u16(bytes, at + 2)) << 16
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le_u32(bytes, at)) | u64::from(le_u32(bytes, at + 4)) << 32
}
