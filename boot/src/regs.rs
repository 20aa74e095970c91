//! Registers, GDT and page tables of the boot CPU at the kernel's entry point.
//!
//! The other CPUs need none of it: they wait for INIT and SIPI, and the kernel starts them in real mode.

use std::ops::Range;

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};

use crate::initrd::Initrd;
use crate::kernel::{Kernel, Loaded};
use crate::{Piece, Protocol, layout};

/// How to start the boot CPU, and where things are.
#[derive(Debug)]
pub struct BootState {
    /// The kernel's boot protocol.
    pub protocol: Protocol,
    /// The memory that the kernel uses before it reads the memory map; for the log.
    pub kernel: Range<u64>,
    /// How the kernel came there; for the log.
    pub loaded: Loaded,
    /// Where the initrd is; for the log.
    pub initrd: Option<Initrd>,
    /// The general registers (`KVM_SET_REGS`), of the boot CPU.
    pub regs: kvm_regs,
    /// The FPU (`KVM_SET_FPU`), of every CPU.
    pub fpu: kvm_fpu,
    /// The model-specific registers (`KVM_SET_MSRS`), of every CPU. All others are right after a reset.
    pub msrs: Vec<kvm_msr_entry>,
}

impl BootState {
    /// Changes the special registers of the boot CPU, as read by `KVM_GET_SREGS`, into those at the kernel's entry point.
    /// The APIC base stays.
    pub fn apply_sregs(&self, sregs: &mut kvm_sregs) {
        match self.protocol {
            Protocol::Linux64 => long_mode(sregs),
            Protocol::Pvh => protected_mode(sregs),
        }
    }
}

/// GDT and page tables.
pub(crate) fn tables() -> [Piece; 2] {
    let bytes = |entries: &[u64]| entries.iter().flat_map(|e| e.to_le_bytes()).collect();
    [
        ("GDT", layout::GDT, bytes(&GDT)),
        ("page tables", layout::PAGE_TABLES, bytes(&page_tables())),
    ]
}

/// The registers at the entry point of `kernel`.
pub(crate) fn boot_state(kernel: Kernel, initrd: Option<Initrd>) -> BootState {
    BootState {
        protocol: kernel.protocol,
        regs: general_registers(&kernel),
        kernel: kernel.occupied,
        loaded: kernel.loaded,
        initrd,
        fpu: kvm_fpu {
            fcw: 0x37f,    // all exceptions masked, extended precision, as after FNINIT
            mxcsr: 0x1f80, // all exceptions masked, as after a reset
            ..Default::default()
        },
        msrs: msrs(),
    }
}

fn general_registers(kernel: &Kernel) -> kvm_regs {
    let mut regs = kvm_regs {
        rip: kernel.entry.0,
        rsp: layout::BOOT_STACK_TOP.0,
        rflags: 1 << 1, // always set; interrupts off
        ..Default::default()
    };
    match kernel.protocol {
        Protocol::Linux64 => regs.rsi = layout::ZERO_PAGE.0,
        Protocol::Pvh => regs.rbx = layout::PVH_START_INFO.0,
    }
    regs
}

// Bits of the control registers (Intel SDM volume 3, 2.5) and of EFER (2.2.1).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// `__BOOT_CS`, `__BOOT_DS` and `__BOOT_TSS` of Linux (arch/x86/include/asm/segment.h).
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Segment types: execute/read and accessed, read/write and accessed, busy 64-bit or 32-bit TSS.
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TSS: u8 = 0xb;

/// Null, unused, 64-bit code, data, and a TSS of two entries at address 0 (Intel SDM volume 3, 3.4.5 and 8.2.3).
const GDT: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
    0,
];

/// Long mode with all memory below 4 GiB identity-mapped (boot.rst, "64-bit Boot Protocol").
fn long_mode(sregs: &mut kvm_sregs) {
    set_segments(
        sregs,
        kvm_segment {
            l: 1,
            ..flat(CODE, TYPE_CODE)
        },
    );
    sregs.gdt = kvm_dtable {
        base: layout::GDT.0,
        limit: size_of_val(&GDT) as u16 - 1,
        ..Default::default()
    };
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
    sregs.cr3 = layout::PAGE_TABLES.0;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// 32-bit protected mode without paging (Xen's docs/misc/pvh.pandoc). The GDT is not part of the protocol.
fn protected_mode(sregs: &mut kvm_sregs) {
    set_segments(
        sregs,
        kvm_segment {
            db: 1,
            ..flat(CODE, TYPE_CODE)
        },
    );
    sregs.gdt = kvm_dtable::default();
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

fn set_segments(sregs: &mut kvm_sregs, code: kvm_segment) {
    let data = kvm_segment {
        db: 1,
        ..flat(DATA, TYPE_DATA)
    };
    sregs.cs = code;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = kvm_segment {
        selector: TASK,
        type_: TYPE_TSS,
        limit: 0x67,
        present: 1,
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
}

/// A segment from 0 to 4 GiB at level 0.
fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
const PAGE_SIZE: u64 = 0x1000;
const LARGE_PAGE_SIZE: u64 = 0x20_0000;
/// Entries of one table.
const ENTRIES: usize = 512;
/// Page directories, each of 1 GiB.
const DIRECTORIES: usize = 4;

/// PML4, page directory pointer table and four page directories, which map the first 4 GiB to themselves by
/// pages of 2 MiB: not every CPU has larger ones (Intel SDM volume 3, 4.5.4).
fn page_tables() -> Vec<u64> {
    let table = |n: usize| (layout::PAGE_TABLES.0 + n as u64 * PAGE_SIZE) | PAGE_PRESENT_WRITABLE;
    let mut entries = vec![0; (2 + DIRECTORIES) * ENTRIES];
    entries[0] = table(1);
    for n in 0..DIRECTORIES {
        entries[ENTRIES + n] = table(2 + n);
    }
    for (n, entry) in entries[2 * ENTRIES..].iter_mut().enumerate() {
        *entry = (n as u64 * LARGE_PAGE_SIZE) | PAGE_LARGE | PAGE_PRESENT_WRITABLE;
    }
    entries
}

/// IA32_MISC_ENABLE, whose bit 0 turns on fast string operations.
const MSR_MISC_ENABLE: u32 = 0x1a0;
/// IA32_MTRR_DEF_TYPE: bit 11 enables the MTRRs, the low byte is the default type, 6 is write-back.
/// After a reset they are off, which makes all memory uncacheable.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;

fn msrs() -> Vec<kvm_msr_entry> {
    [(MSR_MISC_ENABLE, 1), (MSR_MTRR_DEF_TYPE, 1 << 11 | 6)]
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .to_vec()
}

#[cfg(test)]
mod tests;
