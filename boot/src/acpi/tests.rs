//! Tests of the ACPI tables, also by Intel's disassembler `iasl` (package acpica-tools).

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::VirtioMmio;
use crate::tests::images::{memory, platform};
use vm_memory::{Bytes, GuestAddress};

#[path = "../../../tests/harness/skip.rs"]
mod skip;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn number(bytes: &[u8], at: usize, size: usize) -> u64 {
    let digits = bytes[at..at + size].iter().rev();
    digits.fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The tables by their signatures, found the way a guest finds them; every checksum on the way is checked.
fn find_tables(platform: &Platform) -> BTreeMap<String, Vec<u8>> {
    let memory = memory(16);
    let tables = super::tables(platform).unwrap();
    memory.write_slice(&tables, layout::ACPI_START).unwrap();
    let read = |address: u64, size: usize| {
        let mut bytes = vec![0; size];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    };
    let rsdp = read(layout::ACPI_START.0, 36);
    assert_eq!(rsdp[..8], *b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));

    let mut tables = BTreeMap::new();
    let mut add = |address: u64| {
        let size = number(&read(address, 8), 4, 4) as usize;
        assert!(address >= layout::ACPI_START.0 && address + size as u64 <= layout::ACPI_END.0);
        let table = read(address, size);
        let signature = String::from_utf8(table[..4].to_vec()).unwrap();
        assert_eq!(sum(&table), 0, "checksum of {signature}");
        tables.insert(signature, table.clone());
        table
    };
    let xsdt = add(number(&rsdp, 24, 8));
    for entry in xsdt[36..].chunks(8) {
        let table = add(number(entry, 0, 8));
        if table.starts_with(b"FACP") {
            add(number(&table, 140, 8)); // X_DSDT
        }
    }
    tables
}

#[test]
fn tables_are_all_reachable_with_right_checksums() {
    for (cpus, devices) in [(1, 0), (1, 1), (2, 18), (254, 18), (254, 256)] {
        let tables = find_tables(&platform(cpus, devices));
        let signatures: Vec<_> = tables.keys().map(String::as_str).collect();
        assert_eq!(signatures, ["APIC", "DSDT", "FACP", "MCFG", "XSDT"]);
    }
}

#[test]
fn serial_port_is_described_only_where_there_is_one() {
    let mut platform = platform(1, 1);
    let has_port = |platform: &Platform| {
        let dsdt = &find_tables(platform)["DSDT"];
        dsdt.windows(4).any(|name| name == b"COM1")
    };
    assert!(has_port(&platform));
    platform.serial = false;
    assert!(!has_port(&platform));
}

#[test]
fn pci_is_described_only_where_there_is_any() {
    let mut platform = platform(1, 1);
    let with = find_tables(&platform);
    assert_eq!(number(&with["MCFG"], 44, 8), 0xe000_0000);
    let has_bridge = |dsdt: &[u8]| dsdt.windows(4).any(|name| name == b"PCI0");
    assert!(has_bridge(&with["DSDT"]));
    platform.pci = false;
    let without = find_tables(&platform);
    assert!(!without.contains_key("MCFG") && !has_bridge(&without["DSDT"]));
}

#[test]
fn fadt_declares_reduced_hardware_and_its_registers() {
    let fadt = &find_tables(&platform(1, 0))["FACP"];
    assert!(fadt[8] >= 5);
    let flags = number(fadt, 112, 4);
    assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
    assert_eq!(number(fadt, 109, 2), 0x24); // IAPC_BOOT_ARCH
    let register = |at: usize| (fadt[at], fadt[at + 1], number(fadt, at + 4, 8));
    assert_eq!(register(116), (1, 8, 0x602));
    assert_eq!(fadt[128], 1); // RESET_VALUE
    assert_eq!(register(244), (1, 8, 0x600));
    assert_eq!(register(256), (1, 8, 0x601));
}

#[test]
fn madt_lists_every_cpu_once_and_one_ioapic() {
    let madt = &find_tables(&platform(254, 0))["APIC"];
    assert_eq!(number(madt, 36, 4), 0xfee0_0000);
    assert_eq!(number(madt, 40, 4) & 1, 0); // PCAT_COMPAT
    let (lapics, ioapic) = madt[44..].split_at(254 * 8);
    for (n, lapic) in lapics.chunks(8).enumerate() {
        assert_eq!(*lapic, [0, 8, n as u8, n as u8, 1, 0, 0, 0]);
    }
    assert_eq!(*ioapic, [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
}

#[test]
fn write_impossible_platforms_are_refused() {
    let refuse = |platform: &Platform| tables(platform).unwrap_err();
    assert!(matches!(refuse(&platform(0, 0)), Error::Cpus(0)));
    assert!(matches!(refuse(&platform(255, 0)), Error::Cpus(255)));
    assert!(matches!(refuse(&platform(1, 257)), Error::Devices(257)));
    let mut high = platform(1, 0);
    high.virtio_mmio.push(VirtioMmio {
        base: GuestAddress(0xffff_f001),
        gsi: 6,
    });
    assert!(matches!(refuse(&high), Error::Window(0xffff_f001)));
}

/// Runs `iasl` in `directory`; anything it complains about is a failure. `None` if it is not installed.
fn iasl(directory: &Path, arguments: &[&str]) -> Option<()> {
    let output = match Command::new("iasl")
        .args(arguments)
        .current_dir(directory)
        .output()
    {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            skip::leave_out("disassembling the ACPI tables needs iasl: apt install acpica-tools");
            return None;
        }
        output => output.unwrap(),
    };
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let complaints = text.lines().filter(|line| {
        let line = line
            .to_lowercase()
            .replace("0 errors", "")
            .replace("0 warnings", "");
        ["error", "warning", "invalid", "incorrect", "could not"]
            .iter()
            .any(|word| line.contains(word))
    });
    let complaints: Vec<_> = complaints.collect();
    assert!(
        output.status.success() && complaints.is_empty(),
        "iasl {arguments:?}:\n{text}"
    );
    Some(())
}

#[test]
fn iasl_takes_every_table_apart_and_the_dsdt_together_again() {
    let directory = tempfile::tempdir().unwrap();
    let tables = find_tables(&platform(3, 2));
    for (signature, table) in &tables {
        let file = format!("{signature}.aml");
        std::fs::write(directory.path().join(&file), table).unwrap();
        if iasl(directory.path(), &["-d", &file]).is_none() {
            return;
        }
    }
    iasl(directory.path(), &["-p", "again", "DSDT.dsl"]);

    let dsdt = std::fs::read_to_string(directory.path().join("DSDT.dsl")).unwrap();
    let words: String = dsdt.split_whitespace().collect::<Vec<_>>().join(" ");
    for expected in [
        "Device (C002) { Name (_HID, \"ACPI0007\"",
        "Device (V001) { Name (_HID, \"LNRO0005\"",
        "Memory32Fixed (ReadWrite, 0xD0001000, // Address Base 0x00001000, // Address Length ) \
         Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000007, }",
        "IO (Decode16, 0x03F8, // Range Minimum 0x03F8, // Range Maximum 0x01, // Alignment 0x08, // Length )",
        "If ((Arg0 == 0x05)) { Notify (\\_SB.PWRB, 0x80)",
        "Name (\\_S5, Package (0x04)",
    ] {
        assert!(words.contains(expected), "no {expected:?} in:\n{dsdt}");
    }
}
