//! Everything that a driver must not do with a disk (virtio 1.2, 5.2). After each attack the disk must
//! work again after a reset, which a sector that is written and read back proves.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use smoltcp::time::Duration;

use super::chains::{Place, poisons};
use super::queues::{SETUPS, set_up};
use super::registers::{VALUES, touch};
use super::{Failure, Runner, Subject, run_on, settle};
use crate::boot::Boot;
use crate::cpu;
use crate::memory::{PAGE, Shared};
use crate::options::Options;
use crate::region::Region;
use crate::virtio::Kind;
use crate::virtio::blk::{HEADER, SECTOR, capacity, feature, header, outcome, range, request};
use crate::virtio::device::{VirtioDevice, go, negotiate, queue_size};
use crate::virtio::mmio::at;
use crate::virtio::ring::{Descriptor, INDIRECT, Ring, WRITE, configure};

/// How many descriptors an attacked queue has, and the most that it can have.
const RING: u16 = 16;
const LARGE_RING: u16 = 256;
/// The scratch memory: header, status, data.
const STATUS: usize = 512;
const DATA: usize = PAGE;
const ROOM: usize = 1 << 20;
/// As much of the configuration as is tried: more than there is.
const CONFIG_SIZE: u64 = 0x80;
/// Within this time a good request ends.
const PATIENCE: Duration = Duration::from_secs(20);
const FEATURES: u64 = feature::ALL & !feature::EVENT_IDX | 1 << 28;

/// The disk under attack.
pub struct DiskBench {
    disk: VirtioDevice,
    ram_end: u64,
}

impl Subject for DiskBench {
    /// Brings the disk up, writes a sector and reads it back.
    fn prove(&self) -> Result<(), Failure> {
        let mut rig = Rig::start(self, RING)?;
        let bytes = super::super::disk::pattern(7, 1);
        rig.scratch.put(DATA, &bytes);
        for (kind, flags) in [(request::OUT, 0), (request::IN, WRITE)] {
            let data = Descriptor::new(rig.data(), SECTOR as u32, flags);
            rig.request(kind, 1, &[data]);
            match rig.wait()? {
                outcome::OK => {}
                status => return Err(format!("request {kind} ends with {status}")),
            }
            if kind == request::OUT {
                rig.scratch.put(DATA, &[0; SECTOR]);
            }
        }
        let mut found = [0; SECTOR];
        rig.scratch.get(DATA, &mut found);
        match found == bytes {
            true => Ok(()),
            false => Err("it reads other data than was written".into()),
        }
    }
}

/// Runs every attack whose name begins with `guest.only`.
pub fn run(options: &Options, boot: &Boot) {
    let bench = VirtioDevice::find(Kind::Block, options.index).map(|disk| DiskBench {
        disk,
        ram_end: boot.ram.end,
    });
    let attacks = [chains, requests, queues, configuration, life];
    run_on("hostile-disk", options, bench, &attacks);
}

/// The disk brought up with one queue. It is reset when dropped, before its memory is freed.
struct Rig<'a> {
    bench: &'a DiskBench,
    ring: Ring,
    scratch: Shared,
}

