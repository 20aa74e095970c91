//! Where everything is in the guest's physical address space, and the ports and interrupts of
//! devices that every guest finds in the same place.
//!
//! ```text
//! 0x0000_0000  interrupt vectors and BIOS data area (the kernel's); WARM_REBOOT_FLAG at 0x472
//! 0x0000_0500  GDT
//! 0x0000_6000  PVH start info, module list, memory map
//! 0x0000_7000  zero page
//! 0x0000_9000  page tables, 24 KiB
//! 0x0002_0000  kernel command line
//! 0x0009_fc00  end of low RAM
//! 0x000e_0000  ACPI tables
//! 0x0010_0000  high RAM: kernel, initrd
//! 0xc000_0000  end of RAM below 4 GiB: the MMIO hole
//! 0xd000_0000    virtio-mmio windows
//! 0xfec0_0000    I/O APIC
//! 0xfee0_0000    local APICs
//! 0xfffb_c000    KVM's identity map page, then its three TSS pages
//! 0x1_0000_0000  the rest of the RAM
//! ```

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Where Linux leaves its reboot type (2 bytes, `0x1234` for `reboot=warm`) before it resets the machine
/// (arch/x86/kernel/reboot.c, `native_machine_emergency_restart`).
pub const WARM_REBOOT_FLAG: GuestAddress = GuestAddress(0x472);

/// The global descriptor table of the boot CPU.
pub const GDT: GuestAddress = GuestAddress(0x500);

/// The PVH start info (`hvm_start_info`).
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// The PVH module list, one entry: the initrd.
pub const PVH_MODULES: GuestAddress = GuestAddress(0x6040);
/// The PVH memory map.
pub const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x6080);

/// The zero page (`struct boot_params`), 4 KiB.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// The top of a stack of 4 KiB for the kernel's first instructions (Linux brings its own).
pub const BOOT_STACK_TOP: GuestAddress = GuestAddress(0x9000);

/// The page map level 4 table; all other page tables follow it, [`PAGE_TABLES_SIZE`] in all.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The bytes that the page tables take: PML4, PDPT and 4 page directories.
pub const PAGE_TABLES_SIZE: u64 = 6 * 0x1000;

/// The kernel command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// The longest command line that has room here, with its terminating NUL.
pub const CMDLINE_SIZE: u64 = 0x1_0000;

/// The end of the RAM below 1 MiB that the guest may use: a PC's EBDA would follow.
pub const LOW_RAM_END: GuestAddress = GuestAddress(0x9_fc00);

/// The ACPI tables. The RSDP comes first: this is where a guest looks for it that
/// was not given the address (ACPI 6.5, 5.2.5.1).
pub const ACPI_START: GuestAddress = GuestAddress(0xe_0000);
/// The end of the ACPI tables.
pub const ACPI_END: GuestAddress = GuestAddress(0x10_0000);

/// The RAM for the kernel and the initrd begins here, at 1 MiB.
pub const HIGH_RAM_START: GuestAddress = GuestAddress(0x10_0000);

/// The start of the MMIO hole, at 3 GiB.
pub const MMIO_HOLE_START: GuestAddress = GuestAddress(0xc000_0000);
/// The end of the MMIO hole, at 4 GiB.
pub const MMIO_HOLE_END: GuestAddress = GuestAddress(0x1_0000_0000);

/// The first virtio-mmio window; device n has the window at `VIRTIO_MMIO_BASE + n * VIRTIO_MMIO_SIZE`.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// The size of one virtio-mmio window.
pub const VIRTIO_MMIO_SIZE: u32 = 0x1000;

/// The configuration space of PCI bus 0, as memory.
pub const PCI_ECAM: GuestAddress = GuestAddress(0xe000_0000);
/// The size of the configuration space of one bus.
pub const PCI_ECAM_SIZE: u32 = 0x10_0000;
/// The BARs of PCI devices.
pub const PCI_WINDOW: GuestAddress = GuestAddress(0xe800_0000);
/// The size of the window for BARs.
pub const PCI_WINDOW_SIZE: u32 = 0x800_0000;

