//! Queues of wrong sizes at wrong places (virtio 1.2, 4.2.3.2).

use alloc::format;
use alloc::vec::Vec;

use super::rig::{Bench, RING};
use super::{Failure, Runner, settle};
use crate::virtio::device::{VirtioDevice, go, negotiate};
use crate::virtio::net::{RX, TX, feature};
use crate::virtio::ring::{Ring, configure};

/// The size and the areas of a queue, to be spoilt.
type Setup = (u32, [u64; 3]);
/// Spoils it, given the first address after RAM and that of the device's registers.
pub type Spoil = fn(u64, u64, &mut Setup);

/// All of them, by name.
pub const SETUPS: &[(&str, Spoil)] = &[
    ("size-0", |_, _, (size, _)| *size = 0),
    ("size-3", |_, _, (size, _)| *size = 3),
    ("size-beyond-maximum", |_, _, (size, _)| *size = 32_768),
    ("size-65536", |_, _, (size, _)| *size = 65_536),
    ("size-largest", |_, _, (size, _)| *size = u32::MAX),
    ("nowhere", |_, _, (_, areas)| *areas = [0; 3]),
    ("table-outside", |end, _, (_, areas)| areas[0] = end),
    ("table-across-end", |end, _, (_, areas)| areas[0] = end - 16),
    ("available-outside", |end, _, (_, areas)| areas[1] = end),
    ("available-across-end", |end, _, (_, areas)| {
        areas[1] = end - 2
    }),
    ("used-outside", |end, _, (_, areas)| areas[2] = end),
    ("used-across-end", |end, _, (_, areas)| areas[2] = end - 4),
    ("all-at-top", |_, _, (_, areas)| *areas = [!15; 3]),
    ("all-in-own-registers", |_, registers, (_, areas)| {
        *areas = [registers; 3]
    }),
    ("table-misaligned", |_, _, (_, areas)| areas[0] += 1),
    ("available-misaligned", |_, _, (_, areas)| areas[1] += 1),
    ("used-misaligned", |_, _, (_, areas)| areas[2] += 2),
    ("areas-the-same", |_, _, (_, areas)| *areas = [areas[0]; 3]),
    ("used-on-table", |_, _, (_, areas)| areas[2] = areas[0]),
];

/// Runs each on either queue, with the other one in order.
pub fn run(runner: &mut Runner<'_>) {
    for (name, spoil) in SETUPS {
        for (variant, queue) in [("tx", TX), ("rx", RX)] {
            runner.attack(&format!("queue-{name}-{variant}"), |bench| {
                set_up(bench.nic, bench.ram_end, feature::PLAIN, 2, (queue, *spoil))
            });
        }
    }
    runner.attack("queue-ready-unconfigured", |bench| {
        negotiate(bench.nic, feature::PLAIN)?;
        (0..3).for_each(|queue| ready(bench, queue, 1));
        finish(bench.nic, 2)
    });
    runner.attack("queue-unknown", |bench| {
        negotiate(bench.nic, feature::PLAIN)?;
        for queue in [2, 77, 0xffff, u32::MAX] {
            ready(bench, queue, 1);
            bench.nic.set_queue_size(16);
            let _ = bench.nic.queue_size() + bench.nic.queue_ready();
        }
        finish(bench.nic, 2)
    });
    runner.attack("queue-changed-while-ready", |bench| {
        let rig = super::rig::Rig::start(bench, feature::PLAIN)?;
        for queue in [RX, TX] {
            configure(bench.nic, queue, 4, [bench.ram_end, 1, u64::MAX]);
            ready(bench, queue.into(), 1);
            ready(bench, queue.into(), u32::MAX);
        }
        settle();
        drop(rig);
        finish(bench.nic, 2)
    });
    runner.attack("queue-enabled-twice", |bench| {
        negotiate(bench.nic, feature::PLAIN)?;
        let rings = [Ring::new(RX, RING), Ring::new(TX, RING)];
        for ring in &rings {
            ring.enable(bench.nic);
            ring.enable(bench.nic);
            configure(bench.nic, ring.queue, 4, [bench.ram_end, 1, u64::MAX]);
            [1, 2, u32::MAX, 1]
                .into_iter()
                .for_each(|value| ready(bench, ring.queue.into(), value));
        }
        finish(bench.nic, 2)
    });
    runner.attack("queue-taken-away-while-running", |bench| {
        let mut rig = super::rig::Rig::start(bench, feature::PLAIN)?;
        rig.offer_buffers();
        rig.prompt();
        for _ in 0..20 {
            [RX, TX]
                .into_iter()
                .for_each(|queue| ready(bench, queue.into(), 0));
            rig.prompt();
            [RX, TX]
                .into_iter()
                .for_each(|queue| ready(bench, queue.into(), 1));
            rig.prompt();
        }
        settle();
        Ok(())
    });
}

/// Sets up the queues of a device, the one of number `bad` spoilt and the others in order, and has the device use
/// them.
pub fn set_up(
    device: VirtioDevice,
    ram_end: u64,
    features: u64,
    queues: u16,
    (bad, spoil): (u16, Spoil),
) -> Result<(), Failure> {
    negotiate(device, features)?;
    let rings = (0..queues).map(|queue| {
        let mut ring = Ring::new(queue, RING);
        let mut setup = (u32::from(RING), ring.areas());
        if queue == bad {
            spoil(ram_end, device.base(), &mut setup);
        }
        configure(device, queue, setup.0, setup.1);
        device.set_queue_ready(1);
        ring.offer(0);
        ring
    });
    // They outlive the reset.
    let rings: Vec<_> = rings.collect();
    finish(device, rings.len() as u16)
}

fn ready(bench: &Bench, queue: u32, value: u32) {
    bench.nic.select_queue(queue);
    bench.nic.set_queue_ready(value);
}

/// Starts a device with what it has been given, has it use its first queues, and resets it.
fn finish(device: VirtioDevice, queues: u16) -> Result<(), Failure> {
    go(device);
    (0..queues).for_each(|queue| device.notify(queue));
    settle();
    device.reset();
    Ok(())
}
