//! The structures in BAR 0 with each width at each offset, inside and past their ends, and BAR 0 moved and switched off.

use alloc::format;

use super::super::registers::{STRIDE, VALUES, in_both_states, touch};
use super::super::rig::{Bench, Rig};
use super::{Failure, Runner};
use crate::memory::PAGE;
use crate::pci::at;
use crate::region::Region;
use crate::virtio::net::feature;
use crate::virtio::pci::{NO_VECTOR, PciCard, common};

/// How much of a structure is tried at every offset, and how much past its end.
const DENSE: u64 = 0x40;
const PAST: u64 = 0x10;

/// Where BAR 0 is sent: nowhere, everywhere, half a page, a neighbour's place, RAM, configuration space, the local APIC.
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
pub fn run(runner: &mut Runner<'_>, card: PciCard) {
    let structures = [
        ("common", card.common),
        ("notify", card.notify),
        ("isr", card.isr),
        ("device", card.device),
        ("table", card.msix.table),
        ("pending", card.msix.pending),
    ];
    for value in VALUES {
        for (name, structure) in structures {
            in_both_states(runner, &format!("bar-{name}-{value:#x}"), |_| {
                touch_structure(card, structure, value);
                is_itself(card)
            });
        }
        in_both_states(runner, &format!("bar-sparse-{value:#x}"), |_| {
            touch_sparsely(card, value);
            is_itself(card)
        });
    }
    in_both_states(runner, "bar-queue-select", |_| beyond_the_queues(card));
    in_both_states(runner, "bar-vectors", |_| vectors_beyond(card));
    for place in PLACES {
        runner.attack(&format!("bar-moved-to-{place:#x}"), |bench| {
            in_traffic(bench, |rig| move_to(rig, card, place))
        });
    }
    runner.attack("bar-switched-off", |bench| {
        in_traffic(bench, |rig| switch_off(rig, card))
    });
    runner.attack("bus-mastering-taken-away", |bench| {
        let mut rig = Rig::start(bench, feature::PLAIN)?;
        rig.offer_buffers();
        take_mastering_away(&mut rig, card)
    });
}

/// Touches a structure and what follows.
fn touch_structure(card: PciCard, structure: Region, value: u64) {
    let start = structure.base - card.bar.base;
    let dense = 0..structure.size.min(DENSE);
    let end = structure.size.saturating_sub(8)..structure.size + PAST;
    for offset in dense.chain(end).map(|offset| start + offset) {
        if offset + 8 <= card.bar.size {
            touch(card.bar, offset, value);
        }
    }
}

/// Touches all of BAR 0 here and there, and across each page's end and its own.
fn touch_sparsely(card: PciCard, value: u64) {
    let beyond = Region {
        size: card.bar.size + 8,
        ..card.bar
    };
    let pages = (PAGE as u64..=card.bar.size).step_by(PAGE);
    let ends = pages.flat_map(|end| end - 7..end);
    for offset in (0..card.bar.size).step_by(STRIDE).chain(ends) {
        touch(beyond, offset, value);
    }
}

/// Whether the card still tells who it is, and how many queues it has.
fn is_itself(card: PciCard) -> Result<(), Failure> {
    let now = PciCard::network_cards();
    let queues: u16 = card.common.read(common::NUM_QUEUES);
    let same = |other: &PciCard| other.bar.base == card.bar.base && other.bar.size == card.bar.size;
    if now.iter().any(same) && queues >= 2 {
        Ok(())
    } else {
        Err(format!("{queues} queues, and the cards are {now:x?}"))
    }
}

/// Sets up queues that do not exist.
fn beyond_the_queues(card: PciCard) -> Result<(), Failure> {
    let queues: u16 = card.common.read(common::NUM_QUEUES);
    for queue in [queues, queues + 1, 0x100, 0x7fff, 0xffff] {
        card.common.write(common::QUEUE_SELECT, queue);
        for field in (common::QUEUE_SIZE..common::QUEUE_DEVICE).step_by(2) {
            card.common.write(field, 1_u16);
        }
        for field in [common::QUEUE_SIZE, common::QUEUE_ENABLE] {
            match card.common.read::<u16>(field) {
                0 => {}
                other => return Err(format!("queue {queue} has {other:#x} at {field:#x}")),
            }
        }
        card.notify(queue.into());
    }
    Ok(())
}

/// Assigns vectors that do not exist: they must read back as none (virtio 1.2, 4.1.5.1.2.1).
fn vectors_beyond(card: PciCard) -> Result<(), Failure> {
    for vector in [card.msix.vectors, 0x7ff, 0x800, 0x8000, 0xfffe, NO_VECTOR] {
        for queue in [0_u16, 1] {
            card.common.write(common::QUEUE_SELECT, queue);
            for field in [common::CONFIG_VECTOR, common::QUEUE_VECTOR] {
                card.common.write(field, vector);
                let got: u16 = card.common.read(field);
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
fn move_to(rig: &mut Rig<'_>, card: PciCard, place: u32) -> Result<(), Failure> {
    let config = card.function.config;
    for _ in 0..5 {
        config.write(at::BAR_0, place);
        rig.arp();
        config.write(at::BAR_0 + 2, (place >> 16) as u16);
        config.write(at::BAR_0, place as u16);
        rig.arp();
        for byte in 0..4 {
            config.write(at::BAR_0 + byte, (place >> (8 * byte)) as u8);
        }
        // The one before it too, and those that the card does not have.
        config.write(at::BAR_0 - 4, u64::from(place) << 32);
        config.write(at::BAR_0 + 4, place);
        rig.arp();
        config.write(at::BAR_0, card.bar.base as u32);
    }
    match config.read::<u32>(at::BAR_0) {
        base if u64::from(base) == card.bar.base => Ok(()),
        other => Err(format!("BAR 0 cannot be brought back from {other:#x}")),
    }
}

/// Switches memory decoding and interrupt pins off and on while the card is used.
fn switch_off(rig: &mut Rig<'_>, card: PciCard) -> Result<(), Failure> {
    for command in [1_u16 << 2, 1 << 2 | 1 << 10, 0xfffd, 0xffff] {
        card.function.config.write(at::COMMAND, command);
        rig.arp();
        touch(card.common, common::QUEUE_DESC, 0);
        rig.settle();
        card.function.enable();
        rig.arp();
    }
    Ok(())
}

/// Takes bus mastering away: the card must leave memory alone from then on, until it has been reset.
fn take_mastering_away(rig: &mut Rig<'_>, card: PciCard) -> Result<(), Failure> {
    for command in [0_u16, 1 << 1, 0xfffb] {
        card.function.config.write(at::COMMAND, command);
        card.function.enable();
        if rig.arp() {
            return Err(format!("frames still flow after command {command:#x}"));
        }
    }
    Ok(())
}
