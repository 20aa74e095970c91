//! Everything that a driver must not do with a share (virtio 1.2, 5.11; include/uapi/linux/fuse.h). After
//! each attack the share must work again after a reset, which a file that is read proves.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;

use super::chains::{Place, poisons};
use super::queues::{SETUPS, set_up};
use super::{Failure, Runner, Subject, run_on, settle};
use crate::boot::Boot;
use crate::cpu;
use crate::memory::{PAGE, Shared};
use crate::options::Options;
use crate::share;
use crate::virtio::Kind;
use crate::virtio::device::VirtioDevice;
use crate::virtio::fs::{Fs, HIGH_PRIORITY, IN_HEADER, OUT_HEADER, REQUESTS, ROOT, header, opcode};
use crate::virtio::ring::{Descriptor, WRITE};

/// How many descriptors an attacked queue has.
const RING: u16 = 16;
/// The scratch memory: a request, and its reply.
const REPLY: usize = 16 * PAGE;
const ROOM: usize = 1 << 20;
/// VIRTIO_F_VERSION_1 and VIRTIO_F_INDIRECT_DESC.
const FEATURES: u64 = 1 << 32 | 1 << 28;
/// What the host has written into `hello`.
const HELLO: &[u8] = b"of the host";
const BATCH_FORGET: u32 = 42;
/// The longest name of Linux, and more.
const LONG_NAME: usize = 4096;

/// The share under attack, and another one.
pub struct ShareBench {
    share: VirtioDevice,
    ram_end: u64,
    /// It has been brought up once and is in use all the time: whatever happens to the first, it goes on.
    neighbour: RefCell<Fs>,
}

impl ShareBench {
    fn new(options: &Options, boot: &Boot) -> Result<Self, Failure> {
        let neighbour = VirtioDevice::find(Kind::FileSystem, options.index + 1)?;
        Ok(Self {
            share: VirtioDevice::find(Kind::FileSystem, options.index)?,
            ram_end: boot.ram.end,
            neighbour: RefCell::new(begin(Fs::start(neighbour)?)?),
        })
    }
}

impl Subject for ShareBench {
    /// Brings the share up and reads a file; reads the neighbour's too.
    fn prove(&self) -> Result<(), Failure> {
        reads_hello(&mut begin(Fs::start(self.share)?)?)?;
        let neighbour = &mut self.neighbour.borrow_mut();
        reads_hello(neighbour).map_err(|why| format!("the neighbour: {why}"))
    }
}

/// Makes FUSE's first request.
fn begin(mut fs: Fs) -> Result<Fs, Failure> {
    match fs.init()? {
        (0, _) => Ok(fs),
        (error, _) => Err(format!("init: error {error}")),
    }
}

fn reads_hello(fs: &mut Fs) -> Result<(), Failure> {
    let node = share::lookup(fs, "hello")?;
    match share::read(fs, node)? {
        bytes if bytes == HELLO => Ok(()),
        bytes => Err(format!("it reads {bytes:?}")),
    }
}

/// Runs every attack whose name begins with `guest.only`, on the share of this index; the next one is its neighbour.
pub fn run(options: &Options, boot: &Boot) {
    let attacks = [chains, queues, requests, names, life];
    let bench = ShareBench::new(options, boot);
    run_on("hostile-share", options, bench, &attacks);
}

/// The share brought up. It is reset when dropped, before its memory is freed.
struct Rig {
    fs: Fs,
    scratch: Shared,
}

