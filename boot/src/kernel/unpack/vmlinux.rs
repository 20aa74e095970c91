//! The ELF file in a payload: where its parts go.

use std::ops::Range;

use linux_loader::elf::{self, Elf64_Ehdr, Elf64_Phdr, Elf64_Shdr};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::Error;
use crate::write_to_new;

/// The most that may follow the ELF file: 4 million relocations, where Debian's kernels have 200,000.
const REST_MAX: u64 = 16 << 20;

/// What its headers say.
#[derive(Debug, PartialEq)]
pub(super) struct Vmlinux {
    segments: Vec<Segment>,
    /// The entry point, relative to the kernel's start.
    pub entry: u64,
    /// The length of the ELF file; relocations follow.
    pub end: u64,
}

/// Bytes of the file that go into memory.
#[derive(Debug, PartialEq)]
struct Segment {
    file: Range<u64>,
    /// Where they go, relative to the kernel's start.
    memory: u64,
}

impl Vmlinux {
    /// Reads the headers from the beginning of a file of `length` bytes, whose segments have to lie in `space`: the
    /// physical addresses from the kernel's start on.
    pub(super) fn read(first: &[u8], length: u64, space: &Range<u64>) -> Result<Self, Error> {
        let wrong = Error::Elf;
        let header = read_header(first)?;
        let sections = u64::from(header.e_shnum) * size_of::<Elf64_Shdr>() as u64;
        let end = header.e_shoff.checked_add(sections);
        let end = end.filter(|end| (1..=length).contains(end));
        let end = end.ok_or(wrong("its section headers are not in it"))?;
        if length - end > REST_MAX {
            return Err(wrong("too much follows its section headers"));
        }
        let headers = header.e_phoff as usize..;
        let headers = first.get(headers).unwrap_or_default();
        let headers = headers.chunks_exact(size_of::<Elf64_Phdr>());
        if headers.len() < header.e_phnum.into() {
            return Err(wrong("its program headers are not at its beginning"));
        }
        let mut segments = Vec::new();
        let mut has_entry = false;
        for bytes in headers.take(header.e_phnum.into()) {
            let mut program = Elf64_Phdr::default();
            program.as_mut_slice().copy_from_slice(bytes);
            if program.p_type != elf::PT_LOAD {
                continue;
            }
            let (segment, memory) = read_segment(&program, end, space)?;
            has_entry |= memory.contains(&header.e_entry);
            segments.push(segment);
        }
        if !has_entry {
            return Err(wrong("its entry point is in no segment"));
        }
        let entry = header.e_entry - space.start;
        Ok(Self {
            segments,
            entry,
            end,
        })
    }
}

fn read_header(first: &[u8]) -> Result<Elf64_Ehdr, Error> {
    let mut header = Elf64_Ehdr::default();
    let size = size_of_val(&header);
    let bytes = first.get(..size).ok_or(Error::Elf("it is too short"))?;
    header.as_mut_slice().copy_from_slice(bytes);
    let is_kernel = bytes.starts_with(elf::ELFMAG)
        && header.e_ident[elf::EI_CLASS] == elf::ELFCLASS64
        && header.e_ident[elf::EI_DATA] == elf::ELFDATA2LSB
        && header.e_machine == elf::EM_X86_64
        && header.e_type == elf::ET_EXEC;
    if !is_kernel {
        return Err(Error::Elf("it is not a 64-bit ELF executable for x86-64"));
    }
    let sizes = (header.e_phentsize.into(), header.e_shentsize.into());
    if sizes != (size_of::<Elf64_Phdr>(), size_of::<Elf64_Shdr>()) {
        return Err(Error::Elf("its headers have a wrong size"));
    }
    Ok(header)
}

/// The segment, and the memory it has.
fn read_segment(
    header: &Elf64_Phdr,
    file_end: u64,
    space: &Range<u64>,
) -> Result<(Segment, Range<u64>), Error> {
    let end = header.p_offset.checked_add(header.p_filesz);
    let end = end.filter(|end| *end <= file_end);
    let end = end.ok_or(Error::Elf("a segment is not in it"))?;
    let memory_end = header.p_paddr.checked_add(header.p_memsz);
    let memory_end = memory_end.filter(|end| {
        header.p_filesz <= header.p_memsz && header.p_paddr >= space.start && *end <= space.end
    });
    let memory_end = memory_end.ok_or(Error::Elf("a segment is outside of its memory"))?;
    let segment = Segment {
        file: header.p_offset..end,
        memory: header.p_paddr - space.start,
    };
    Ok((segment, header.p_paddr..memory_end))
}

/// Guest memory that becomes the kernel, by pieces of the unpacked payload.
#[derive(Debug)]
pub(super) struct Destination<'a> {
    pub vmlinux: Vmlinux,
    memory: &'a GuestMemoryMmap,
    start: u64,
    /// What follows the ELF file.
    pub rest: Vec<u8>,
}

impl<'a> Destination<'a> {
    /// The kernel begins at `start` in `memory`, and the payload has `length` bytes.
    pub(super) fn new(
        vmlinux: Vmlinux,
        memory: &'a GuestMemoryMmap,
        start: u64,
        length: u64,
    ) -> Self {
        let rest = vec![0; (length - vmlinux.end) as usize];
        Self {
            vmlinux,
            memory,
            start,
            rest,
        }
    }

    /// Puts the bytes of the payload from `at` on where they belong.
    pub(super) fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let part = |range: Range<u64>| {
            let start = range.start.max(at);
            let end = range.end.min(at + bytes.len() as u64);
            let part = (start - at) as usize..end.checked_sub(at)? as usize;
            let part = bytes.get(part).filter(|part| !part.is_empty())?;
            Some((start - range.start, part))
        };
        for segment in &self.vmlinux.segments {
            if let Some((offset, part)) = part(segment.file.clone()) {
                let to = GuestAddress(self.start + segment.memory + offset);
                write_to_new(self.memory, part, to).map_err(Error::Memory)?;
            }
        }
        if let Some((offset, part)) = part(self.vmlinux.end..u64::MAX) {
            let offset = offset as usize;
            self.rest[offset..offset + part.len()].copy_from_slice(part);
        }
        Ok(())
    }
}
