//! Everything that a driver must not do with the entropy device and the balloon (virtio 1.2, 5.4 and
//! 5.5). After each attack the device must do its work again after a reset.

use alloc::format;
use alloc::vec::Vec;

use smoltcp::time::Duration;

use super::chains::{Place, poisons};
use super::{Failure, Runner, Subject, settle};
use crate::boot::Boot;
use crate::cpu;
use crate::memory::{PAGE, Shared};
use crate::options::Options;
use crate::report;
use crate::serial::println;
use crate::virtio::Kind;
use crate::virtio::device::{VirtioDevice, go, negotiate, queue_size};
use crate::virtio::ring::{Descriptor, Ring, WRITE};

/// How many descriptors an attacked queue has.
const RING: u16 = 16;
const VERSION_1: u64 = 1 << 32;
const INDIRECT_DESC: u64 = 1 << 28;
/// The balloon's feature of free page reporting.
const REPORTING: u64 = 1 << 5;
/// The balloon's queues; the last one reports free pages.
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const REPORT: u16 = 4;
/// Bytes of scratch memory, which may all be given to the host.
const ROOM: usize = 1 << 20;
/// Within this time a good request ends: the entropy device answers so many a second, no more.
const PATIENCE: Duration = Duration::from_secs(20);
/// Attacks by which a balloon, rightly, takes memory from the guest that it runs in.
const SUICIDES: [&str; 3] = ["address-own-rings", "length-huge", "lengths-huge-together"];

/// The device under attack.
struct Bench {
    device: VirtioDevice,
    kind: Kind,
    ram_end: u64,
}

impl Subject for Bench {
    /// Has random numbers filled in, or a page taken.
    fn prove(&self) -> Result<(), Failure> {
        let mut rig = Rig::start(self)?;
        let page = Descriptor::new(rig.scratch.address(), 64, self.own(0));
        rig.offer(0, &[page]);
        let end = cpu::now() + PATIENCE;
        while cpu::now() < end {
            if let Some((_, len)) = rig.rings[0].take() {
                let mut found = [0; 64];
                rig.scratch.get(0, &mut found);
                let random = len == 64 && found != rig.filling;
                return match random || self.kind == Kind::Balloon {
                    true => Ok(()),
                    false => Err(format!("{len} bytes, which were there")),
                };
            }
        }
        Err("the device does not end a request".into())
    }
}

impl Bench {
    fn queues(&self) -> &'static [u16] {
        match self.kind {
            Kind::Balloon => &[INFLATE, DEFLATE, REPORT],
            _ => &[0],
        }
    }

    /// The flag that descriptors of a queue should have.
    fn own(&self, queue: u16) -> u16 {
        match (self.kind, queue) {
            (Kind::Balloon, INFLATE | DEFLATE) => 0,
            _ => WRITE,
        }
    }
}

/// Runs every attack whose name begins with `guest.only`, on both devices.
pub fn run(options: &Options, boot: &Boot) {
    println!("READY hostile-memory");
    let mut done = 0;
    for (name, kind) in [("rng", Kind::Entropy), ("balloon", Kind::Balloon)] {
        let bench = match VirtioDevice::find(kind, options.index) {
            Ok(device) => Bench {
                device,
                kind,
                ram_end: boot.ram.end,
            },
            Err(why) => return report::fail(name, why),
        };
        let mut runner = Runner::new(&bench, options);
        runner.attack(&format!("{name}-none"), |_| Ok(()));
        chains(&mut runner, name);
        match kind {
            Kind::Balloon => balloon(&mut runner),
            _ => entropy(&mut runner),
        }
        life(&mut runner, name);
        done += runner.done;
    }
    report::ok("hostile-memory", format_args!("attacks={done}"));
}

/// The device brought up. It is reset when dropped, before its memory is freed.
struct Rig<'a> {
    bench: &'a Bench,
    rings: Vec<Ring>,
    scratch: Shared,
    /// What the scratch memory begins with.
    filling: [u8; 64],
}

impl<'a> Rig<'a> {
    fn start(bench: &'a Bench) -> Result<Self, &'static str> {
        negotiate(bench.device, VERSION_1 | INDIRECT_DESC | REPORTING)?;
        let mut rings = Vec::new();
        for &queue in bench.queues() {
            let ring = Ring::new(queue, queue_size(bench.device, queue, RING)?);
            ring.enable(bench.device);
            rings.push(ring);
        }
        go(bench.device);
        let mut scratch = Shared::new(ROOM);
        // As numbers of pages: of this memory itself, so that a balloon takes nothing else.
        let first = (scratch.address() / PAGE as u64) as u32;
        for n in 0..ROOM / 4 {
            scratch.write(4 * n, first + (n * 4 / PAGE) as u32);
        }
        let mut filling = [0; 64];
        scratch.get(0, &mut filling);
        Ok(Self {
            bench,
            rings,
            scratch,
            filling,
        })
    }

    /// Makes a chain of these descriptors available on the n-th queue, and notifies.
    fn offer(&mut self, n: usize, chain: &[Descriptor]) {
        self.rings[n].offer_chain(chain);
        self.bench.device.notify(self.rings[n].queue);
    }
}

impl Drop for Rig<'_> {
    fn drop(&mut self) {
        self.bench.device.reset();
    }
}