impl<'a> Rig<'a> {
    fn start(bench: &'a DiskBench, size: u16) -> Result<Self, &'static str> {
        Self::with_room(bench, size, ROOM)
    }

    fn with_room(bench: &'a DiskBench, size: u16, room: usize) -> Result<Self, &'static str> {
        negotiate(bench.disk, FEATURES)?;
        let ring = Ring::new(0, queue_size(bench.disk, 0, size)?);
        ring.enable(bench.disk);
        go(bench.disk);
        Ok(Self {
            bench,
            ring,
            scratch: Shared::new(DATA + room),
        })
    }

    fn address(&self, offset: usize) -> u64 {
        self.scratch.address() + offset as u64
    }

    /// The address of the data, [`ROOM`] bytes at least.
    fn data(&self) -> u64 {
        self.address(DATA)
    }

    /// A good header, and a good place for a status.
    fn ends(&self) -> [Descriptor; 2] {
        [
            Descriptor::new(self.address(0), HEADER as u32, 0),
            Descriptor::new(self.address(STATUS), 1, WRITE),
        ]
    }

    /// Makes a chain of these descriptors available, and notifies.
    fn offer(&mut self, chain: &[Descriptor]) {
        self.ring.offer_chain(chain);
        self.bench.disk.notify(0);
    }

    /// Makes a request with this data.
    fn request(&mut self, kind: u32, sector: u64, data: &[Descriptor]) {
        self.scratch.put(0, &header(kind, sector));
        let [head, status] = self.ends();
        let mut chain = alloc::vec![head];
        chain.extend(data);
        chain.push(status);
        self.offer(&chain);
    }

    /// Waits for the end of a request; returns its status.
    fn wait(&mut self) -> Result<u8, Failure> {
        let end = cpu::now() + PATIENCE;
        while cpu::now() < end {
            if self.ring.take().is_some() {
                return Ok(self.scratch.read(STATUS));
            }
        }
        Err("the disk does not end a request".into())
    }
}

impl Drop for Rig<'_> {
    fn drop(&mut self) {
        self.bench.disk.reset();
    }
}

/// The chains that are wrong for every device, of descriptors for reading and for writing.
fn chains(runner: &mut Runner<'_, DiskBench>) {
    for (name, poison) in poisons() {
        for (variant, own) in [("read", 0), ("write", WRITE)] {
            runner.attack(&format!("disk-chain-{name}-{variant}"), |bench| {
                let mut rig = Rig::start(bench, RING)?;
                let mut place = Place::new(bench.disk, bench.ram_end, rig.data(), own);
                place.spoil(&mut rig.ring, *poison);
                // Explicitly before the table is freed.
                drop(rig);
                Ok(())
            });
        }
    }
}

type Attack = fn(&mut Rig<'_>);

/// Chains that are no requests.
const SHAPES: &[(&str, Attack)] = &[
    ("header-only", |rig| {
        let [header, _] = rig.ends();
        rig.offer(&[header]);
    }),
    ("status-only", |rig| {
        let [_, status] = rig.ends();
        rig.offer(&[status]);
    }),
    ("header-short", |rig| {
        let [mut header, status] = rig.ends();
        header.length = 15;
        rig.offer(&[header, status]);
    }),
    ("header-writable", |rig| {
        let [mut header, status] = rig.ends();
        header.flags = WRITE;
        rig.offer(&[header, status]);
    }),
    ("status-readable", |rig| {
        let [header, mut status] = rig.ends();
        status.flags = 0;
        rig.offer(&[header, status]);
    }),
    ("status-empty", |rig| {
        let [header, mut status] = rig.ends();
        status.length = 0;
        rig.offer(&[header, status]);
    }),
    ("ends-swapped", |rig| {
        let [header, status] = rig.ends();
        rig.offer(&[status, header]);
    }),
    ("read-of-readable", |rig| {
        let data = Descriptor::new(rig.data(), 4096, 0);
        rig.request(request::IN, 0, &[data]);
    }),
    ("write-of-writable", |rig| {
        let data = Descriptor::new(rig.data(), 4096, WRITE);
        rig.request(request::OUT, 0, &[data]);
    }),
    ("over-header", |rig| {
        let data = Descriptor::new(rig.address(0), 4096, WRITE);
        rig.request(request::IN, 0, &[data]);
    }),
    ("over-status", |rig| {
        let data = Descriptor::new(rig.address(STATUS), 512, WRITE);
        rig.request(request::IN, 0, &[data, data, data]);
    }),
    ("over-itself", |rig| {
        let data = Descriptor::new(rig.data(), 65_536, WRITE);
        let shifted = Descriptor::new(rig.data() + 1, 65_536, WRITE);
        rig.request(request::IN, 0, &[data, shifted, data, shifted]);
    }),
    ("over-rings", |rig| {
        let areas = rig.ring.areas();
        let data = areas.map(|area| Descriptor::new(area, 512, WRITE));
        rig.request(request::IN, 0, &data);
    }),
    ("from-rings", |rig| {
        let areas = rig.ring.areas();
        let data = areas.map(|area| Descriptor::new(area, 512, 0));
        rig.request(request::OUT, 8, &data);
    }),
    ("whole-memory", |rig| {
        let length = (rig.bench.ram_end - rig.data()) as u32 & !511;
        let data = Descriptor::new(rig.data(), length, 0);
        rig.request(request::OUT, 0, &[data, data, data]);
    }),
    ("largest", |rig| {
        let data = Descriptor::new(rig.data(), ROOM as u32, WRITE);
        rig.request(request::IN, 0, &[data]);
    }),
];

/// A request with data of this kind, length and sector, and what has to come of it, if one is right.
type Case = (u32, u64, u32, Option<u8>);

/// No disk is so large.
const FAR: [u64; 5] = [u64::MAX, u64::MAX - 1, 1 << 55, 1 << 54, (1 << 63) / 512];

fn requests(runner: &mut Runner<'_, DiskBench>) {
    for (name, attack) in SHAPES {
        runner.attack(&format!("disk-shape-{name}"), |bench| {
            let mut rig = Rig::start(bench, RING)?;
            attack(&mut rig);
            settle();
            Ok(())
        });
    }
    let end = capacity(runner.bench.disk);
    let mut cases: Vec<Case> = Vec::new();
    for kind in [request::IN, request::OUT] {
        for sector in FAR.into_iter().chain([end]) {
            cases.push((kind, sector, 512, Some(outcome::IOERR)));
        }
        cases.push((kind, end - 1, 1024, Some(outcome::IOERR)));
        for length in [1, 511, 513, 4095] {
            cases.push((kind, 0, length, Some(outcome::IOERR)));
        }
        cases.push((kind, 0, 0, None));
    }
    for length in [0, 1, 19, 21, 4096] {
        cases.push((request::GET_ID, 0, length, None));
        cases.push((request::FLUSH, u64::MAX, length, None));
        for kind in [request::DISCARD, request::WRITE_ZEROES] {
            cases.push((kind, 0, length, None));
        }
    }
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 17, 0x8000_0000, u32::MAX] {
        cases.push((kind, 0, 512, Some(outcome::UNSUPP)));
    }
    for (kind, sector, length, expected) in cases {
        let name = format!("disk-request-{kind}-{sector:x}-{length}");
        runner.attack(&name, |bench| {
            let mut rig = Rig::start(bench, RING)?;
            let flags = match kind {
                request::IN | request::GET_ID => WRITE,
                _ => 0,
            };
            let data = Descriptor::new(rig.data(), length, flags);
            let data = [data];
            rig.request(kind, sector, &data[..usize::from(length > 0)]);
            let status = rig.wait()?;
            match expected.is_none_or(|expected| status == expected) {
                true => Ok(()),
                false => Err(format!("it ends with {status}")),
            }
        });
    }
    ranges(runner, end);
    runner.attack("disk-pieces-many", |bench| {
        let mut rig = Rig::start(bench, LARGE_RING)?;
        let pieces = usize::from(rig.ring.size) - 2;
        let data = Descriptor::new(rig.data(), SECTOR as u32, WRITE);
        rig.request(request::IN, 0, &alloc::vec![data; pieces]);
        rig.wait().map(drop)
    });
    for entries in [300, 1026, 4096, 65_535] {
        runner.attack(&format!("disk-pieces-indirect-{entries}"), |bench| {
            indirect(bench, entries)
        });
    }
    runner.attack("disk-header-changes", header_changes);
}

/// Ranges to discard or zero that are too many, too long or nowhere.
fn ranges(runner: &mut Runner<'_, DiskBench>, end: u64) {
    const WHOLE: u32 = u32::MAX;
    let wrong = [
        (0, WHOLE, 0),
        (end, 1, 0),
        (end - 1, 2, 0),
        (u64::MAX, 1, 0),
        (u64::MAX, WHOLE, 0),
        (1 << 55, 8, 0),
        (0, 8, u32::MAX),
        (0, 0, 0),
    ];
    for kind in [request::DISCARD, request::WRITE_ZEROES] {
        for (number, wrong) in wrong.into_iter().enumerate() {
            for count in [1, 2, 256, 65_536] {
                let name = format!("disk-range-{kind}-{number}-{count}");
                runner.attack(&name, |bench| {
                    match request_ranges(bench, kind, wrong, count)? {
                        outcome::OK if wrong.1 > 0 => Err("it ends well".into()),
                        _ => Ok(()),
                    }
                });
            }
        }
        // Each is right.
        runner.attack(&format!("disk-range-{kind}-millions"), |bench| {
            request_ranges(bench, kind, (0, 8, 0), 2 << 20).map(drop)
        });
    }
}

/// Makes a request about the same range many times; returns its status.
fn request_ranges(
    bench: &DiskBench,
    kind: u32,
    (sector, sectors, flags): (u64, u32, u32),
    count: usize,
) -> Result<u8, Failure> {
    let bytes = range(sector, sectors, flags);
    let length = count * bytes.len();
    let mut rig = Rig::with_room(bench, RING, length)?;
    (0..count).for_each(|n| rig.scratch.put(DATA + n * bytes.len(), &bytes));
    let data = Descriptor::new(rig.data(), length as u32, 0);
    rig.request(kind, 0, &[data]);
    rig.wait()
}

/// A read in an indirect table with so many pieces of data.
fn indirect(bench: &DiskBench, entries: u32) -> Result<(), Failure> {
    let mut rig = Rig::start(bench, RING)?;
    let mut table = Shared::new(entries as usize * 16);
    rig.scratch.put(0, &header(request::IN, 0));
    let [head, status] = rig.ends();
    let last = (entries - 1) as u16;
    head.then(1).put(&mut table, 0);
    let data = Descriptor::new(rig.data(), SECTOR as u32, WRITE);
    (1..last).for_each(|index| data.then(index + 1).put(&mut table, index));
    status.put(&mut table, last);
    rig.offer(&[Descriptor::new(table.address(), entries * 16, INDIRECT)]);
    settle();
    // Explicitly before the table is freed.
    drop(rig);
    Ok(())
}

/// Headers that change while the disk reads them.
fn header_changes(bench: &DiskBench) -> Result<(), Failure> {
    let mut rig = Rig::start(bench, LARGE_RING)?;
    let [head, status] = rig.ends();
    let data = Descriptor::new(rig.data(), 4096, WRITE);
    for index in (0..rig.ring.size - 2).step_by(3) {
        rig.ring.describe(index, head.then(index + 1));
        rig.ring.describe(index + 1, data.then(index + 2));
        rig.ring.describe(index + 2, status);
        rig.ring.offer(index);
    }
    bench.disk.notify(0);
    let end = cpu::now() + Duration::from_millis(20);
    while cpu::now() < end {
        for bytes in [
            header(request::IN, 0),
            header(request::IN, u64::MAX),
            header(request::DISCARD, 0),
        ] {
            rig.scratch.put(0, &bytes);
        }
    }
    Ok(())
}

/// Queues of wrong sizes at wrong places.
fn queues(runner: &mut Runner<'_, DiskBench>) {
    for (name, spoil) in SETUPS {
        runner.attack(&format!("disk-queue-{name}"), |bench| {
            set_up(bench.disk, bench.ram_end, FEATURES, 1, (0, *spoil))
        });
    }
}

/// The disk's own configuration, of which one byte can be written.
fn configuration(runner: &mut Runner<'_, DiskBench>) {
    let region = |disk| match disk {
        VirtioDevice::Mmio(window) => Region {
            base: window.registers.base + at::CONFIG,
            size: CONFIG_SIZE,
        },
        VirtioDevice::Pci(function) => Region {
            size: CONFIG_SIZE,
            ..function.device
        },
    };
    for value in VALUES {
        for is_running in [false, true] {
            let name = format!("disk-config-{value:x}-running-{is_running}");
            runner.attack(&name, |bench| {
                bench.disk.reset();
                let before = capacity(bench.disk);
                let rig = is_running.then(|| Rig::start(bench, RING)).transpose()?;
                let region = region(bench.disk);
                (0..region.size - 8).for_each(|offset| touch(region, offset, value));
                let after = capacity(bench.disk);
                drop(rig);
                match after == before {
                    true => Ok(()),
                    false => Err(format!("{before} sectors became {after}")),
                }
            });
        }
    }
}

/// Notifications and resets out of order, again and again.
fn life(runner: &mut Runner<'_, DiskBench>) {
    let rounds = runner.rounds;
    runner.attack("disk-life-notifications", |bench| {
        let rig = Rig::start(bench, RING)?;
        (0..rounds).for_each(|_| bench.disk.notify(0));
        [1, 100, 0xffff, u32::MAX]
            .into_iter()
            .for_each(|queue| bench.disk.notify_any(queue));
        settle();
        drop(rig);
        Ok(())
    });
    runner.attack("disk-life-resets-in-traffic", |bench| {
        for round in 0..rounds {
            busy(bench).map_err(|why| format!("round {round}: {why}"))?;
        }
        Ok(())
    });
    runner.attack("disk-life-queue-taken-away", |bench| {
        for round in 0..rounds {
            let mut rig = busy(bench).map_err(|why| format!("round {round}: {why}"))?;
            bench.disk.select_queue(0);
            bench.disk.set_queue_ready(0);
            configure(bench.disk, 0, 4, [bench.ram_end, 1, u64::MAX]);
            bench.disk.set_queue_ready(1);
            rig.ring.offer(0);
            bench.disk.notify(0);
        }
        Ok(())
    });
}

/// A disk that writes and reads as much as its queue holds.
fn busy(bench: &DiskBench) -> Result<Rig<'_>, String> {
    let mut rig = Rig::start(bench, LARGE_RING)?;
    let [head, status] = rig.ends();
    rig.scratch.put(0, &header(request::OUT, 64));
    let data = Descriptor::new(rig.data(), 4096, 0);
    for index in (0..rig.ring.size - 2).step_by(3) {
        rig.ring.describe(index, head.then(index + 1));
        rig.ring.describe(index + 1, data.then(index + 2));
        rig.ring.describe(index + 2, status);
        rig.ring.offer(index);
    }
    bench.disk.notify(0);
    Ok(rig)
}
