//! The structures in BAR 0 with each width at each offset, inside and past their ends, and BAR 0
//! moved and switched off.

use alloc::format;

use super::super::registers::{STRIDE, VALUES, in_both_states, touch};
use super::super::rig::{Bench, Rig};
use super::{Failure, Runner, settle};
use crate::memory::PAGE;
use crate::pci::at;
use crate::region::Region;
use crate::virtio::Kind;
use crate::virtio::net::feature;
use crate::virtio::pci::{NO_VECTOR, PciDevice, common};

/// How much of a structure is tried at every offset, and how much past its end.
const DENSE: u64 = 0x40;
const PAST: u64 = 0x10;

/// Where BAR 0 is sent: nowhere, everywhere, half a page, a neighbour's place, RAM, configuration
/// space, the local APIC.
const PLACES: [u32; 7] = [
    0,
    u32::MAX,
    0xe800_0800,
    0xe801_0000,
    0x0020_0000,
    0xe000_0000,
    0xfee0_0000,
];

/// Runs them.
pub fn run(runner: &mut Runner<'_>, nic: PciDevice) {
    let structures = [
        ("common", nic.common),
        ("notify", nic.notify),
        ("isr", nic.isr),
        ("device", nic.device),
        ("table", nic.msix.table),
        ("pending", nic.msix.pending),
    ];
    for value in VALUES {
        for (name, structure) in structures {
            in_both_states(runner, &format!("bar-{name}-{value:#x}"), |_| {
                touch_structure(nic, structure, value);
                is_itself(nic)
            });
        }
        in_both_states(runner, &format!("bar-sparse-{value:#x}"), |_| {
            touch_sparsely(nic, value);
            is_itself(nic)
        });
    }
    in_both_states(runner, "bar-queue-select", |_| beyond_the_queues(nic));
    in_both_states(runner, "bar-vectors", |_| vectors_beyond(nic));
    for place in PLACES {
        runner.attack(&format!("bar-moved-to-{place:#x}"), |bench| {
            in_traffic(bench, |rig| move_to(rig, nic, place))
        });
    }
    runner.attack("bar-switched-off", |bench| {
        in_traffic(bench, |rig| switch_off(rig, nic))
    });
    runner.attack("bus-mastering-taken-away", |bench| {
        let mut rig = Rig::start(bench, feature::PLAIN)?;
        rig.offer_buffers();
        take_mastering_away(&mut rig, nic)
    });
}

/// Touches a structure and what follows.
fn touch_structure(nic: PciDevice, structure: Region, value: u64) {
    let start = structure.base - nic.bar.base;
    let dense = 0..structure.size.min(DENSE);
    let end = structure.size.saturating_sub(8)..structure.size + PAST;
    for offset in dense.chain(end).map(|offset| start + offset) {
        if offset + 8 <= nic.bar.size {
            touch(nic.bar, offset, value);
        }
    }
}

/// Touches all of BAR 0 here and there, and across each page's end and its own.
fn touch_sparsely(nic: PciDevice, value: u64) {
    let beyond = Region {
        size: nic.bar.size + 8,
        ..nic.bar
    };
    let pages = (PAGE as u64..=nic.bar.size).step_by(PAGE);
    let ends = pages.flat_map(|end| end - 7..end);
    for offset in (0..nic.bar.size).step_by(STRIDE).chain(ends) {
        touch(beyond, offset, value);
    }
}

/// Whether the NIC still shows its identity and its number of queues.
fn is_itself(nic: PciDevice) -> Result<(), Failure> {
    let now = PciDevice::all(Kind::Net);
    let queues: u16 = nic.common.read(common::NUM_QUEUES);
    let same = |other: &PciDevice| other.bar.base == nic.bar.base && other.bar.size == nic.bar.size;
    if now.iter().any(same) && queues >= 2 {
        Ok(())
    } else {
        Err(format!("{queues} queues, and the NICs are {now:x?}"))
    }
}

