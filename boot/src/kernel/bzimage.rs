//! bzImage: the compressed kernel that distributions ship (Documentation/arch/x86/boot.rst).

use std::ops::Range;

use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::{Error, Image, Kernel, require_ram};
use crate::{Protocol, layout};

/// Where the setup header is in the file, and in the zero page as well.
const HEADER: usize = 0x1f1;
/// `"HdrS"` at 0x202.
const MAGIC: Range<usize> = 0x202..0x206;
/// The first version of the boot protocol that has `xloadflags`.
const VERSION_XLOADFLAGS: u16 = 0x20c;
/// The 64-bit entry point, as an offset into the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(MAGIC) == Some(b"HdrS")
}

pub(super) fn load(memory: &GuestMemoryMmap, image: &mut Image) -> Result<Kernel, Error> {
    let header = read_header(image)?;
    if header.version < VERSION_XLOADFLAGS || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::Bzimage32);
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(Error::Damaged("a 64-bit kernel that loads below 1 MiB"));
    }
    let setup_sectors = match header.setup_sects {
        0 => 4, // a default from the first days (boot.rst, "setup_sects")
        n => u64::from(n),
    };
    let setup_size = (setup_sectors + 1) * SECTOR;
    let kernel_size = u64::from(header.syssize) * 16;
    if kernel_size <= ENTRY_64 {
        return Err(Error::Damaged("its protected-mode part has no entry point"));
    }
    image.require(setup_size + kernel_size)?;

    let start = load_address(&header)?;
    let end = occupied_end(&header, start, image.size - setup_size)?;
    require_ram(memory, end)?;
    BzImage::load(memory, Some(GuestAddress(start)), image.file, None).map_err(Error::Copy)?;
    Ok(Kernel {
        protocol: Protocol::Linux64,
        entry: GuestAddress(start + ENTRY_64),
        occupied: start..end,
        header: Some(header),
        initrd_end_max: u64::from(header.initrd_addr_max) + 1,
        cmdline_max: header.cmdline_size as usize,
    })
}

/// The setup header; bytes after its end, which belong to the boot sector's code, are zero.
fn read_header(image: &Image) -> Result<setup_header, Error> {
    let mut header = setup_header::default();
    let whole = HEADER + header.as_slice().len();
    image.require(whole as u64)?;
    // The jump instruction at 0x200 leads to the first byte after the header (boot.rst, "jump").
    let end = (0x202 + usize::from(image.head[0x201])).min(whole);
    header.as_mut_slice()[..end - HEADER].copy_from_slice(&image.head[HEADER..end]);
    Ok(header)
}

/// Where to load the protected-mode kernel. A relocatable one goes to the address at which it runs,
/// so that it need not move itself first; it runs there even if it was loaded lower.
fn load_address(header: &setup_header) -> Result<u64, Error> {
    let start = match header.relocatable_kernel {
        0 => u64::from(header.code32_start),
        _ => header.pref_address,
    };
    if start < layout::HIGH_RAM_START.0 {
        return Err(Error::TooLow(start));
    }
    Ok(start)
}

/// The end of the memory that image, decompressor and unpacked kernel need.
fn occupied_end(header: &setup_header, start: u64, file_bytes: u64) -> Result<u64, Error> {
    let loaded = start.checked_add(file_bytes);
    let running = header.pref_address.checked_add(u64::from(header.init_size));
    match (loaded, running) {
        (Some(loaded), Some(running)) => Ok(loaded.max(running)),
        _ => Err(Error::Damaged("its preferred address is absurd")),
    }
}