fn chains(runner: &mut Runner<'_, Bench>, device: &str) {
    let takes_memory = runner.bench.kind == Kind::Balloon;
    for (name, poison) in poisons().filter(|(name, _)| !takes_memory || !SUICIDES.contains(name)) {
        for (n, &queue) in runner.bench.queues().iter().enumerate() {
            runner.attack(&format!("{device}-chain-{name}-{queue}"), |bench| {
                let mut rig = Rig::start(bench)?;
                let mut place = Place::new(
                    bench.device,
                    bench.ram_end,
                    rig.scratch.address(),
                    bench.own(queue),
                );
                place.spoil(&mut rig.rings[n], *poison);
                // Explicitly before the table is freed.
                drop(rig);
                Ok(())
            });
        }
    }
}

/// Asks for more than there is in a second, again and again.
fn entropy(runner: &mut Runner<'_, Bench>) {
    let rounds = runner.rounds;
    runner.attack("rng-greedy", |bench| {
        for _ in 0..rounds.min(20) {
            let mut rig = Rig::start(bench)?;
            let all = Descriptor::new(rig.scratch.address(), ROOM as u32, WRITE);
            rig.offer(0, &[all; 8]);
            (0..RING).for_each(|_| rig.rings[0].offer(0));
            bench.device.notify(0);
            settle();
        }
        Ok(())
    });
}

/// Pages that are not there, too many of them, and what the balloon itself works with.
fn balloon(runner: &mut Runner<'_, Bench>) {
    let end = (runner.bench.ram_end / PAGE as u64) as u32;
    for (name, number) in [
        ("first-outside", end),
        ("hole", 0xe_0000),
        (
            "registers",
            (runner.bench.device.base() / PAGE as u64) as u32,
        ),
        ("last", u32::MAX),
        ("sign", 1 << 31),
    ] {
        for (n, queue) in [INFLATE, DEFLATE].into_iter().enumerate() {
            runner.attack(&format!("balloon-page-{name}-{queue}"), |bench| {
                let mut rig = Rig::start(bench)?;
                (0..ROOM / 4).for_each(|at| rig.scratch.write(4 * at, number));
                let list = Descriptor::new(rig.scratch.address(), ROOM as u32, 0);
                rig.offer(n, &[list]);
                settle();
                Ok(())
            });
        }
    }
    runner.attack("balloon-pages-again", |bench| {
        let mut rig = Rig::start(bench)?;
        let list = Descriptor::new(rig.scratch.address(), ROOM as u32, 0);
        rig.offer(0, &[list; 8]);
        settle();
        Ok(())
    });
    runner.attack("balloon-own-rings", |bench| {
        let mut rig = Rig::start(bench)?;
        let areas: Vec<u64> = rig.rings.iter().flat_map(Ring::areas).collect();
        for (n, area) in areas.iter().enumerate() {
            rig.scratch.write(4 * n, (area / PAGE as u64) as u32);
        }
        let list = Descriptor::new(rig.scratch.address(), 4 * areas.len() as u32, 0);
        rig.offer(0, &[list]);
        settle();
        Ok(())
    });
    runner.attack("balloon-reports-own-rings", |bench| {
        let mut rig = Rig::start(bench)?;
        let areas = rig.rings.iter().flat_map(Ring::areas);
        let pages = areas.map(|area| Descriptor::new(area, PAGE as u32, WRITE));
        let pages: Vec<Descriptor> = pages.collect();
        rig.offer(2, &pages);
        settle();
        Ok(())
    });
    runner.attack("balloon-reports-parts-of-pages", |bench| {
        let mut rig = Rig::start(bench)?;
        let odd = |n: u64| Descriptor::new(rig.scratch.address() + 100 * n + 1, 9000, WRITE);
        let parts: Vec<Descriptor> = (0..8).map(odd).collect();
        rig.offer(2, &parts);
        settle();
        Ok(())
    });
}

/// Starts and resets it while it works.
fn life(runner: &mut Runner<'_, Bench>, device: &str) {
    let rounds = runner.rounds;
    runner.attack(&format!("{device}-life-reset-at-work"), |bench| {
        for _ in 0..rounds {
            let mut rig = Rig::start(bench)?;
            let all = Descriptor::new(rig.scratch.address(), ROOM as u32, bench.own(0));
            rig.offer(0, &[all; 4]);
        }
        Ok(())
    });
    runner.attack(&format!("{device}-life-configuration"), |bench| {
        let _rig = Rig::start(bench)?;
        for at in 0..64 {
            bench.device.set_config(at, 0xff_u8);
        }
        settle();
        Ok(())
    });
}
