//! Guest memory and kernel images for the tests.

use std::fs::File;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::kernel::kaslr::Choice;
use crate::kernel::{Error, Kernel, Plan};
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

/// Loads the kernel in `file`; one that can be moved goes to the first place.
pub(crate) fn load_kernel(memory: &GuestMemoryMmap, file: &mut File) -> Result<Kernel, Error> {
    let choice = Choice {
        random: [0, 0],
        cmdline: "",
        initrd: 0..0,
    };
    Plan::new(memory, file)?.load(memory, &choice, &|_| ())
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

/// The physical address at which the kernel of [`packed`] is linked.
pub(crate) const VMLINUX_START: u64 = BZIMAGE_PREF;
/// The virtual one.
pub(crate) const VMLINUX_MAP: u32 = 0x8100_0000;
/// Its entry point, relative to its start.
pub(crate) const VMLINUX_ENTRY: u64 = 0x40;
/// Where its relocations begin, and its second segment, relative to its start.
pub(crate) const VMLINUX_PLACES: u64 = 0x100;
pub(crate) const VMLINUX_DATA: u64 = 0x40_0000;

/// The kernel in a bzImage as the kernel's build leaves it: an ELF file with two segments of `size` bytes, its section
/// headers at its end, then `relocations`.
pub(crate) fn vmlinux(size: usize, relocations: &[u32]) -> Vec<u8> {
    let mut image = elf(false)[..64].to_vec();
    let (first, second) = (0x1000, 0x1000 + size as u64);
    let memory = size as u64 + 0x1000;
    let sizes = [size as u64, memory];
    program_header(&mut image, 1, first, VMLINUX_START, sizes);
    program_header(&mut image, 1, second, VMLINUX_START + VMLINUX_DATA, sizes);
    image.resize(0x1000, 0);
    // Neither zeros nor of one kind, so that each byte counts.
    image.extend((0..2 * size).map(|n| (n % 251) as u8));
    let sections = image.len() as u64;
    image.resize(image.len() + 2 * 64, 0);
    image.extend(relocations.iter().flat_map(|word| word.to_le_bytes()));
    let image = patched(image, 24, &(VMLINUX_START + VMLINUX_ENTRY).to_le_bytes());
    let image = patched(image, 40, &sections.to_le_bytes());
    patched(image, 58, &[64, 0, 2, 0]) // e_shentsize, e_shnum
}

/// A relocation of each kind, among the first bytes of each segment.
pub(crate) fn relocations() -> Vec<u32> {
    let place = VMLINUX_MAP + VMLINUX_PLACES as u32;
    let data = VMLINUX_MAP + VMLINUX_DATA as u32;
    vec![0, place, data, 0, place + 8, 0, place + 12, data + 8]
}

/// `content` packed as gzip, which ends with its length.
pub(crate) fn gzip(content: &[u8]) -> Vec<u8> {
    let mut packer = GzEncoder::new(Vec::new(), Compression::fast());
    packer.write_all(content).unwrap();
    packer.finish().unwrap()
}

/// A bzImage with this payload.
pub(crate) fn packed(payload: &[u8]) -> Vec<u8> {
    let mut image = bzimage();
    image.truncate(BZIMAGE_SETUP + 0x300);
    image.extend(payload);
    image.resize(image.len().next_multiple_of(16), 0);
    let syssize = ((image.len() - BZIMAGE_SETUP) / 16) as u32;
    let image = patched(image, 0x1f4, &syssize.to_le_bytes());
    let image = patched(image, 0x248, &0x300_u32.to_le_bytes()); // payload_offset
    patched(image, 0x24c, &(payload.len() as u32).to_le_bytes())
}
