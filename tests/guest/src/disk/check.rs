//! Everything that a disk can do, and what it must refuse.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use virtio_drivers::device::blk::VirtIOBlk;

use super::pattern;
use crate::options::Options;
use crate::report;
use crate::serial::println;
use crate::virtio::Kind;
use crate::virtio::blk::{
    BlkQueue, Config, ID, SECTOR, Shape, UNMAP, bring_up, capacity, feature, outcome, range,
    request, set_writeback, writeback,
};
use crate::virtio::by_crate::{Identity, transport};
use crate::virtio::device::VirtioDevice;

/// What each driver writes can be told apart.
const BY_CRATE: u64 = 1;
const BY_HAND: u64 = 2;
/// Where the ranges are that get discarded and zeroed: each as long, one after the other.
const RANGES: u64 = (1 << 20) / SECTOR as u64;
const RANGE: u32 = (4 << 20) / SECTOR as u32;
/// The disk has to be so large.
const LEAST: u64 = RANGES + 4 * RANGE as u64;
const PIECES: u16 = 8;
const SHAPE: Shape = Shape {
    places: 2,
    pieces: PIECES,
    room: 1 << 20,
};

type Check = fn(&mut Disk) -> Result<(), String>;

/// By hand, in this order.
const CHECKS: &[(&str, Check)] = &[
    ("identity", identity),
    ("queues", queues),
    ("pieces", pieces),
    ("beyond", beyond),
    ("unknown", unknown),
    ("interrupt", interrupt),
];
/// The same for a disk that can be written.
const WRITING: &[(&str, Check)] = &[
    ("discard", discard),
    ("zeroes", zeroes),
    ("ranges", wrong_ranges),
    ("cache", cache),
];

/// Runs them all on `guest.index`.
pub fn run(options: &Options) {
    let found = VirtioDevice::find(Kind::Block, options.index);
    let disk = found.map_err(String::from).and_then(Disk::start);
    let mut disk = match disk {
        Ok(disk) => disk,
        Err(why) => return report::fail("disk", why),
    };
    let writing = if disk.readonly { &[] } else { WRITING };
    for (name, check) in CHECKS.iter().chain(writing) {
        match check(&mut disk) {
            Ok(()) => report::ok(name, ""),
            Err(why) => report::fail(name, why),
        }
    }
    let device = disk.device;
    drop(disk);
    match by_crate(device) {
        Ok(()) => report::ok("crate", ""),
        Err(why) => report::fail("crate", why),
    }
}

/// A disk driven by hand.
struct Disk {
    device: VirtioDevice,
    features: u64,
    config: Config,
    readonly: bool,
    queues: Vec<BlkQueue>,
}

impl Disk {
    fn start(device: VirtioDevice) -> Result<Self, String> {
        let offered = device.offered();
        let config = Config::read(device);
        let count = match offered & feature::MQ {
            0 => 1,
            _ => config.queues,
        };
        if config.capacity < LEAST {
            return Err(format!("it has {} sectors only", config.capacity));
        }
        let (features, queues) = bring_up(device, feature::ALL, count, SHAPE)?;
        let readonly = features & feature::RO != 0;
        println!(
            "DISK sectors={} readonly={readonly} queues={count} seg_max={} blk_size={} \
             discard={:?} write_zeroes={:?} features={offered:#x}",
            config.capacity, config.seg_max, config.blk_size, config.discard, config.write_zeroes,
        );
        Ok(Self {
            device,
            features,
            config,
            readonly,
            queues,
        })
    }

    fn needs(&self, feature: u64) -> Result<(), String> {
        match self.features & feature {
            0 => Err("the disk does not offer it".into()),
            _ => Ok(()),
        }
    }

    /// Makes a request on the first queue, which must end so.
    fn expect(
        &mut self,
        expected: u8,
        kind: u32,
        sector: u64,
        length: usize,
    ) -> Result<(), String> {
        let status = self.queues[0].call(kind, sector, length)?;
        is(
            expected,
            status,
            &format!("request {kind} of {length} bytes at {sector}"),
        )
    }

    /// A request about a range.
    fn expect_range(
        &mut self,
        expected: u8,
        kind: u32,
        (sector, sectors, flags): (u64, u32, u32),
    ) -> Result<(), String> {
        let range = range(sector, sectors, flags);
        self.queues[0].put(0, 0, &range);
        let status = self.queues[0].call(kind, 0, range.len())?;
        is(
            expected,
            status,
            &format!("request {kind} of {sectors} at {sector}, flags {flags}"),
        )
    }