impl Rig {
    fn start(bench: &ShareBench) -> Result<Self, &'static str> {
        Ok(Self::of(Fs::start_with(bench.share, FEATURES, RING)?))
    }

    /// The same after FUSE's first request.
    fn begun(bench: &ShareBench) -> Result<Self, Failure> {
        begin(Fs::start_with(bench.share, FEATURES, RING)?).map(Self::of)
    }

    fn of(fs: Fs) -> Self {
        Self {
            fs,
            scratch: Shared::new(REPLY + ROOM),
        }
    }

    /// Offers these bytes as a request, with so much room for a reply.
    fn offer(&mut self, queue: usize, bytes: &[u8], room: u32) {
        self.scratch.put(0, bytes);
        self.scratch.put(REPLY, &[0; OUT_HEADER]);
        let at = self.scratch.address();
        let mut chain = vec![
            Descriptor::new(at, bytes.len() as u32, 0),
            Descriptor::new(at + REPLY as u64, room, WRITE),
        ];
        chain.retain(|descriptor| descriptor.length > 0);
        self.fs.rings[queue].offer_chain(&chain);
        self.fs.device.notify(queue as u16);
    }

    /// The same, and waits for its end: the error of the reply, if there is one.
    fn ask(&mut self, queue: usize, bytes: &[u8], room: u32) -> Result<Option<i32>, Failure> {
        self.offer(queue, bytes, room);
        let end = cpu::now() + cpu::PATIENCE;
        while cpu::now() < end {
            if let Some((_, length)) = self.fs.rings[queue].take() {
                let error = self.scratch.read::<u32>(REPLY + 4) as i32;
                return Ok((length as usize >= OUT_HEADER).then_some(error));
            }
        }
        Err("the share does not end a request".into())
    }
}

/// A request, whose header says how long it is.
fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let header = header(IN_HEADER + body.len(), opcode, 1, node);
    [&header, body].concat()
}

/// The chains that are wrong for every device, of descriptors for reading and for writing.
fn chains(runner: &mut Runner<'_, ShareBench>) {
    for (name, poison) in poisons() {
        for (variant, queue, own) in [
            ("hiprio", HIGH_PRIORITY, 0),
            ("read", REQUESTS, 0),
            ("write", REQUESTS, WRITE),
        ] {
            runner.attack(&format!("share-chain-{name}-{variant}"), |bench| {
                let mut rig = Rig::begun(bench)?;
                let mut place = Place::new(bench.share, bench.ram_end, rig.scratch.address(), own);
                place.spoil(&mut rig.fs.rings[queue], *poison);
                // Explicitly before the table is freed.
                drop(rig);
                Ok(())
            });
        }
    }
}

/// Queues of any size and anywhere, the other one in order.
fn queues(runner: &mut Runner<'_, ShareBench>) {
    for (name, spoil) in SETUPS {
        for queue in 0..2 {
            runner.attack(&format!("share-queue-{name}-{queue}"), |bench| {
                set_up(bench.share, bench.ram_end, FEATURES, 2, (queue, *spoil))
            });
        }
    }
}

/// Requests that make no sense. Each of them is completed, on either queue.
fn requests(runner: &mut Runner<'_, ShareBench>) {
    let all = u64::MAX.to_le_bytes();
    let mut bad: Vec<(String, Vec<u8>)> = vec![
        ("nothing".into(), vec![0]),
        ("header-cut".into(), vec![0; IN_HEADER - 1]),
        ("garbage".into(), vec![0xff; PAGE]),
        ("zeros".into(), vec![0; PAGE]),
    ];
    for length in [
        0,
        1,
        IN_HEADER - 1,
        IN_HEADER + 1,
        1 << 20,
        u32::MAX as usize,
    ] {
        let bytes = header(length, opcode::GETATTR, 1, ROOT);
        bad.push((format!("length-{length}"), bytes.into()));
    }
    // With no body and with one that is too long, of all numbers and some that there are not.
    for opcode in (0..64).chain([4096, u32::MAX]) {
        bad.push((format!("opcode-{opcode}-empty"), request(opcode, ROOT, &[])));
        let body = [0xff; 512];
        bad.push((
            format!("opcode-{opcode}-ones"),
            request(opcode, ROOT, &body),
        ));
    }
    for node in [0, 77, u64::MAX] {
        for opcode in [
            opcode::GETATTR,
            opcode::OPEN,
            opcode::FORGET,
            opcode::LOOKUP,
        ] {
            let bytes = request(opcode, node, b"hello\0\0\0\0\0\0\0\0\0\0\0");
            bad.push((format!("node-{node:x}-opcode-{opcode}"), bytes));
        }
    }
    for opcode in [opcode::READ, opcode::WRITE, opcode::RELEASE] {
        // An unknown handle; an offset and a length that are the largest.
        let body = all.repeat(5);
        bad.push((format!("handle-{opcode}"), request(opcode, ROOT, &body)));
    }
    let many = request(BATCH_FORGET, 0, &all);
    bad.push(("forget-more-than-there-are".into(), many));
    for (name, bytes) in &bad {
        for (variant, queue, room) in [
            ("", REQUESTS, PAGE as u32),
            ("-no-room", REQUESTS, 0),
            ("-little-room", REQUESTS, OUT_HEADER as u32 - 1),
            ("-hiprio", HIGH_PRIORITY, PAGE as u32),
        ] {
            runner.attack(&format!("share-request-{name}{variant}"), |bench| {
                Rig::begun(bench)?.ask(queue, bytes, room).map(drop)
            });
        }
    }
    runner.attack("share-request-before-init", |bench| {
        let bytes = request(opcode::GETATTR, ROOT, &[0; 16]);
        Rig::start(bench)?.ask(REQUESTS, &bytes, 256).map(drop)
    });
    runner.attack("share-request-init-twice", |bench| {
        let mut rig = Rig::begun(bench)?;
        rig.fs.init()?;
        let node = share::lookup(&mut rig.fs, "hello")?;
        share::read(&mut rig.fs, node).map(drop)
    });
}

