//! Configuration space by either mechanism, each width at each offset, and the window that it has
//! into BAR 0 (virtio
//! 1.2, 4.1.4.9).

use alloc::format;

use super::super::registers::{STRIDE, VALUES, in_both_states, touch};
use super::{Failure, Runner};
use crate::cpu::{in8, in16, in32, in32_string, out8, out16, out32, out32_string};
use crate::pci::{ADDRESS_PORT, CONFIG_SIZE, DATA_PORT, ECAM, Function, SLOTS, aim, at};
use crate::region::Region;
use crate::virtio::pci::{PciDevice, common};

/// The part of configuration space that conventional PCI knows.
const CONVENTIONAL: u64 = 256;
/// The size of the configuration space of bus 0.
const ECAM_SIZE: u64 = 0x10_0000;

/// In the window's capability: which BAR, where, how many bytes, and the data.
const WINDOW_BAR: u64 = 4;
const WINDOW_OFFSET: u64 = 8;
const WINDOW_LENGTH: u64 = 12;
const WINDOW_DATA: u64 = 16;

/// Does harm by a value that is written.
type Attack = fn(PciDevice, u64);

/// Runs them.
pub fn run(runner: &mut Runner<'_>, nic: PciDevice) {
    let attacks: [(&str, Attack); 4] = [
        ("memory", by_memory),
        ("ports", by_ports),
        ("address-port", address_port),
        ("bus", whole_bus),
    ];
    for value in VALUES {
        for (name, attack) in attacks {
            in_both_states(runner, &format!("config-{name}-{value:#x}"), |_| {
                let before = nic.function.ids();
                attack(nic, value);
                restore(nic);
                match nic.function.ids() {
                    now if now == before => Ok(()),
                    now => Err(format!("the ids became {now:x?}")),
                }
            });
        }
        runner.attack(&format!("config-strings-{value:#x}"), |_| {
            let result = by_strings(nic, value);
            restore(nic);
            result
        });
        in_both_states(runner, &format!("config-window-{value:#x}"), |_| {
            window_anywhere(nic, value);
            restore(nic);
            window_works(nic)
        });
    }
}

/// Brings back what the NIC needs for its work.
fn restore(nic: PciDevice) {
    nic.function.config.write(at::BAR_0, nic.bar.base as u32);
    nic.function.enable();
    nic.msix.control(0);
}

/// All of the NIC's configuration space, as memory.
fn by_memory(nic: PciDevice, value: u64) {
    let sparse = (CONVENTIONAL..CONFIG_SIZE - 8).step_by(STRIDE);
    let offsets = (0..CONVENTIONAL + 8).chain(sparse);
    for offset in offsets.chain([CONFIG_SIZE - 8]) {
        touch(nic.function.config, offset, value);
    }
}

/// All of it by ports.
fn by_ports(nic: PciDevice, value: u64) {
    for register in (0..CONVENTIONAL).step_by(4) {
        aim(0, nic.function.slot, 0, register as u8);
        touch_data_port(value);
    }
}

/// Writes and reads the data port with each width at each offset.
fn touch_data_port(value: u64) {
    for port in DATA_PORT..DATA_PORT + 4 {
        out8(port, value as u8);
        in8(port);
        out16(port, value as u16);
        in16(port);
        out32(port, value as u32);
        in32(port);
    }
}

/// The data port by string instructions, which repeat an access and do not go on to the next
/// register.
fn by_strings(nic: PciDevice, value: u64) -> Result<(), Failure> {
    let mut words = [0; 40];
    for register in (0..CONVENTIONAL).step_by(4) {
        aim(0, nic.function.slot, 0, register as u8);
        out32_string(DATA_PORT, &[value as u32; 40]);
        in32_string(DATA_PORT, &mut words);
        let expected = in32(DATA_PORT);
        if let Some(other) = words.iter().find(|word| **word != expected) {
            return Err(format!(
                "register {register:#x} is {other:#x} and {expected:#x}"
            ));
        }
    }
    Ok(())
}

/// The address register in pieces, and addresses of nothing: switched off, on another bus, of
/// another function.
fn address_port(nic: PciDevice, value: u64) {
    for port in ADDRESS_PORT..DATA_PORT {
        out8(port, value as u8);
        in8(port);
        out16(port, value as u16);
        in16(port);
        in32(port);
        out32(port, value as u32);
        touch_data_port(value);
    }
    out32(ADDRESS_PORT, u32::from(nic.function.slot) << 11);
    touch_data_port(value);
    let slot = nic.function.slot;
    for (bus, slot, function) in [(1, slot, 0), (0xff, slot, 0), (0, slot, 1), (0, 31, 7)] {
        aim(bus, slot, function, 0x10);
        touch_data_port(value);
    }
}

/// The host bridge, every place where there is no function, and what follows the bus.
fn whole_bus(_: PciDevice, value: u64) {
    for slot in 0..SLOTS {
        for number in [0, 1, 7] {
            let function = Function::new(slot, number);
            let is_nic = function.ids() != (0xffff, 0xffff) && slot != 0;
            for offset in [
                0,
                2,
                4,
                0x0e,
                0x10,
                0x34,
                0x3d,
                0xf9,
                0x100,
                CONFIG_SIZE - 8,
            ] {
                if !is_nic {
                    touch(function.config, offset, value);
                }
            }
        }
    }
    let end = Region {
        base: ECAM + ECAM_SIZE - 8,
        size: 24,
    };
    (0..16).for_each(|offset| touch(end, offset, value));
}

/// Points the window to where it may not show anything, and uses it with each width.
fn window_anywhere(nic: PciDevice, value: u64) {
    let config = nic.function.config;
    let size = nic.bar.size as u32;
    let places = [
        0,
        2,
        20,
        0x1000,
        0x3000,
        0x4004,
        size - 1,
        size - 2,
        size,
        !3,
        u32::MAX,
    ];
    for bar in [0_u8, 1, 5, 6, 0xff] {
        for offset in places {
            for length in [0, 1, 2, 3, 4, 8, u32::MAX] {
                config.write(nic.window + WINDOW_BAR, bar);
                config.write(nic.window + WINDOW_OFFSET, offset);
                config.write(nic.window + WINDOW_LENGTH, length);
                for data in nic.window + WINDOW_DATA - 1..nic.window + WINDOW_DATA + 2 {
                    touch(config, data, value);
                }
            }
        }
    }
}

/// Whether the window shows what is there.
fn window_works(nic: PciDevice) -> Result<(), Failure> {
    let config = nic.function.config;
    let start = nic.common.base - nic.bar.base;
    config.write(nic.window + WINDOW_BAR, 0_u8);
    config.write(
        nic.window + WINDOW_OFFSET,
        (start + common::NUM_QUEUES) as u32,
    );
    config.write(nic.window + WINDOW_LENGTH, 2_u32);
    let shown: u16 = config.read(nic.window + WINDOW_DATA);
    match nic.common.read::<u16>(common::NUM_QUEUES) {
        queues if queues == shown => Ok(()),
        queues => Err(format!(
            "the window shows {shown} queues instead of {queues}"
        )),
    }
}