    /// Fills a range, and flushes it.
    fn fill(&mut self, sector: u64, sectors: u32) -> Result<(), String> {
        let step = (SHAPE.room / SECTOR) as u64;
        for start in (sector..sector + u64::from(sectors)).step_by(step as usize) {
            put(&mut self.queues[0], BY_HAND, start, step);
            self.expect(outcome::OK, request::OUT, start, SHAPE.room)?;
        }
        self.expect(outcome::OK, request::FLUSH, 0, 0)
    }
}

fn is(expected: u8, status: u8, what: &str) -> Result<(), String> {
    match status == expected {
        true => Ok(()),
        false => Err(format!("{what}: status {status} instead of {expected}")),
    }
}

/// Puts the pattern of sectors into the first place's data.
fn put(queue: &mut BlkQueue, seed: u64, sector: u64, sectors: u64) {
    for n in 0..sectors {
        queue.put(0, n as usize * SECTOR, &pattern(seed, sector + n));
    }
}

/// Whether the first place's data has the pattern of these sectors.
fn has(queue: &BlkQueue, seed: u64, sector: u64, sectors: u64) -> bool {
    (0..sectors).all(|n| {
        let mut found = [0; SECTOR];
        queue.get(0, n as usize * SECTOR, &mut found);
        found == pattern(seed, sector + n)
    })
}

fn identity(disk: &mut Disk) -> Result<(), String> {
    disk.expect(outcome::OK, request::GET_ID, 0, ID)?;
    let mut id = [0; ID];
    disk.queues[0].get(0, 0, &mut id);
    let id = id.split(|&byte| byte == 0).next().unwrap_or_default();
    println!("SERIAL {}", String::from_utf8_lossy(id));
    Ok(())
}

/// What one queue has written, the next one reads.
fn queues(disk: &mut Disk) -> Result<(), String> {
    let count = disk.queues.len();
    let sectors = (SHAPE.room / SECTOR) as u64;
    for n in 0..count {
        let start = n as u64 % 8 * 8;
        let writer = &mut disk.queues[n];
        put(writer, BY_HAND, start, sectors);
        let status = writer.call(request::OUT, start, SHAPE.room)?;
        if disk.readonly {
            is(outcome::IOERR, status, "writing to a disk for reading")?;
            continue;
        }
        is(outcome::OK, status, "writing")?;
        let reader = &mut disk.queues[(n + 1) % count];
        let status = reader.call(request::IN, start, SHAPE.room)?;
        is(outcome::OK, status, "reading")?;
        if !has(reader, BY_HAND, start, sectors) {
            return Err(format!("queue {n}: it reads other data"));
        }
    }
    Ok(())
}

/// Data in pieces of odd lengths, which together are whole sectors.
fn pieces(disk: &mut Disk) -> Result<(), String> {
    let lengths = [1, 511, 513, 1023, 4096, 4095, 1, 8 * SECTOR];
    let sectors = lengths.iter().sum::<usize>() / SECTOR;
    let queue = &mut disk.queues[0];
    if !disk.readonly {
        put(queue, BY_HAND, 8, sectors as u64);
        let status = queue.call_pieces(request::OUT, 8, &lengths)?;
        is(outcome::OK, status, "writing")?;
    }
    put(queue, 0, 0, sectors as u64);
    let status = queue.call_pieces(request::IN, 8, &lengths)?;
    is(outcome::OK, status, "reading")?;
    if !disk.readonly && !has(queue, BY_HAND, 8, sectors as u64) {
        return Err("it reads other data".into());
    }
    Ok(())
}

/// The last sector is there, and none after it.
fn beyond(disk: &mut Disk) -> Result<(), String> {
    let end = disk.config.capacity;
    disk.expect(outcome::OK, request::IN, end - 1, SECTOR)?;
    for sector in [end - 1, end, u64::MAX - 1, u64::MAX, 1 << 55] {
        for kind in [request::IN, request::OUT] {
            disk.expect(outcome::IOERR, kind, sector, 2 * SECTOR)?;
        }
    }
    Ok(())
}

fn unknown(disk: &mut Disk) -> Result<(), String> {
    for kind in [9, 0x7fff_ffff, u32::MAX] {
        disk.expect(outcome::UNSUPP, kind, 0, SECTOR)?;
    }
    Ok(())
}

/// A request that is done shows in the interrupt status.
fn interrupt(disk: &mut Disk) -> Result<(), String> {
    disk.device.acknowledge(disk.device.interrupt_status());
    let queue = &mut disk.queues[0];
    queue.interrupt_next();
    queue.offer(0, request::IN, 0, SECTOR);
    queue.kick();
    // Taking it asks for no further interrupt, and the device may read that before it has decided on this one.
    disk.device.wait_interrupt(1)?;
    disk.device.acknowledge(1);
    is(outcome::OK, disk.queues[0].wait()?, "the request")
}

