//! bzImage: the compressed kernel that distributions ship (Documentation/arch/x86/boot.rst).

use std::ops::Range;

use linux_loader::loader::bootparam::{KASLR_FLAG, LOADED_HIGH, XLF_KERNEL_64, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::kaslr::{Choice, Movable};
use super::unpack::{self, Packed, Unpacked};
use super::{Error, Image, Kernel, Loaded, require_ram};
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
/// Of a kernel's place in memory: Linux is mapped by pages of 2 MiB.
const MIN_ALIGN: u64 = 2 << 20;

/// A bzImage that has been checked.
#[derive(Debug)]
pub(super) struct Plan {
    header: setup_header,
    /// The bytes of the file before the protected-mode kernel.
    setup_size: u64,
    /// The bytes of the protected-mode kernel.
    kernel_size: u64,
    /// Where it runs when it unpacks itself.
    start: u64,
    /// The memory it uses then.
    pub occupied: Range<u64>,
}

pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(MAGIC) == Some(b"HdrS")
}

impl Plan {
    pub(super) fn new(memory: &GuestMemoryMmap, image: &Image) -> Result<Self, Error> {
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
        Ok(Self {
            header,
            setup_size,
            kernel_size,
            start,
            occupied: start..end,
        })
    }

    /// The initrd must end at or below this address.
    pub(super) fn initrd_end_max(&self) -> u64 {
        u64::from(self.header.initrd_addr_max) + 1
    }

    /// Unpacks the kernel, or leaves that to its own decompressor where it cannot be done here.
    pub(super) fn load(
        self,
        memory: &GuestMemoryMmap,
        image: &mut Image,
        choice: &Choice,
        prepare: &dyn Fn(Range<u64>),
    ) -> Result<Kernel, Error> {
        let unpacked = self.unpack(memory, image, choice, prepare);
        let mut header = self.header;
        let (entry, occupied, loaded) = match unpacked {
            Ok(kernel) => {
                if kernel.is_random {
                    header.loadflags |= KASLR_FLAG;
                }
                let end = kernel.start + u64::from(header.init_size);
                let is_random = kernel.is_random;
                let loaded = Loaded::Unpacked { is_random };
                (kernel.entry, kernel.start..end, loaded)
            }
            Err(why) => {
                prepare(self.occupied.clone());
                let start = GuestAddress(self.start);
                BzImage::load(memory, Some(start), image.file, None).map_err(Error::Copy)?;
                let entry = GuestAddress(self.start + ENTRY_64);
                (entry, self.occupied, Loaded::UnpacksItself(why))
            }
        };
        Ok(Kernel {
            protocol: Protocol::Linux64,
            entry,
            occupied,
            initrd_end_max: u64::from(header.initrd_addr_max) + 1,
            cmdline_max: header.cmdline_size as usize,
            header: Some(header),
            loaded,
        })
    }

    fn unpack(
        &self,
        memory: &GuestMemoryMmap,
        image: &Image,
        choice: &Choice,
        prepare: &dyn Fn(Range<u64>),
    ) -> Result<Unpacked, unpack::Error> {
        let header = &self.header;
        let align = u64::from(header.kernel_alignment);
        let kernel = Movable {
            linked: header.pref_address,
            size: header.init_size.into(),
            align,
        };
        let is_relocatable = header.relocatable_kernel != 0;
        let is_aligned = align.is_power_of_two()
            && align >= MIN_ALIGN
            && kernel.linked.is_multiple_of(align)
            && kernel.linked >= layout::HIGH_RAM_START.0;
        if !is_relocatable || !is_aligned {
            return Err(unpack::Error::Header);
        }
        let offset = u64::from(header.payload_offset);
        let size = u64::from(header.payload_length);
        if offset + size > self.kernel_size {
            return Err(unpack::Error::Payload("it is not in the image"));
        }
        let payload = Packed::open(image.file, self.setup_size + offset, size)?;
        unpack::load(memory, &payload, kernel, choice, prepare)
    }
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
