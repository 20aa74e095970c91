//! The differentiated description table: the devices, as AML.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt,
    Memory32Fixed, Method, Name, Notify, ONE, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::{Platform, VirtioMmio, layout};

/// The size of a table's header.
const HEADER_SIZE: u32 = 36;
/// From revision 2 on AML integers have 64 bits.
const REVISION: u8 = 2;
/// The notification of a pressed button (ACPI 6.5, table 5.157).
const BUTTON_PRESSED: u8 = 0x80;

pub(super) fn dsdt(platform: &Platform) -> Sdt {
    let mut devices = Vec::new();
    for cpu in 0..platform.cpus {
        processor(&mut devices, cpu);
    }
    if platform.serial {
        serial(&mut devices);
    }
    for (index, device) in platform.virtio_mmio.iter().enumerate() {
        virtio_mmio(&mut devices, index, device);
    }
    if platform.pci {
        pci_host(&mut devices);
    }
    power_button(&mut devices);

    let mut body = Scope::raw(r"\_SB_".into(), devices);
    // Only the first element counts on hardware-reduced ACPI; four are usual (ACPI 6.5, 7.4.2).
    let s5 = Package::new(vec![&layout::S5_SLEEP_TYPE, &ZERO, &ZERO, &ZERO]);
    Name::new(r"\_S5_".into(), &s5).to_aml_bytes(&mut body);

    let mut table = Sdt::new(
        *b"DSDT",
        HEADER_SIZE,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(&body);
    table
}

fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(path.into(), value)
}

/// An edge-triggered, active-high interrupt that no other device uses.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// `ACPI0007`; `_UID` is the id in the MADT's local APIC structure.
fn processor(sink: &mut dyn AmlSink, cpu: u8) {
    let path = Path::new(&format!("C{cpu:03X}"));
    let hid = name("_HID", &"ACPI0007");
    let uid = name("_UID", &cpu);
    Device::new(path, vec![&hid, &uid]).to_aml_bytes(sink);
}

/// `PNP0501`, a 16550A UART.
fn serial(sink: &mut dyn AmlSink) {
    let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8);
    let interrupt = interrupt(layout::SERIAL_GSI);
    let hid = name("_HID", &EISAName::new("PNP0501"));
    let uid = name("_UID", &ZERO);
    let crs = name("_CRS", &ResourceTemplate::new(vec![&ports, &interrupt]));
    Device::new("COM1".into(), vec![&hid, &uid, &crs]).to_aml_bytes(sink);
}

/// `LNRO0005`, the id by which Linux' virtio_mmio driver knows its devices.
fn virtio_mmio(sink: &mut dyn AmlSink, index: usize, device: &VirtioMmio) {
    let window = Memory32Fixed::new(true, device.base.0 as u32, layout::VIRTIO_MMIO_SIZE);
    let interrupt = interrupt(device.gsi);
    let hid = name("_HID", &"LNRO0005");
    let uid = name("_UID", &index);
    let cca = name("_CCA", &ONE); // its DMA is coherent with the caches
    let crs = name("_CRS", &ResourceTemplate::new(vec![&window, &interrupt]));
    let path = Path::new(&format!("V{index:03X}"));
    Device::new(path, vec![&hid, &uid, &cca, &crs]).to_aml_bytes(sink);
}

/// `PNP0A08`, a PCI Express host bridge, and `PNP0C02`, which reserves its configuration space: Linux does not use
/// what nothing reserves.
fn pci_host(sink: &mut dyn AmlSink) {
    // Both lie below 4 GiB.
    let (first, ecam) = (layout::PCI_WINDOW.0 as u32, layout::PCI_ECAM.0 as u32);
    let last = first + (layout::PCI_WINDOW_SIZE - 1);
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let window =
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None);
    let crs = name("_CRS", &ResourceTemplate::new(vec![&bus, &ports, &window]));
    let hid = name("_HID", &EISAName::new("PNP0A08"));
    let cid = name("_CID", &EISAName::new("PNP0A03"));
    let uid = name("_UID", &ZERO);
    let segment = name("_SEG", &ZERO);
    let first_bus = name("_BBN", &ZERO);
    let cca = name("_CCA", &ONE); // its DMA is coherent with the caches
    Device::new(
        "PCI0".into(),
        vec![&hid, &cid, &uid, &segment, &first_bus, &cca, &crs],
    )
    .to_aml_bytes(sink);

    let ecam = Memory32Fixed::new(true, ecam, layout::PCI_ECAM_SIZE);
    let hid = name("_HID", &EISAName::new("PNP0C02"));
    let uid = name("_UID", &ZERO);
    let crs = name("_CRS", &ResourceTemplate::new(vec![&ecam]));
    Device::new("ECAM".into(), vec![&hid, &uid, &crs]).to_aml_bytes(sink);
}

/// `PNP0C0C`, the power button, and `ACPI0013`, the generic event device whose interrupt presses it.
fn power_button(sink: &mut dyn AmlSink) {
    let hid = name("_HID", &EISAName::new("PNP0C0C"));
    Device::new("PWRB".into(), vec![&hid]).to_aml_bytes(sink);

    let hid = name("_HID", &"ACPI0013");
    let uid = name("_UID", &ZERO);
    let interrupt = interrupt(layout::POWER_BUTTON_GSI);
    let crs = name("_CRS", &ResourceTemplate::new(vec![&interrupt]));
    let button = Path::new(r"\_SB_.PWRB");
    let press = Notify::new(&button, &BUTTON_PRESSED);
    let is_ours = Equal::new(&Arg(0), &layout::POWER_BUTTON_GSI);
    let pressed = If::new(&is_ours, vec![&press]);
    let event = Method::new("_EVT".into(), 1, true, vec![&pressed]);
    Device::new("GED_".into(), vec![&hid, &uid, &crs, &event]).to_aml_bytes(sink);
}
