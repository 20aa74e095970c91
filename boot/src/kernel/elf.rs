//! ELF: a vmlinux, or any freestanding 64-bit program that is entered like one (System V gABI, chapters 4 and 5).

use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use linux_loader::elf::{self, Elf64_Ehdr, Elf64_Phdr};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::{Error, Image, Kernel, Loaded, require_ram};
use crate::{Protocol, layout};

/// Linux' COMMAND_LINE_SIZE on x86 is 2048 with the NUL; an ELF image does not say.
const CMDLINE_MAX: usize = 2047;
/// Where an initrd of a bzImage has to end as well; any 64-bit kernel reaches that far.
pub(super) const INITRD_END_MAX: u64 = 0x8000_0000;

pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(elf::ELFMAG)
}

/// A vmlinux that has been checked.
#[derive(Debug)]
pub(super) struct Plan {
    segments: Vec<Range<u64>>,
    /// The memory it uses.
    pub occupied: Range<u64>,
}

impl Plan {
    pub(super) fn new(memory: &GuestMemoryMmap, image: &mut Image) -> Result<Self, Error> {
        let header = read_header(image)?;
        let segments = check_segments(&program_headers(&header, image)?, image)?;
        let start = segments.iter().map(|s| s.start).min();
        let end = segments.iter().map(|s| s.end).max();
        let (Some(start), Some(end)) = (start, end) else {
            return Err(Error::Damaged("it has no segment to load"));
        };
        if start < layout::HIGH_RAM_START.0 {
            return Err(Error::TooLow(start));
        }
        require_ram(memory, end)?;
        let occupied = start..end;
        Ok(Self { segments, occupied })
    }

    pub(super) fn load(self, memory: &GuestMemoryMmap, image: &mut Image) -> Result<Kernel, Error> {
        let loaded = Elf::load(memory, None, image.file, None).map_err(Error::Copy)?;
        let (protocol, entry) = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) => (Protocol::Pvh, entry),
            _ => (Protocol::Linux64, loaded.kernel_load),
        };
        if !self.segments.iter().any(|s| s.contains(&entry.0)) {
            return Err(Error::Damaged("its entry point is in no segment"));
        }
        Ok(Kernel {
            protocol,
            entry: GuestAddress(entry.0),
            occupied: self.occupied,
            header: None,
            initrd_end_max: INITRD_END_MAX,
            cmdline_max: CMDLINE_MAX,
            loaded: Loaded::AsItIs,
        })
    }
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

fn program_headers(header: &Elf64_Ehdr, image: &mut Image) -> Result<Vec<Elf64_Phdr>, Error> {
    let entry_size = usize::from(header.e_phentsize);
    if entry_size != size_of::<Elf64_Phdr>() || header.e_phoff < size_of_val(header) as u64 {
        return Err(Error::Damaged(
            "its program headers have a wrong size or place",
        ));
    }
    let mut headers = vec![Elf64_Phdr::default(); header.e_phnum.into()];
    let size = (headers.len() * entry_size) as u64;
    image.require(header.e_phoff.saturating_add(size))?;
    let file = &mut image.file;
    file.seek(SeekFrom::Start(header.e_phoff))
        .and_then(|_| {
            let mut each = headers.iter_mut();
            each.try_for_each(|header| file.read_exact(header.as_mut_slice()))
        })
        .map_err(Error::Read)?;
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
