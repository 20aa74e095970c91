//! The memory map, and what carries it to the kernel: the zero page of the Linux boot protocol
//! (Documentation/arch/x86/zero-page.rst) or the PVH start info (xen/include/public/arch-x86/hvm/start_info.h).

use linux_loader::loader::bootparam::{LOADED_HIGH, boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::initrd::Initrd;
use crate::kernel::Kernel;
use crate::{Piece, Protocol, layout};

/// The loader's number, "none of the known ones" (boot.rst, "type_of_loader").
const LOADER_UNKNOWN: u8 = 0xff;

/// The memory map: all RAM, but for the last part of the first MiB, of which the ACPI tables are
/// declared as reserved and the rest is not mentioned. PVH has taken the types from e820.
fn memory_map(memory: &GuestMemoryMmap) -> Vec<hvm_memmap_table_entry> {
    let range = |type_: u32, start: u64, end: u64| hvm_memmap_table_entry {
        addr: start,
        size: end.saturating_sub(start),
        type_,
        reserved: 0,
    };
    let ram = |start, end| range(XEN_HVM_MEMMAP_TYPE_RAM, start, end);
    let (acpi, acpi_end) = (layout::ACPI_START.0, layout::ACPI_END.0);
    let low_end = layout::LOW_RAM_END.0.min(layout::low_ram_end(memory));
    let low = [
        ram(0, low_end),
        range(XEN_HVM_MEMMAP_TYPE_RESERVED, acpi, acpi_end),
    ];
    let high = memory.iter().map(|region| {
        let start = region.start_addr().max(layout::HIGH_RAM_START);
        ram(start.0, region.start_addr().0 + region.len())
    });
    low.into_iter()
        .chain(high)
        .filter(|range| range.size > 0)
        .collect()
}

/// What the kernel's boot protocol asks for. The command line is at [`layout::CMDLINE`].
pub(crate) fn pieces(
    memory: &GuestMemoryMmap,
    kernel: &Kernel,
    initrd: Option<Initrd>,
) -> Vec<Piece> {
    match kernel.protocol {
        Protocol::Linux64 => {
            let page = zero_page(memory, kernel, initrd);
            vec![("zero page", layout::ZERO_PAGE, page.as_slice().to_vec())]
        }
        Protocol::Pvh => start_info(memory, initrd),
    }
}

fn zero_page(memory: &GuestMemoryMmap, kernel: &Kernel, initrd: Option<Initrd>) -> boot_params {
    let mut page = boot_params {
        hdr: kernel.header.unwrap_or_else(|| elf_header(kernel)),
        acpi_rsdp_addr: layout::ACPI_START.0,
        ..Default::default()
    };
    page.hdr.type_of_loader = LOADER_UNKNOWN;
    page.hdr.cmd_line_ptr = layout::CMDLINE.0 as u32;
    if let Some(initrd) = initrd {
        // Both fit: initrd_addr_max has 32 bits, and an ELF kernel's is lower still.
        page.hdr.ramdisk_image = initrd.start.0 as u32;
        page.hdr.ramdisk_size = initrd.size as u32;
    }
    // At most 4 ranges, the table has 128.
    let map = memory_map(memory);
    page.e820_entries = map.len() as u8;
    for (entry, range) in page.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry {
            addr: range.addr,
            size: range.size,
            r#type: range.type_,
        };
    }
    page
}

/// The setup header for a kernel that has none: what a boot loader would have found in a bzImage.
fn elf_header(kernel: &Kernel) -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        loadflags: LOADED_HIGH,
        kernel_alignment: 0x20_0000,
        cmdline_size: kernel.cmdline_max as u32,
        initrd_addr_max: (kernel.initrd_end_max - 1) as u32,
        ..Default::default()
    }
}

fn start_info(memory: &GuestMemoryMmap, initrd: Option<Initrd>) -> Vec<Piece> {
    let map = memory_map(memory);
    let modules = initrd.map(|initrd| hvm_modlist_entry {
        paddr: initrd.start.0,
        size: initrd.size,
        ..Default::default()
    });
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: modules.iter().len() as u32,
        modlist_paddr: modules.map_or(0, |_| layout::PVH_MODULES.0),
        cmdline_paddr: layout::CMDLINE.0,
        rsdp_paddr: layout::ACPI_START.0,
        memmap_paddr: layout::PVH_MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    vec![
        ("PVH start info", layout::PVH_START_INFO, bytes(&[info])),
        (
            "PVH module list",
            layout::PVH_MODULES,
            bytes(modules.as_slice()),
        ),
        ("PVH memory map", layout::PVH_MEMORY_MAP, bytes(&map)),
    ]
}

fn bytes<T: ByteValued>(values: &[T]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.as_slice())
        .copied()
        .collect()
}

#[cfg(test)]
mod tests;
