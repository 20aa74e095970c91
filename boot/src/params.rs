//! The memory map, and what carries it to the kernel: the zero page of the Linux boot protocol
//! (Documentation/arch/x86/zero-page.rst) or the PVH start info (xen/include/public/arch-x86/hvm/start_info.h).

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{self, BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{LOADED_HIGH, boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use thiserror::Error as ThisError;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::initrd::Initrd;
use crate::kernel::Kernel;
use crate::{Protocol, layout};

/// The loader's number, "none of the known ones" (boot.rst, "type_of_loader").
const LOADER_UNKNOWN: u8 = 0xff;

/// Why the boot parameters could not be written.
#[derive(Debug, ThisError)]
pub enum Error {
    /// Guest memory refuses the write.
    #[error("cannot write the {0} to guest memory")]
    Write(&'static str, #[source] configurator::Error),
}

/// What a range of guest memory is for; the numbers are those of e820, and of PVH as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum MemoryKind {
    Ram = 1,
    Reserved = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MemoryRange {
    start: u64,
    size: u64,
    kind: MemoryKind,
}

/// The memory map: all RAM, but for the last part of the first MiB, of which the ACPI tables are
/// declared as reserved and the rest is not mentioned.
fn memory_map(memory: &GuestMemoryMmap) -> Vec<MemoryRange> {
    let ram = |start: u64, end: u64| MemoryRange {
        start,
        size: end.saturating_sub(start),
        kind: MemoryKind::Ram,
    };
    let acpi = MemoryRange {
        start: layout::ACPI_START.0,
        size: layout::ACPI_END.0 - layout::ACPI_START.0,
        kind: MemoryKind::Reserved,
    };
    let low = ram(0, layout::LOW_RAM_END.0.min(layout::low_ram_end(memory)));
    let high = memory.iter().map(|region| {
        let start = region.start_addr().max(layout::HIGH_RAM_START);
        ram(start.0, region.start_addr().raw_value() + region.len())
    });
    [low, acpi]
        .into_iter()
        .chain(high)
        .filter(|range| range.size > 0)
        .collect()
}

/// Writes what the kernel's boot protocol asks for. The command line is at [`layout::CMDLINE`].
pub(crate) fn write(
    memory: &GuestMemoryMmap,
    kernel: &Kernel,
    initrd: Option<Initrd>,
) -> Result<(), Error> {
    match kernel.protocol {
        Protocol::Linux64 => {
            let page = zero_page(memory, kernel, initrd);
            let params = BootParams::new(&page, layout::ZERO_PAGE);
            LinuxBootConfigurator::write_bootparams(&params, memory)
                .map_err(|error| Error::Write("zero page", error))
        }
        Protocol::Pvh => PvhBootConfigurator::write_bootparams(&start_info(memory, initrd), memory)
            .map_err(|error| Error::Write("PVH start info", error)),
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
            addr: range.start,
            size: range.size,
            r#type: range.kind as u32,
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

fn start_info(memory: &GuestMemoryMmap, initrd: Option<Initrd>) -> BootParams {
    let map: Vec<_> = memory_map(memory)
        .iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.size,
            type_: range.kind as u32,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = initrd
        .iter()
        .map(|initrd| hvm_modlist_entry {
            paddr: initrd.start.0,
            size: initrd.size,
            ..Default::default()
        })
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() {
            0
        } else {
            layout::PVH_MODULES.0
        },
        cmdline_paddr: layout::CMDLINE.0,
        rsdp_paddr: layout::ACPI_START.0,
        memmap_paddr: layout::PVH_MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, layout::PVH_START_INFO);
    params.set_sections(&map, layout::PVH_MEMORY_MAP);
    params.set_modules(&modules, layout::PVH_MODULES);
    params
}

#[cfg(test)]
mod tests;
