//! The tables by which the guest finds its CPUs, interrupt controllers, devices and the way to power off (ACPI 6.5,
//! hardware-reduced).
//!
//! ```text
//! RSDP -> XSDT -> FADT -> DSDT   devices, \_S5
//!              -> MADT           local APICs, I/O APIC
//!              -> MCFG           configuration space of PCI, if there is any
//! ```

mod dsdt;
#[cfg(test)]
mod tests;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use thiserror::Error as ThisError;

use crate::{Platform, layout};

const OEM_ID: [u8; 6] = *b"MINVMM";
const OEM_TABLE_ID: [u8; 8] = *b"MINIVMM ";
const OEM_REVISION: u32 = 1;

/// The most CPUs: an 8-bit APIC id of 255 addresses all CPUs at once.
pub const MAX_CPUS: u8 = 254;
/// The most virtio-mmio devices, by the names that they have in the DSDT.
pub const MAX_VIRTIO_MMIO: usize = 256;

/// Why the machine cannot be described.
#[derive(Debug, ThisError)]
pub enum Error {
    /// None, or more than the APIC ids allow.
    #[error("the machine has {0} CPUs; it can have 1 to {MAX_CPUS}")]
    Cpus(u8),
    /// More devices than the DSDT has names for.
    #[error("the machine has {0} virtio-mmio devices; it can have {MAX_VIRTIO_MMIO}")]
    Devices(usize),
    /// A window that a 32-bit resource cannot express.
    #[error("the virtio-mmio window at {0:#x} is not below 4 GiB")]
    Window(u64),
    /// The area for the tables is too small.
    #[error("the tables take {0} bytes and have room for {room}", room = layout::ACPI_END.0 - layout::ACPI_START.0)]
    TooLarge(usize),
}

/// Tables begin on such a boundary.
const ALIGNMENT: usize = 16;

/// All tables, one after the other; the first byte belongs at [`layout::ACPI_START`].
pub(crate) fn tables(platform: &Platform) -> Result<Vec<u8>, Error> {
    check(platform)?;
    // The RSDP is the first table and the last to be known: it points to the XSDT, and that to the others.
    let mut bytes = vec![0; Rsdp::len()];
    // Appends a table and returns its guest physical address.
    let mut add = |table: &dyn Aml| {
        let offset = bytes.len().next_multiple_of(ALIGNMENT);
        bytes.resize(offset, 0);
        table.to_aml_bytes(&mut bytes);
        layout::ACPI_START.0 + offset as u64
    };
    let dsdt = add(&dsdt::dsdt(platform));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(add(&fadt(dsdt)));
    xsdt.add_entry(add(&madt(platform.cpus)));
    if platform.pci {
        xsdt.add_entry(add(&mcfg()));
    }
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, add(&xsdt)).to_aml_bytes(&mut rsdp);
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    let room = layout::ACPI_END.0 - layout::ACPI_START.0;
    match bytes.len() {
        size if size as u64 > room => Err(Error::TooLarge(size)),
        _ => Ok(bytes),
    }
}

fn check(platform: &Platform) -> Result<(), Error> {
    if !(1..=MAX_CPUS).contains(&platform.cpus) {
        return Err(Error::Cpus(platform.cpus));
    }
    if platform.virtio_mmio.len() > MAX_VIRTIO_MMIO {
        return Err(Error::Devices(platform.virtio_mmio.len()));
    }
    let last = layout::MMIO_HOLE_END.0 - u64::from(layout::VIRTIO_MMIO_SIZE);
    let mut bases = platform.virtio_mmio.iter().map(|device| device.base.0);
    bases
        .find(|&base| base > last)
        .map_or(Ok(()), |base| Err(Error::Window(base)))
}

/// IA-PC boot architecture flags (ACPI 6.5, table 5.10): neither VGA nor a CMOS clock must be probed for. That
/// "legacy devices" and "8042" are not set says that there is no keyboard controller.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// The fixed description table: no fixed hardware but the ports for sleep and reset (ACPI 6.5, 5.2.9).
fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // These two say that the buttons are no fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_CONTROL_PORT + 1);
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.finalize()
}

/// An 8-bit register at an I/O port.
fn port(address: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        address.into(),
    )
}

/// Where the configuration space of PCI is (PCI Firmware Specification 3.3, 4.1.2).
fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM.0, 0, 0, 0);
    mcfg
}

/// The interrupt controllers (ACPI 6.5, 5.2.12). The flag PCAT_COMPAT is not set: there are no 8259s.
fn madt(cpus: u8) -> impl Aml {
    let lapic = LocalInterruptController::Address(layout::LAPIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, lapic);
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}
