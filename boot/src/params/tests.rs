//! Tests of the memory map, the zero page and the PVH start info.

use super::*;
use crate::tests::images::{bzimage, elf, file_with, load_kernel, memory};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

const INITRD: Initrd = Initrd {
    start: GuestAddress(0x3f0_0000),
    size: 12_345,
};

fn written(image: &[u8], initrd: Option<Initrd>) -> GuestMemoryMmap {
    let memory = memory(64);
    let kernel = load_kernel(&memory, &mut file_with(image)).unwrap();
    for (_, at, bytes) in pieces(&memory, &kernel, initrd) {
        memory.write_slice(&bytes, at).unwrap();
    }
    memory
}

fn zero_page_of(memory: &GuestMemoryMmap) -> boot_params {
    memory.read_obj(layout::ZERO_PAGE).unwrap()
}

#[test]
fn memory_map_small_memory_lists_low_acpi_and_high() {
    let map = memory_map(&memory(64));
    let as_numbers: Vec<_> = map
        .iter()
        .map(|r| (r.addr, r.addr + r.size, r.type_))
        .collect();
    assert_eq!(
        as_numbers,
        [
            (0, 0x9_fc00, 1),
            (0xe_0000, 0x10_0000, 2),
            (0x10_0000, 64 << 20, 1)
        ]
    );
}

#[test]
fn zero_page_of_bzimage_keeps_its_header_and_adds_ours() {
    let page = zero_page_of(&written(&bzimage(), Some(INITRD)));
    let header = page.hdr;
    let (magic, loader, cmdline) = (header.header, header.type_of_loader, header.cmd_line_ptr);
    let (initrd, size, max) = (
        header.ramdisk_image,
        header.ramdisk_size,
        header.cmdline_size,
    );
    assert_eq!(magic.to_le_bytes(), *b"HdrS");
    assert_eq!((loader, cmdline, max), (0xff, 0x2_0000, 2047));
    assert_eq!((initrd, size), (0x3f0_0000, 12_345));
    let (rsdp, sentinel, entries) = (page.acpi_rsdp_addr, page.sentinel, page.e820_entries);
    assert_eq!((rsdp, sentinel, entries), (0xe_0000, 0, 3));
    let last = page.e820_table[2];
    let (start, size, kind) = (last.addr, last.size, last.r#type);
    assert_eq!((start, size, kind), (1 << 20, 63 << 20, 1));
}

#[test]
fn zero_page_of_elf_has_a_header_made_up() {
    let header = zero_page_of(&written(&elf(false), None)).hdr;
    let (flag, version, initrd, max) = (
        header.boot_flag,
        header.version,
        header.ramdisk_image,
        header.cmdline_size,
    );
    assert_eq!((flag, version, initrd, max), (0xaa55, 0x20f, 0, 2047));
}

#[test]
fn start_info_with_initrd_has_one_module() {
    let memory = written(&elf(true), Some(INITRD));
    let info: hvm_start_info = memory.read_obj(layout::PVH_START_INFO).unwrap();
    assert_eq!(
        (info.magic, info.version, info.nr_modules),
        (0x336e_c578, 1, 1)
    );
    assert_eq!((info.cmdline_paddr, info.rsdp_paddr), (0x2_0000, 0xe_0000));
    let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!((module.paddr, module.size), (INITRD.start.0, INITRD.size));
    assert_eq!(info.memmap_entries, 3);
    let low: hvm_memmap_table_entry = memory.read_obj(GuestAddress(info.memmap_paddr)).unwrap();
    assert_eq!((low.addr, low.size, low.type_), (0, 0x9_fc00, 1));
}

#[test]
fn start_info_without_initrd_has_no_module() {
    let memory = written(&elf(true), None);
    let info: hvm_start_info = memory.read_obj(layout::PVH_START_INFO).unwrap();
    assert_eq!((info.nr_modules, info.modlist_paddr), (0, 0));
}

proptest! {
    // Memory is mapped and never touched, so its size does not matter.
    #[test]
    fn memory_map_any_size_covers_ram_minus_reserved(mib in 1_u64..16_384, odd_pages in 0_u64..256) {
        let bytes = (mib << 20) + (odd_pages << 12);
        let memory = GuestMemoryMmap::from_ranges(&layout::ram_regions(bytes)).unwrap();
        let map = memory_map(&memory);
        for pair in map.windows(2) {
            prop_assert!(pair[0].addr + pair[0].size <= pair[1].addr);
        }
        let ram = map.iter().filter(|range| range.type_ == XEN_HVM_MEMMAP_TYPE_RAM);
        let missing = layout::HIGH_RAM_START.0 - layout::LOW_RAM_END.0;
        prop_assert_eq!(ram.clone().map(|range| range.size).sum::<u64>(), bytes - missing);
        for range in ram {
            let last = GuestAddress(range.addr + range.size - 1);
            prop_assert!(memory.check_range(GuestAddress(range.addr), range.size as usize));
            prop_assert!(last < layout::MMIO_HOLE_START || range.addr >= layout::MMIO_HOLE_END.0);
        }
    }
}