fn discard(disk: &mut Disk) -> Result<(), String> {
    disk.needs(feature::DISCARD)?;
    disk.fill(RANGES, 2 * RANGE)?;
    disk.expect_range(outcome::OK, request::DISCARD, (RANGES, RANGE, 0))?;
    // What is next to it stays.
    disk.expect(
        outcome::OK,
        request::IN,
        RANGES + u64::from(RANGE),
        SHAPE.room,
    )?;
    let sectors = (SHAPE.room / SECTOR) as u64;
    if !has(&disk.queues[0], BY_HAND, RANGES + u64::from(RANGE), sectors) {
        return Err("more than the range is gone".into());
    }
    // Unmapping is for zeroes alone (5.2.6.2).
    disk.expect_range(outcome::UNSUPP, request::DISCARD, (RANGES, RANGE, UNMAP))
}

/// A range that keeps its space, and one that gives it back.
fn zeroes(disk: &mut Disk) -> Result<(), String> {
    disk.needs(feature::WRITE_ZEROES)?;
    for (number, flags) in [(1, UNMAP), (2, 0)] {
        let start = RANGES + number * u64::from(RANGE);
        disk.fill(start, RANGE)?;
        // Neither its first nor its last sector.
        let inner = (start + 1, RANGE - 2, flags);
        disk.expect_range(outcome::OK, request::WRITE_ZEROES, inner)?;
        for (sector, is_zero) in [
            (start, false),
            (start + 1, true),
            (start + u64::from(RANGE) / 2, true),
            (start + u64::from(RANGE) - 2, true),
            (start + u64::from(RANGE) - 1, false),
        ] {
            disk.expect(outcome::OK, request::IN, sector, SECTOR)?;
            let mut found = [0; SECTOR];
            disk.queues[0].get(0, 0, &mut found);
            let right = match is_zero {
                true => found == [0; SECTOR],
                false => found == pattern(BY_HAND, sector),
            };
            if !right {
                return Err(format!(
                    "flags {flags}: sector {sector} is not as it should"
                ));
            }
        }
    }
    Ok(())
}

/// Ranges that are not on the disk, or longer than it takes.
fn wrong_ranges(disk: &mut Disk) -> Result<(), String> {
    let end = disk.config.capacity;
    for kind in [request::DISCARD, request::WRITE_ZEROES] {
        for range in [(end, 1, 0), (end - 1, 2, 0), (u64::MAX, 1, 0)] {
            disk.expect_range(outcome::IOERR, kind, range)?;
        }
        disk.expect_range(outcome::UNSUPP, kind, (0, 8, 2))?;
    }
    Ok(())
}

/// Without a cache each write is flushed, and the disk says what is set.
fn cache(disk: &mut Disk) -> Result<(), String> {
    disk.needs(feature::CONFIG_WCE)?;
    for value in [0, 1] {
        set_writeback(disk.device, value);
        if writeback(disk.device) != value {
            return Err(format!("writeback is {}", writeback(disk.device)));
        }
        put(&mut disk.queues[0], BY_HAND, 0, 8);
        disk.expect(outcome::OK, request::OUT, 0, 8 * SECTOR)?;
        disk.expect(outcome::OK, request::FLUSH, 0, 0)?;
    }
    Ok(())
}

/// The first, the last and a sector in the middle, which the host finds on the image.
fn by_crate(device: VirtioDevice) -> Result<(), String> {
    let text = |error: virtio_drivers::Error| error.to_string();
    let sectors = capacity(device);
    let mut disk = VirtIOBlk::<Identity, _>::new(transport(device)?).map_err(text)?;
    if disk.capacity() != sectors {
        return Err(format!("{} sectors", disk.capacity()));
    }
    let mut id = [0; ID];
    disk.device_id(&mut id).map_err(text)?;
    for sector in [0, sectors / 2, sectors - 1] {
        let written = pattern(BY_CRATE, sector);
        let result = disk.write_blocks(sector as usize, &written);
        if disk.readonly() {
            if result.is_ok() {
                return Err("it can be written".into());
            }
            continue;
        }
        result.map_err(text)?;
        let mut found = [0; SECTOR];
        disk.read_blocks(sector as usize, &mut found)
            .map_err(text)?;
        if found != written {
            return Err(format!("sector {sector} reads as something else"));
        }
    }
    disk.flush().map_err(text)
}
