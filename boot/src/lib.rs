//! Everything a Linux guest needs in memory and registers before its first instruction.
//!
//! [`load`] takes guest memory and a [`BootSpec`] (kernel, initrd, command line, and the [`Platform`]
//! the devices live on), writes all of it into the memory and gives back a [`BootState`]: the values
//! of the boot CPU's registers. Threads that it starts have ended then. It keeps no state and knows nothing of
//! KVM beyond the plain structs of its registers.
//!
//! | file | what it does |
//! | --- | --- |
//! | [`layout`] | where everything is in the guest's physical address space |
//! | `kernel.rs` | recognises a kernel image and loads it: `kernel/bzimage.rs`, `kernel/elf.rs` |
//! | `kernel/unpack.rs` | unpacks a bzImage's payload to where it runs; `kernel/kaslr.rs` chooses the place |
//! | `share.rs` | shares reading between two threads |
//! | `initrd.rs` | finds room for the initrd and reads it there |
//! | `cmdline.rs` | checks the kernel command line |
//! | `params.rs` | the memory map (e820), and the zero page or the PVH start info that carries it |
//! | `acpi.rs` | the tables by which the guest finds its devices; `acpi/dsdt.rs` is their AML |
//! | `regs.rs` | registers, GDT and page tables at the kernel's entry point |
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//!
//! let memory = GuestMemoryMmap::from_ranges(&boot::layout::ram_regions(512 << 20))?;
//! let platform = boot::Platform {
//!     cpus: 1,
//!     serial: true,
//!     virtio_mmio: vec![boot::VirtioMmio {
//!         base: GuestAddress(boot::layout::VIRTIO_MMIO_BASE),
//!         gsi: 6,
//!     }],
//!     pci: false,
//! };
//! let mut kernel = std::fs::File::open("vmlinuz")?;
//! let state = boot::load(
//!     &memory,
//!     &mut boot::BootSpec {
//!         kernel: &mut kernel,
//!         initrd: None,
//!         cmdline: "console=ttyS0",
//!         random: [0x1ae1_6a3b_2f90_404f, 0x0139_408d_cbbf_7a44],
//!         prepare: &|_| (),
//!         platform: &platform,
//!     },
//! )?;
//! println!("entered at {:#x}", state.regs.rip);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod acpi;
pub mod cmdline;
pub mod initrd;
pub mod kernel;
pub mod layout;
mod params;
pub mod regs;
mod share;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::thread;

use thiserror::Error as ThisError;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use kernel::kaslr::Choice;

pub use initrd::Initrd;
pub use regs::BootState;

/// What to boot, and on which machine.
#[expect(missing_debug_implementations, reason = "a closure has none")]
pub struct BootSpec<'a> {
    /// The kernel: a bzImage or an ELF vmlinux. Read from its start, not from its position.
    pub kernel: &'a mut File,
    /// The initial RAM disk, if any; its format is a matter between the user and the kernel.
    pub initrd: Option<&'a mut File>,
    /// The whole kernel command line.
    pub cmdline: &'a str,
    /// Random numbers, by which a kernel is moved that can be moved (KASLR).
    pub random: [u64; 2],
    /// Called with the addresses of the memory that the kernel uses before it reads the memory map, before anything is
    /// written there.
    pub prepare: &'a dyn Fn(Range<u64>),
    /// The devices that the ACPI tables describe.
    pub platform: &'a Platform,
}

/// The machine as ACPI describes it. What has its place in [`layout`] is there or not; of virtio-mmio
/// devices the VMM says where it put them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// CPUs, 1 to 254. CPU n has the local APIC id n.
    pub cpus: u8,
    /// There is a serial port, COM1.
    pub serial: bool,
    /// The virtio devices behind the MMIO transport, in the order in which Linux is to find them.
    pub virtio_mmio: Vec<VirtioMmio>,
    /// There is a PCI Express host bridge with one bus, whose devices interrupt by MSI-X alone.
    pub pci: bool,
}

/// One virtio-mmio window of [`layout::VIRTIO_MMIO_SIZE`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmio {
    /// The guest physical address, below 4 GiB.
    pub base: GuestAddress,
    /// Its interrupt, edge-triggered and active high.
    pub gsi: u32,
}

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// The 64-bit Linux boot protocol: long mode, RSI points to the zero page
    /// (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
    Linux64,
    /// PVH: 32-bit protected mode without paging, EBX points to the start info
    /// (xen/include/public/arch-x86/hvm/start_info.h).
    Pvh,
}

