//! Guest memory and kernel images for the tests.

use std::fs::File;
use std::io::Write;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::{Platform, VirtioMmio, layout};

pub(crate) fn memory(mib: u64) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&layout::ram_regions(mib << 20)).unwrap()
}

/// A temporary file with this content, its position at the end.
pub(crate) fn file_with(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

pub(crate) fn platform(cpus: u8, devices: u32) -> Platform {
    Platform {
        cpus,
        serial: true,
        virtio_mmio: (0..devices)
            .map(|n| VirtioMmio {
                base: GuestAddress(layout::VIRTIO_MMIO_BASE + u64::from(n * 0x1000)),
                gsi: 6 + n,
            })
            .collect(),
        pci: true,
    }
}

/// `bytes` with `new` at `offset`.
pub(crate) fn patched(mut bytes: Vec<u8>, offset: usize, new: &[u8]) -> Vec<u8> {
    bytes[offset..offset + new.len()].copy_from_slice(new);
    bytes
}

pub(crate) const BZIMAGE_PREF: u64 = 0x100_0000;
pub(crate) const BZIMAGE_INIT_SIZE: u32 = 0x100_0000;
/// Two sectors of setup code come before the protected-mode kernel.
pub(crate) const BZIMAGE_SETUP: usize = 1024;
pub(crate) const BZIMAGE_KERNEL: usize = 0x1_0000;

/// A bzImage of the right form, with a payload of 0xcc, that runs from 16 to 32 MiB.
pub(crate) fn bzimage() -> Vec<u8> {
    let mut image = vec![0; BZIMAGE_SETUP];
    image.resize(BZIMAGE_SETUP + BZIMAGE_KERNEL, 0xcc);
    let mut put =
        |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &(BZIMAGE_KERNEL as u32 / 16).to_le_bytes()); // syssize
    put(0x1fe, &0xaa55_u16.to_le_bytes());
    put(0x200, &[0xeb, 0x6a]); // jump over the header, which ends at 0x26c
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000_u32.to_le_bytes()); // kernel_alignment
    put(0x234, &[1]); // relocatable_kernel
    put(0x236, &1_u16.to_le_bytes()); // xloadflags: XLF_KERNEL_64
    put(0x238, &2047_u32.to_le_bytes()); // cmdline_size
    put(0x258, &BZIMAGE_PREF.to_le_bytes());
    put(0x260, &BZIMAGE_INIT_SIZE.to_le_bytes());
    put(0x26c, &[0x90; 16]); // code after the header
    image
}

pub(crate) const ELF_START: u64 = 0x20_0000;
pub(crate) const ELF_MEMORY_SIZE: u64 = 0x3000;
pub(crate) const PVH_ENTRY: u64 = ELF_START + 0x40;

/// An executable with one segment of 0x1000 bytes in the file and 0x3000 in memory, entered at its start;
/// with `pvh` it has the note of a second entry point.
pub(crate) fn elf(pvh: bool) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]); // ET_EXEC, EM_X86_64, version
    image.extend(ELF_START.to_le_bytes()); // e_entry
    image.extend(64_u64.to_le_bytes()); // e_phoff
    image.resize(52, 0);
    image.extend([64, 0, 56, 0, 2, 0]); // e_ehsize, e_phentsize, e_phnum
    image.resize(64, 0);
    program_header(&mut image, 1, 0x1000, ELF_START, [0x1000, ELF_MEMORY_SIZE]);
    let note_size = if pvh { 20 } else { 0 };
    program_header(&mut image, 4, 0x800, 0, [note_size, note_size]);
    image.resize(0x800, 0);
    if pvh {
        for word in [4_u32, 4, 18] {
            image.extend(word.to_le_bytes()); // n_namesz, n_descsz, n_type
        }
        image.extend(b"Xen\0");
        image.extend((PVH_ENTRY as u32).to_le_bytes());
    }
    image.resize(0x1000, 0);
    image.resize(0x2000, 0xf4);
    image
}

fn program_header(image: &mut Vec<u8>, kind: u32, offset: u64, address: u64, sizes: [u64; 2]) {
    image.extend(kind.to_le_bytes());
    image.extend(7_u32.to_le_bytes()); // flags
    for field in [offset, address, address, sizes[0], sizes[1], 0x1000] {
        image.extend(field.to_le_bytes());
    }
}
