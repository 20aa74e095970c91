//! MSI-X: messages without a receiver, masks that flap, and pending bits (PCI Local Bus
//! Specification 3.0, 6.8.2).

use alloc::format;

use super::super::registers::{VALUES, touch};
use super::super::rig::{Bench, Rig};
use super::bar::in_traffic;
use super::{Failure, Runner, settle};
use crate::cpu;
use crate::virtio::net::{TX, feature};
use crate::virtio::pci::{Msix, PciDevice, common};
use smoltcp::time::Duration;

/// Messages that reach no processor, or none that takes them: an APIC that does not exist, with
/// different data; an address above 4 GiB, and everything set (which is the delivery mode of an old
/// interrupt controller).
const GARBAGE: [(u64, u32); 6] = [
    (0xfee7_f000, 0x41),
    (0xfee7_f000, 0xffff_c0ff),
    (0xfee7_f00c, 0x8041),
    (0xdead_0000_fee7_f000, 0x42),
    (0, 0x0700),
    (u64::MAX, u32::MAX),
];

/// The vector of received frames.
const RX_VECTOR: u64 = 1;
/// How long an interrupt may take.
const PATIENCE: Duration = Duration::from_millis(200);

/// Runs them; the repeated ones `rounds` times at most.
pub fn run(runner: &mut Runner<'_>, nic: PciDevice) {
    let rounds = runner.rounds.min(30);
    runner.attack("msix-garbage", |bench| {
        in_messages(bench, nic, |rig| {
            // Sent frames interrupt too.
            nic.common.write(common::QUEUE_SELECT, TX);
            nic.common.write(common::QUEUE_VECTOR, 2_u16);
            for round in 0..rounds {
                for vector in 0..nic.msix.vectors.into() {
                    nic.msix.mask(vector, false);
                    let garbage = GARBAGE[(round as usize + vector as usize) % GARBAGE.len()];
                    nic.msix.set(vector, garbage.0, garbage.1);
                }
                rig.arp();
            }
            Ok(())
        })
    });
    runner.attack("msix-masks-flap", |bench| {
        in_messages(bench, nic, |rig| {
            for round in 0..rounds {
                for vector in 0..nic.msix.vectors.into() {
                    nic.msix.mask(vector, round % 2 == 0);
                }
                rig.arp();
            }
            Ok(())
        })
    });
    runner.attack("msix-control-flaps", |bench| {
        in_messages(bench, nic, |rig| {
            let (on, masked) = (Msix::ENABLE, Msix::MASK_ALL);
            for control in [0, on, masked, on | masked, on, 0x07ff, 0xffff].repeat(4) {
                nic.msix.control(control);
                rig.arp();
            }
            Ok(())
        })
    });
    for value in VALUES {
        runner.attack(&format!("msix-table-{value:#x}"), |bench| {
            in_messages(bench, nic, |rig| {
                rig.arp();
                for offset in 0..nic.msix.table.size - 8 {
                    touch(nic.msix.table, offset, value);
                }
                Ok(())
            })
        });
    }
    runner.attack("msix-pending-written", |bench| {
        in_messages(bench, nic, |rig| {
            for value in VALUES {
                rig.arp();
                (0..=nic.msix.pending.size - 8)
                    .for_each(|offset| touch(nic.msix.pending, offset, value));
            }
            Ok(())
        })
    });
    runner.attack("msix-masked-is-pending", |bench| {
        in_messages(bench, nic, |rig| masked_is_pending(rig, nic))
    });
    runner.attack("msix-pending-ends-at-reset", |bench| {
        let result = pending_ends_at_reset(bench, nic);
        nic.msix.control(0);
        result
    });
}

/// Runs an attack on a NIC whose frames interrupt, which they must do after it without a reset.
fn in_messages(
    bench: &Bench,
    nic: PciDevice,
    attack: impl FnOnce(&mut Rig<'_>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    in_traffic(bench, |rig| {
        bench.nic.enable_interrupts();
        let result = attack(rig);
        bench.nic.enable_interrupts();
        let result = result.and_then(|()| interrupts_again(rig, nic));
        nic.msix.control(0);
        result
    })
}

/// Whether a received frame interrupts.
fn interrupts_again(rig: &mut Rig<'_>, nic: PciDevice) -> Result<(), Failure> {
    // What was pending may come now.
    settle();
    let before = count(nic);
    if !rig.arp() {
        return Err("no answer to ARP".into());
    }
    if comes(nic, before) {
        Ok(())
    } else {
        Err("no interrupt".into())
    }
}

/// A frame that comes in while its vector is masked must show in the pending bits, and interrupt
/// afterwards.
fn masked_is_pending(rig: &mut Rig<'_>, nic: PciDevice) -> Result<(), Failure> {
    settle();
    nic.msix.mask(RX_VECTOR, true);
    let before = count(nic);
    if nic.msix.is_pending(RX_VECTOR) {
        return Err("it is pending before a frame came".into());
    }
    if !rig.arp() {
        return Err("no answer to ARP".into());
    }
    if !in_time(|| nic.msix.is_pending(RX_VECTOR)) {
        return Err("it is not pending".into());
    }
    if count(nic) != before {
        return Err("it interrupts although it is masked".into());
    }
    nic.msix.mask(RX_VECTOR, false);
    if !comes(nic, before) {
        return Err("it does not interrupt when it is unmasked".into());
    }
    if nic.msix.is_pending(RX_VECTOR) {
        return Err("it is still pending".into());
    }
    Ok(())
}

/// What is pending when the device is reset must neither stay so nor interrupt later.
fn pending_ends_at_reset(bench: &Bench, nic: PciDevice) -> Result<(), Failure> {
    let mut rig = Rig::start(bench, feature::PLAIN)?;
    rig.offer_buffers();
    bench.nic.enable_interrupts();
    nic.msix.mask(RX_VECTOR, true);
    if !rig.arp() || !in_time(|| nic.msix.is_pending(RX_VECTOR)) {
        return Err("it is not pending".into());
    }
    bench.nic.reset();
    if nic.msix.is_pending(RX_VECTOR) {
        return Err("it is still pending after a reset".into());
    }
    let before = count(nic);
    nic.msix.mask(RX_VECTOR, false);
    if comes(nic, before) {
        return Err("it interrupts after a reset".into());
    }
    Ok(())
}

fn count(nic: PciDevice) -> u64 {
    cpu::interrupts(nic.function.slot.into())
}

fn comes(nic: PciDevice, before: u64) -> bool {
    in_time(|| count(nic) > before)
}

fn in_time(is_true: impl Fn() -> bool) -> bool {
    let end = cpu::now() + PATIENCE;
    while cpu::now() < end {
        if is_true() {
            return true;
        }
    }
    false
}