/// Sets up queues that do not exist.
fn beyond_the_queues(nic: PciDevice) -> Result<(), Failure> {
    let queues: u16 = nic.common.read(common::NUM_QUEUES);
    for queue in [queues, queues + 1, 0x100, 0x7fff, 0xffff] {
        nic.common.write(common::QUEUE_SELECT, queue);
        for field in (common::QUEUE_SIZE..common::QUEUE_DEVICE).step_by(2) {
            nic.common.write(field, 1_u16);
        }
        for field in [common::QUEUE_SIZE, common::QUEUE_ENABLE] {
            match nic.common.read::<u16>(field) {
                0 => {}
                other => return Err(format!("queue {queue} has {other:#x} at {field:#x}")),
            }
        }
        nic.notify(queue.into());
    }
    Ok(())
}

/// Assigns vectors that do not exist: they must read back as none (virtio 1.2, 4.1.5.1.2.1).
fn vectors_beyond(nic: PciDevice) -> Result<(), Failure> {
    for vector in [nic.msix.vectors, 0x7ff, 0x800, 0x8000, 0xfffe, NO_VECTOR] {
        for queue in [0_u16, 1] {
            nic.common.write(common::QUEUE_SELECT, queue);
            for field in [common::CONFIG_VECTOR, common::QUEUE_VECTOR] {
                nic.common.write(field, vector);
                let got: u16 = nic.common.read(field);
                if got != NO_VECTOR {
                    return Err(format!("vector {vector:#x} reads back as {got:#x}"));
                }
            }
        }
    }
    Ok(())
}

/// Runs an attack while frames flow, which must flow after it without a reset.
pub fn in_traffic(
    bench: &Bench,
    attack: impl FnOnce(&mut Rig<'_>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut rig = Rig::start(bench, feature::PLAIN)?;
    rig.offer_buffers();
    attack(&mut rig)?;
    if rig.arp() {
        Ok(())
    } else {
        Err("no answer to ARP without a reset".into())
    }
}

/// Writes another address, in one piece and in several, and brings the old one back.
fn move_to(rig: &mut Rig<'_>, nic: PciDevice, place: u32) -> Result<(), Failure> {
    let config = nic.function.config;
    for _ in 0..5 {
        config.write(at::BAR_0, place);
        rig.arp();
        config.write(at::BAR_0 + 2, (place >> 16) as u16);
        config.write(at::BAR_0, place as u16);
        rig.arp();
        for byte in 0..4 {
            config.write(at::BAR_0 + byte, (place >> (8 * byte)) as u8);
        }
        // The one before it too, and those that the NIC does not have.
        config.write(at::BAR_0 - 4, u64::from(place) << 32);
        config.write(at::BAR_0 + 4, place);
        rig.arp();
        config.write(at::BAR_0, nic.bar.base as u32);
    }
    match config.read::<u32>(at::BAR_0) {
        base if u64::from(base) == nic.bar.base => Ok(()),
        other => Err(format!("BAR 0 cannot be brought back from {other:#x}")),
    }
}

/// Switches memory decoding and interrupt pins off and on while the NIC is used.
fn switch_off(rig: &mut Rig<'_>, nic: PciDevice) -> Result<(), Failure> {
    for command in [1_u16 << 2, 1 << 2 | 1 << 10, 0xfffd, 0xffff] {
        nic.function.config.write(at::COMMAND, command);
        rig.arp();
        touch(nic.common, common::QUEUE_DESC, 0);
        settle();
        nic.function.enable();
        rig.arp();
    }
    Ok(())
}

/// Takes bus mastering away: the NIC must leave memory alone from then on, until it has been reset.
fn take_mastering_away(rig: &mut Rig<'_>, nic: PciDevice) -> Result<(), Failure> {
    for command in [0_u16, 1 << 1, 0xfffb] {
        nic.function.config.write(at::COMMAND, command);
        nic.function.enable();
        if rig.arp() {
            return Err(format!("frames still flow after command {command:#x}"));
        }
    }
    Ok(())
}
