//! Descriptor chains and available rings that lie (virtio 1.2, 2.7).

use alloc::format;

use smoltcp::time::Duration;

use super::rig::{RING, Rig};
use super::{Failure, Runner, settle};
use crate::cpu;
use crate::memory::{PAGE, Shared};
use crate::virtio::device::{VirtioDevice, status};
use crate::virtio::net::{RX, TX, feature};
use crate::virtio::ring::{Descriptor, INDIRECT, NEXT, Ring, WRITE};

/// A whole number of descriptors for an indirect table.
const TABLE: u32 = 64;

/// What an attack may use.
pub struct Place {
    /// The device under attack.
    device: VirtioDevice,
    /// The first address after RAM.
    ram_end: u64,
    /// Memory that may be read and written.
    good: u64,
    /// The flag that descriptors of this queue should have.
    own: u16,
    /// Room for an indirect table.
    table: Shared,
}

impl Place {
    /// What is used to attack a queue of this device whose descriptors should have the flag `own`. It has to
    /// outlive the reset of the device.
    pub fn new(device: VirtioDevice, ram_end: u64, good: u64, own: u16) -> Self {
        Self {
            device,
            ram_end,
            good,
            own,
            table: Shared::new(PAGE),
        }
    }

    /// Spoils a ring, and has the device use it.
    pub fn spoil(&mut self, ring: &mut Ring, poison: Poison) {
        poison(ring, self);
        self.device.notify(ring.queue);
        settle();
    }

    fn buffer(&self, address: u64, length: u32) -> Descriptor {
        Descriptor::new(address, length, self.own)
    }

    fn good(&self) -> Descriptor {
        self.buffer(self.good, 2048)
    }

    fn indirect(&self, length: u32) -> Descriptor {
        Descriptor::new(self.table.address(), length, INDIRECT)
    }
}

/// Puts something into a ring of [`RING`] descriptors.
pub type Poison = fn(&mut Ring, &mut Place);

/// Offers one chain that is a single descriptor.
fn single(ring: &mut Ring, descriptor: Descriptor) {
    ring.describe(0, descriptor);
    ring.offer(0);
}

/// Offers one indirect table with a first entry of its own, and `length` as its claimed size.
fn through_table(ring: &mut Ring, place: &mut Place, entry: Descriptor, length: u32) {
    entry.put(&mut place.table, 0);
    single(ring, place.indirect(length));
}

const LOOPS: &[(&str, Poison)] = &[
    ("loop-self", |ring, place| {
        single(ring, place.good().then(0))
    }),
    ("loop-two", |ring, place| {
        ring.describe(1, place.good().then(0));
        single(ring, place.good().then(1));
    }),
    ("loop-all", |ring, place| {
        (0..RING).for_each(|n| ring.describe(n, place.good().then((n + 1) % RING)));
        ring.offer(0);
    }),
    ("next-outside", |ring, place| {
        single(ring, place.good().then(RING))
    }),
    ("next-far-outside", |ring, place| {
        single(ring, place.good().then(u16::MAX))
    }),
    ("head-outside", |ring, _| ring.offer(RING)),
    ("head-far-outside", |ring, _| ring.offer(u16::MAX)),
    ("same-head-often", |ring, place| {
        ring.describe(0, place.good());
        (0..RING).for_each(|_| ring.offer(0));
    }),
    ("available-jump-one-too-many", |ring, _| {
        ring.set_available(RING + 1)
    }),
    ("available-jump-half", |ring, _| ring.set_available(0x8000)),
    ("available-jump-back", |ring, _| {
        ring.set_available(u16::MAX)
    }),
];