/// The I/O APIC, where KVM's in-kernel one is.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APIC of each CPU, where KVM's in-kernel ones are.
pub const LAPIC: u32 = 0xfee0_0000;

/// The page for `KVM_SET_IDENTITY_MAP_ADDR`.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The three pages for `KVM_SET_TSS_ADDR`.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// COM1, a 16550A: the first of its 8 I/O ports.
pub const SERIAL_PORT: u16 = 0x3f8;
/// COM1's interrupt. All interrupts here are edge-triggered and active high.
pub const SERIAL_GSI: u32 = 4;
/// The interrupt that says that the power button was pressed.
pub const POWER_BUTTON_GSI: u32 = 5;

/// The I/O port of the sleep control register (ACPI 6.5, 4.8.3.7): the guest writes SLP_EN (bit 5)
/// and SLP_TYP (bits 2 to 4) here. The sleep status register is the port after it.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// The SLP_TYP by which the guest's `\_S5` powers the machine off.
pub const S5_SLEEP_TYPE: u8 = 5;
/// The I/O port of the reset register (ACPI 6.5, 4.8.3.6).
pub const RESET_PORT: u16 = 0x602;
/// What the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;

/// The regions of a RAM of `bytes` bytes: up to 3 GiB from address 0, the rest from 4 GiB.
///
/// The pairs are what `GuestMemoryMmap::from_ranges` takes.
#[must_use]
pub fn ram_regions(bytes: u64) -> Vec<(GuestAddress, usize)> {
    let low = bytes.min(MMIO_HOLE_START.0);
    let high = bytes - low;
    [(GuestAddress(0), low), (MMIO_HOLE_END, high)]
        .into_iter()
        .filter(|&(_, size)| size > 0)
        // This crate is for x86-64 alone, where a usize has 64 bits.
        .map(|(start, size)| (start, size as usize))
        .collect()
}

/// The end of the RAM that begins at address 0.
pub(crate) fn low_ram_end(memory: &GuestMemoryMmap) -> u64 {
    memory
        .find_region(GuestAddress(0))
        .map_or(0, |region| region.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_regions_small_memory_is_one_region() {
        assert_eq!(ram_regions(64 << 20), [(GuestAddress(0), 64 << 20)]);
    }

    #[test]
    fn ram_regions_three_gib_ends_at_the_hole() {
        assert_eq!(ram_regions(3 * GIB), [(GuestAddress(0), 3 << 30)]);
    }

    #[test]
    fn ram_regions_one_byte_more_goes_above_the_hole() {
        assert_eq!(
            ram_regions(3 * GIB + 1),
            [(GuestAddress(0), 3 << 30), (MMIO_HOLE_END, 1)]
        );
    }

    #[test]
    fn ram_regions_no_memory_has_no_region() {
        assert!(ram_regions(0).is_empty());
    }

    #[test]
    fn low_structures_do_not_overlap() {
        let areas = [
            (WARM_REBOOT_FLAG.0, 2),
            (GDT.0, 48),
            (PVH_START_INFO.0, 56),
            (PVH_MODULES.0, 32),
            (PVH_MEMORY_MAP.0, 8 * 24),
            (ZERO_PAGE.0, 4096),
            (BOOT_STACK_TOP.0 - 4096, 4096),
            (PAGE_TABLES.0, PAGE_TABLES_SIZE),
            (CMDLINE.0, CMDLINE_SIZE),
            (LOW_RAM_END.0, 0),
        ];
        for pair in areas.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }

    proptest! {
        #[test]
        fn ram_regions_any_size_covers_it_and_spares_the_hole(bytes in 0..1u64 << 46) {
            let regions = ram_regions(bytes);
            prop_assert_eq!(regions.iter().map(|r| r.1 as u64).sum::<u64>(), bytes);
            for (start, size) in regions {
                let end = start.0 + size as u64;
                prop_assert!(end <= MMIO_HOLE_START.0 || start >= MMIO_HOLE_END);
            }
        }
    }
}
