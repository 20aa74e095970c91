//! Tests of the boot CPU's state.

use super::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::tests::images::{bzimage, elf, file_with, load_kernel, memory};

fn prepared(image: &[u8]) -> (GuestMemoryMmap, BootState) {
    let memory = memory(64);
    let kernel = load_kernel(&memory, &mut file_with(image)).unwrap();
    for (_, at, bytes) in tables() {
        memory.write_slice(&bytes, at).unwrap();
    }
    (memory, boot_state(kernel, None))
}

/// What `KVM_GET_SREGS` gives after a reset, as far as it matters.
fn after_reset() -> kvm_sregs {
    kvm_sregs {
        cr0: 0x6000_0010,
        apic_base: 0xfee0_0900,
        ..Default::default()
    }
}

/// The physical address of `address`, by a walk through page tables of 2 MiB pages.
fn translate(memory: &GuestMemoryMmap, cr3: u64, address: u64) -> u64 {
    let mut table = cr3;
    for shift in [39, 30] {
        let entry: u64 = memory
            .read_obj(GuestAddress(table + (address >> shift & 511) * 8))
            .unwrap();
        assert_eq!(entry & 0xfff, PAGE_PRESENT_WRITABLE);
        table = entry & !0xfff;
    }
    let entry: u64 = memory
        .read_obj(GuestAddress(table + (address >> 21 & 511) * 8))
        .unwrap();
    assert_eq!(entry & 0xfff, PAGE_PRESENT_WRITABLE | PAGE_LARGE);
    (entry & !0xfff) + (address & 0x1f_ffff)
}

#[test]
fn linux64_state_is_long_mode_with_the_zero_page_in_rsi() {
    let (_, state) = prepared(&bzimage());
    assert_eq!((state.regs.rip, state.regs.rsi), (0x100_0200, 0x7000));
    assert_eq!(state.regs.rflags, 2);
    let mut sregs = after_reset();
    state.apply_sregs(&mut sregs);
    assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
    for segment in [sregs.ds, sregs.es, sregs.ss] {
        assert_eq!(
            (segment.selector, segment.type_, segment.present),
            (0x18, 3, 1)
        );
    }
    assert_eq!(
        (sregs.cr0, sregs.cr4, sregs.efer),
        (0x8000_0031, 0x20, 0x500)
    );
    assert_eq!(sregs.apic_base, 0xfee0_0900);
}

#[test]
fn linux64_page_tables_map_four_gib_to_themselves() {
    let (memory, state) = prepared(&bzimage());
    let mut sregs = after_reset();
    state.apply_sregs(&mut sregs);
    for address in (0..1 << 32).step_by(0x20_0000).chain([0x1234, 0xffff_ffff]) {
        assert_eq!(translate(&memory, sregs.cr3, address), address);
    }
}

#[test]
fn linux64_gdt_holds_what_the_selectors_say() {
    let (memory, state) = prepared(&bzimage());
    let mut sregs = after_reset();
    state.apply_sregs(&mut sregs);
    for segment in [sregs.cs, sregs.ds, sregs.tr] {
        assert!(segment.selector + 7 <= sregs.gdt.limit);
        let at = GuestAddress(sregs.gdt.base + u64::from(segment.selector));
        let entry: u64 = memory.read_obj(at).unwrap();
        let access = entry >> 40 & 0xff;
        let flags = entry >> 52 & 0xf;
        assert_eq!(
            access,
            u64::from(segment.present << 7 | segment.s << 4 | segment.type_)
        );
        assert_eq!(
            flags,
            u64::from(segment.g << 3 | segment.db << 2 | segment.l << 1)
        );
    }
}

#[test]
fn pvh_state_is_protected_mode_with_the_start_info_in_ebx() {
    let (_, state) = prepared(&elf(true));
    assert_eq!((state.regs.rbx, state.regs.rsi), (0x6000, 0));
    let mut sregs = after_reset();
    state.apply_sregs(&mut sregs);
    assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
    assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.limit), (0, 1, u32::MAX));
}

#[test]
fn every_cpu_starts_with_masked_exceptions_and_cached_memory() {
    let (_, state) = prepared(&bzimage());
    assert_eq!((state.fpu.fcw, state.fpu.mxcsr), (0x37f, 0x1f80));
    let msrs: Vec<_> = state.msrs.iter().map(|msr| (msr.index, msr.data)).collect();
    assert_eq!(msrs, [(0x1a0, 1), (0x2ff, 0x806)]);
}