const BUFFERS: &[(&str, Poison)] = &[
    ("address-in-hole", |ring, place| {
        single(ring, place.buffer(0xe000_0000, 2048))
    }),
    ("address-across-end", |ring, place| {
        single(ring, place.buffer(place.ram_end - 8, 2048))
    }),
    ("address-at-end", |ring, place| {
        single(ring, place.buffer(place.ram_end, 2048))
    }),
    ("address-above-4g", |ring, place| {
        single(ring, place.buffer(1 << 45, 2048))
    }),
    ("address-top", |ring, place| {
        single(ring, place.buffer(u64::MAX, 2048))
    }),
    ("address-overflow", |ring, place| {
        single(ring, place.buffer(u64::MAX - 100, 4096))
    }),
    ("address-own-registers", |ring, place| {
        single(ring, place.buffer(place.device.base(), 512))
    }),
    ("address-own-rings", |ring, place| {
        let areas = ring.areas();
        for (n, area) in (0..).zip(areas) {
            ring.describe(n, place.buffer(area, 2048));
            ring.offer(n);
        }
    }),
    ("second-in-hole", |ring, place| {
        ring.describe(1, place.buffer(0xe000_0000, 2048));
        single(ring, place.good().then(1));
    }),
    ("length-zero", |ring, place| {
        single(ring, place.buffer(place.good, 0))
    }),
    ("length-zero-chain", |ring, place| {
        (0..RING - 1).for_each(|n| ring.describe(n, place.buffer(place.good, 0).then(n + 1)));
        ring.describe(RING - 1, place.buffer(place.good, 0));
        ring.offer(0);
    }),
    ("length-one", |ring, place| {
        single(ring, place.buffer(place.good, 1))
    }),
    ("length-below-header", |ring, place| {
        single(ring, place.buffer(place.good, 11))
    }),
    ("length-header", |ring, place| {
        single(ring, place.buffer(place.good, 12))
    }),
    ("length-huge", |ring, place| {
        single(ring, place.buffer(place.good, u32::MAX))
    }),
    ("lengths-huge-together", |ring, place| {
        let size = (place.ram_end - place.good) as u32;
        (0..RING - 1).for_each(|n| ring.describe(n, place.buffer(place.good, size).then(n + 1)));
        ring.describe(RING - 1, place.buffer(place.good, size));
        ring.offer(0);
    }),
    ("bytes-one-by-one", |ring, place| {
        let byte = |n: u16| place.buffer(place.good + u64::from(n), 1);
        (0..RING - 1).for_each(|n| ring.describe(n, byte(n).then(n + 1)));
        ring.describe(RING - 1, byte(RING - 1));
        ring.offer(0);
    }),
    ("direction-wrong", |ring, place| {
        single(
            ring,
            Descriptor {
                flags: place.own ^ WRITE,
                ..place.good()
            },
        )
    }),
    ("direction-mixed", |ring, place| {
        let wrong = Descriptor {
            flags: place.own ^ WRITE,
            ..place.good()
        };
        ring.describe(2, wrong);
        ring.describe(1, place.good().then(2));
        single(ring, wrong.then(1));
    }),
    ("flags-all", |ring, place| {
        single(
            ring,
            Descriptor {
                flags: u16::MAX,
                ..place.good()
            },
        )
    }),
];