/// Why a guest could not be prepared; the cause is the error's source.
#[derive(Debug, ThisError)]
pub enum Error {
    /// The kernel.
    #[error("cannot load the kernel")]
    Kernel(#[source] kernel::Error),
    /// The initrd.
    #[error("cannot load the initrd")]
    Initrd(#[source] initrd::Error),
    /// The kernel command line.
    #[error("cannot pass the kernel command line")]
    Cmdline(#[source] cmdline::Error),
    /// The ACPI tables.
    #[error("cannot describe the machine by ACPI tables")]
    Acpi(#[source] acpi::Error),
    /// Guest memory refuses a write.
    #[error("cannot write the {0} to guest memory")]
    Write(&'static str, #[source] GuestMemoryError),
}

/// Loads kernel and initrd into `memory`, describes the machine to the guest, and says how to start the
/// boot CPU. Called once, before the boot CPU runs for the first time.
///
/// `memory` has the regions of [`layout::ram_regions`], all zeros.
///
/// # Errors
///
/// A kernel, initrd or command line that cannot be used; memory too small for them; a platform that
/// ACPI cannot describe. `memory` is then in an undefined state.
pub fn load(memory: &GuestMemoryMmap, spec: &mut BootSpec) -> Result<BootState, Error> {
    let plan = kernel::Plan::new(memory, spec.kernel).map_err(Error::Kernel)?;
    let initrd = match spec.initrd.as_deref_mut() {
        Some(file) => {
            let place = initrd::place(memory, file, &plan).map_err(Error::Initrd)?;
            Some((&*file, place))
        }
        None => None,
    };
    let choice = Choice {
        random: spec.random,
        cmdline: spec.cmdline,
        initrd: initrd.map_or(0..0, |(_, place)| place.range()),
    };
    let (kernel, read) = thread::scope(|scope| {
        let read = initrd.map(|(file, place)| {
            let read = move || initrd::read(memory, file, place);
            share::spawn(scope, read)
        });
        let kernel = plan.load(memory, &choice, spec.prepare);
        (kernel, read.map_or(Ok(()), share::Running::join))
    });
    let kernel = kernel.map_err(Error::Kernel)?;
    read.map_err(Error::Initrd)?;
    let initrd = initrd.map(|(_, place)| place);
    let cmdline = cmdline::bytes(spec.cmdline, kernel.cmdline_max).map_err(Error::Cmdline)?;
    let tables = acpi::tables(spec.platform).map_err(Error::Acpi)?;
    let mut pieces = params::pieces(memory, &kernel, initrd);
    pieces.extend(regs::tables());
    pieces.push(("kernel command line", layout::CMDLINE, cmdline));
    pieces.push(("ACPI tables", layout::ACPI_START, tables));
    for (what, address, bytes) in pieces {
        memory
            .write_slice(&bytes, address)
            .map_err(|source| Error::Write(what, source))?;
    }
    Ok(regs::boot_state(kernel, initrd))
}

/// What it is, where it goes, and its bytes.
type Piece = (&'static str, GuestAddress, Vec<u8>);

/// What is looked at for zeros at once.
const STEP: usize = 256 << 10;

/// Writes `bytes` to memory that is all zeros: where they are too, it is not touched, which costs as much again as
/// writing.
fn write_to_new(
    memory: &GuestMemoryMmap,
    bytes: &[u8],
    address: GuestAddress,
) -> Result<(), GuestMemoryError> {
    let is_zero = |bytes: &[u8]| bytes.iter().fold(0, |all, byte| all | byte) == 0;
    for (step, at) in bytes.chunks(STEP).zip((address.0..).step_by(STEP)) {
        if !step.chunks(256).all(is_zero) {
            memory.write_slice(step, GuestAddress(at))?;
        }
    }
    Ok(())
}

/// The size of a file, which is read from its start next. `None` for a directory, which opens and
/// even seeks like a file: only reading fails.
fn rewind(file: &mut File) -> io::Result<Option<u64>> {
    if file.metadata()?.is_dir() {
        return Ok(None);
    }
    let size = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    Ok(Some(size))
}

/// A size for people, rounded down: the memory that there is.
fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// A size for people, rounded up: the memory that it takes.
fn mib_up(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests;