/// Names that are none of a file in the share.
fn names(runner: &mut Runner<'_, ShareBench>) {
    let long = [b'a'; LONG_NAME];
    // The server takes a path where it leads to a file of the share: its own root is the directory.
    let names: [(&str, &[u8]); 6] = [
        ("empty", b"\0"),
        ("root", b"/etc/passwd\0"),
        ("above", b"../../../../../../../../etc/passwd\0"),
        ("below", b"hello/x\0"),
        ("unended", b"hello"),
        ("long", &long),
    ];
    for (name, bytes) in names {
        // Flags, mode, umask, and more flags come before the name of a file to make.
        let made = [&[0; 16], bytes].concat();
        for (variant, opcode, body) in [
            ("lookup", opcode::LOOKUP, bytes),
            ("create", opcode::CREATE, &made[..]),
        ] {
            runner.attack(&format!("share-name-{name}-{variant}"), |bench| {
                let bytes = request(opcode, ROOT, body);
                match Rig::begun(bench)?.ask(REQUESTS, &bytes, 256)? {
                    Some(..0) => Ok(()),
                    reply => Err(format!("it is taken: {reply:?}")),
                }
            });
        }
    }
}

/// The device's life out of order, as often as the runner says.
fn life(runner: &mut Runner<'_, ShareBench>) {
    let rounds = runner.rounds;
    runner.attack("share-life-notifications", |bench| {
        let rig = Rig::begun(bench)?;
        (0..rounds).for_each(|_| bench.share.notify(0));
        [2, 100, 0xffff, u32::MAX]
            .into_iter()
            .for_each(|queue| bench.share.notify_any(queue));
        settle();
        drop(rig);
        Ok(())
    });
    runner.attack("share-life-forgets", |bench| {
        let mut rig = Rig::begun(bench)?;
        let bytes = request(opcode::FORGET, ROOT, &u64::MAX.to_le_bytes());
        for _ in 0..rounds {
            rig.ask(HIGH_PRIORITY, &bytes, 0)?;
        }
        Ok(())
    });
    runner.attack("share-life-open-files", |bench| {
        let mut rig = Rig::begun(bench)?;
        let node = share::lookup(&mut rig.fs, "hello")?;
        let open = request(opcode::OPEN, node, &[0; 8]);
        for _ in 0..rounds {
            rig.ask(REQUESTS, &open, 256)?;
        }
        Ok(())
    });
    runner.attack("share-life-resets-in-traffic", |bench| {
        let bytes = request(opcode::LOOKUP, ROOT, b"hello\0");
        for _ in 0..rounds {
            let mut rig = Rig::begun(bench)?;
            (0..RING / 2).for_each(|_| rig.offer(REQUESTS, &bytes, 256));
        }
        Ok(())
    });
}