const INDIRECTS: &[(&str, Poison)] = &[
    ("indirect-empty", |ring, place| {
        single(ring, place.indirect(0))
    }),
    ("indirect-odd-length", |ring, place| {
        through_table(ring, place, place.good(), 17)
    }),
    ("indirect-short", |ring, place| {
        through_table(ring, place, place.good(), 15)
    }),
    ("indirect-huge", |ring, place| {
        through_table(ring, place, place.good(), u32::MAX - 15)
    }),
    ("indirect-65537-entries", |ring, place| {
        through_table(ring, place, place.good(), 65_537 * 16)
    }),
    ("indirect-outside", |ring, place| {
        single(ring, Descriptor::new(place.ram_end, TABLE, INDIRECT))
    }),
    ("indirect-across-end", |ring, place| {
        single(ring, Descriptor::new(place.ram_end - 16, TABLE, INDIRECT))
    }),
    ("indirect-misaligned", |ring, place| {
        single(
            ring,
            Descriptor::new(place.table.address() + 1, TABLE, INDIRECT),
        )
    }),
    ("indirect-write-flag", |ring, place| {
        place.good().put(&mut place.table, 0);
        single(
            ring,
            Descriptor {
                flags: INDIRECT | WRITE,
                ..place.indirect(16)
            },
        );
    }),
    ("indirect-and-next", |ring, place| {
        place.good().put(&mut place.table, 0);
        ring.describe(1, place.good());
        single(
            ring,
            Descriptor {
                flags: INDIRECT | NEXT,
                next: 1,
                ..place.indirect(16)
            },
        );
    }),
    ("indirect-nested", |ring, place| {
        let inner = place.indirect(TABLE);
        through_table(ring, place, inner, TABLE);
    }),
    ("indirect-loop", |ring, place| {
        through_table(ring, place, place.good().then(0), TABLE)
    }),
    ("indirect-next-outside", |ring, place| {
        through_table(ring, place, place.good().then(4), TABLE)
    }),
    ("indirect-next-far-outside", |ring, place| {
        through_table(ring, place, place.good().then(u16::MAX), TABLE)
    }),
];

/// All of them, by name.
pub fn poisons() -> impl Iterator<Item = &'static (&'static str, Poison)> {
    LOOPS.iter().chain(BUFFERS).chain(INDIRECTS)
}

/// Runs each on the transmit queue, on the receive queue, and there with merged buffers too.
pub fn run(runner: &mut Runner<'_>) {
    let plain = feature::PLAIN | feature::INDIRECT_DESC;
    let all = feature::OFFLOADS | feature::INDIRECT_DESC | feature::EVENT_IDX;
    for (name, poison) in poisons() {
        for (variant, queue, features) in
            [("tx", TX, plain), ("rx", RX, plain), ("rx-merged", RX, all)]
        {
            runner.attack(&format!("chain-{name}-{variant}"), |bench| {
                let rig = Rig::start(bench, features)?;
                spoil(rig, queue, *poison)
            });
        }
    }
    for (name, poison) in INDIRECTS {
        runner.attack(&format!("chain-{name}-not-negotiated"), |bench| {
            let rig = Rig::start(bench, feature::PLAIN)?;
            spoil(rig, TX, *poison)
        });
    }
    for (variant, queue) in [("tx", TX), ("rx", RX)] {
        runner.attack(&format!("chain-nonsense-is-reported-{variant}"), |bench| {
            bad_chain_is_reported(Rig::start(bench, feature::PLAIN)?, queue)
        });
    }
}

/// Offers more than a ring can hold, which the device must say that it cannot go on with (virtio
/// 1.2, 2.1.2).
fn bad_chain_is_reported(mut rig: Rig<'_>, queue: u16) -> Result<(), Failure> {
    let nic = rig.bench.nic;
    if queue == RX {
        rig.rx.set_available(0x8000);
        rig.prompt();
    } else {
        rig.tx.set_available(0x8000);
    }
    nic.notify(queue);
    let end = cpu::now() + Duration::from_millis(500);
    while cpu::now() < end {
        if nic.status() & status::NEEDS_RESET != 0 {
            return Ok(());
        }
    }
    Err("the device does not ask for a reset".into())
}

/// Spoils one queue and makes the device use it.
fn spoil(mut rig: Rig<'_>, queue: u16, poison: Poison) -> Result<(), Failure> {
    let (nic, good) = (rig.bench.nic, rig.scratch());
    let (ring, own) = match queue {
        RX => (&mut rig.rx, WRITE),
        _ => (&mut rig.tx, 0),
    };
    let mut place = Place::new(nic, rig.bench.ram_end, good, own);
    place.spoil(ring, poison);
    if queue == RX {
        // Two frames: one for the bad chain, and one that finds out what it left.
        for _ in 0..2 {
            rig.prompt();
            settle();
        }
    }
    // Explicitly before the tables, which the device may still read, are freed.
    drop(rig);
    Ok(())
}
