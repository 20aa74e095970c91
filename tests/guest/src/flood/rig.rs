//! A NIC with one queue pair or more, driven for speed.

use alloc::vec::Vec;

use super::{KIND, NUMBER};
use crate::cpu;
use crate::memory::Shared;
use crate::options::Options;
use crate::virtio::Kind;
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::{Config, HEADER, feature, go, negotiate, queue_size};
use crate::virtio::ring::{Descriptor, Ring, WRITE};

/// The most descriptors that a ring gets.
const RING: u16 = 256;
/// The size of a receive buffer, and how many are given back at a time, about as Linux does it.
const RX_BUFFER: usize = 1536;
const RX_BATCH: u16 = 32;
/// So far ahead an event index asks for no notification.
const NEVER: u16 = 0x8000;
/// The command that sets the number of queue pairs (virtio 1.2, 5.1.6.5.6).
const CONTROL_PAIRS: [u8; 2] = [4, 0];

/// The NIC, and how often it was notified.
pub struct Rig {
    nic: VirtioDevice,
    /// Its address.
    pub mac: [u8; 6],
    /// The queue pairs.
    pub pairs: Vec<Pair>,
    /// Notifications of the device.
    pub kicks: u64,
    /// The line by which the first pair's receive queue interrupts, if it may.
    line: Option<u32>,
}

/// A queue pair.
pub struct Pair {
    rx: Ring,
    rx_buffers: Shared,
    /// Buffers that were given back since the last look at whether the device wants to know.
    rx_new: u16,
    tx: Ring,
    tx_buffers: Shared,
    /// The bytes of a frame's buffer.
    tx_room: usize,
    tx_free: Vec<u16>,
}

/// What is looked at in a received frame.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// The last four bytes of its source address.
    pub source: u32,
    /// Its Ethernet type.
    pub kind: u16,
    /// What follows.
    pub number: u32,
    /// Its length.
    pub length: usize,
}

impl Rig {
    /// Brings the NIC up with as many pairs as the options say.
    pub fn start(options: &Options) -> Result<Self, &'static str> {
        let nic = VirtioDevice::find(Kind::Net, options.index)?;
        // QEMU does not tell the MTU.
        let single = (feature::OFFLOADS | feature::EVENT_IDX) & !feature::MTU;
        let wanted = match options.pairs {
            1 => single,
            _ => single | feature::MQ | feature::CTRL_VQ,
        };
        let features = negotiate(nic, wanted)?;
        if features != wanted {
            return Err("the device does not offer every feature");
        }
        let config = Config::read(nic);
        if options.pairs > 1 && options.pairs > config.pairs {
            return Err("the device has fewer queue pairs");
        }
        let pairs = (0..options.pairs).map(|n| Pair::new(nic, n));
        let pairs: Vec<Pair> = pairs.collect::<Result<_, _>>()?;
        let control = match options.pairs {
            1 => None,
            _ => Some(Ring::new(config.pairs * 2, 4)),
        };
        if let Some(ring) = &control {
            ring.enable(nic);
        }
        go(nic);
        if let Some(ring) = control {
            set_pairs(nic, ring, options.pairs)?;
        }
        let line = options.interrupts.then(|| {
            nic.enable_interrupts();
            nic.line()
        });
        let mut rig = Self {
            nic,
            mac: config.mac,
            pairs,
            kicks: 0,
            line,
        };
        for n in 0..rig.pairs.len() {
            let pair = &mut rig.pairs[n];
            (0..pair.rx.size).for_each(|index| pair.rx.offer(index));
            rig.nic.notify(rig.pairs[n].rx.queue);
        }
        Ok(rig)
    }

    /// How often it has interrupted.
    pub fn interrupts(&self) -> u64 {
        self.line.map_or(0, cpu::interrupts)
    }

    /// Gives every frame to be sent the same content.
    pub fn prepare(&mut self, frame: &[u8]) {
        for pair in &mut self.pairs {
            pair.tx_room = frame.len().next_multiple_of(64);
            pair.tx_buffers = Shared::new(usize::from(pair.tx.size) * pair.tx_room);
            for index in 0..pair.tx.size {
                let at = usize::from(index) * pair.tx_room;
                pair.tx_buffers.put(at, frame);
                let address = pair.tx_buffers.address() + at as u64;
                pair.tx
                    .describe(index, Descriptor::new(address, frame.len() as u32, 0));
            }
        }
    }

    /// Queues frames on a pair as long as there is room. Returns how many.
    pub fn send(&mut self, pair: usize) -> u64 {
        self.pairs[pair].reap();
        let mut sent = 0;
        while let Some(index) = self.pairs[pair].tx_free.pop() {
            self.offer(pair, index);
            sent += 1;
        }
        sent
    }

    /// Sends one frame with this number, on the first pair.
    pub fn send_number(&mut self, number: u32) {
        let pair = &mut self.pairs[0];
        pair.reap();
        if let Some(index) = pair.tx_free.pop() {
            let at = usize::from(index) * pair.tx_room + HEADER + NUMBER;
            pair.tx_buffers.write(at, number);
            self.offer(0, index);
        }
    }

    fn offer(&mut self, pair: usize, index: u16) {
        let tx = &mut self.pairs[pair].tx;
        tx.offer(index);
        if tx.wants_notification(1) {
            self.nic.notify(tx.queue);
            self.kicks += 1;
        }
    }

    /// Frames that the device has not taken yet.
    pub fn unsent(&mut self) -> usize {
        self.pairs.iter_mut().map(Pair::unsent).sum()
    }

    /// Takes what a pair has received, at most a batch.
    pub fn receive(&mut self, pair: usize, mut see: impl FnMut(Seen)) -> usize {
        let Self {
            nic, pairs, kicks, ..
        } = self;
        let pair = &mut pairs[pair];
        let mut frames = 0;
        while pair.rx_new < RX_BATCH
            && let Some(seen) = pair.take()
        {
            see(seen);
            frames += 1;
        }
        if pair.rx_new >= RX_BATCH {
            if pair.rx.wants_notification(pair.rx_new) {
                nic.notify(pair.rx.queue);
                *kicks += 1;
            }
            pair.rx_new = 0;
        }
        if frames > 0 {
            pair.rx.set_used_event(pair.rx.taken().wrapping_add(NEVER));
        }
        frames
    }

    /// Halts until the first pair's receive queue interrupts, if it has got nothing more.
    pub fn sleep(&mut self) -> Result<(), &'static str> {
        let line = self.line.ok_or("guest.interrupts=on is missing")?;
        let seen = cpu::interrupts(line);
        let rx = &mut self.pairs[0].rx;
        rx.set_used_event(rx.taken());
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        if !rx.has_used() {
            cpu::halt_unless_interrupted(line, seen);
        }
        Ok(())
    }

    /// With interrupts: lets the first pair's receive queue interrupt, and waits for that until the
    /// clock shows `end`.
    pub fn wait(&mut self, end: u64) {
        let Some(line) = self.line else { return };
        let before = cpu::interrupts(line);
        let rx = &mut self.pairs[0].rx;
        rx.set_used_event(rx.taken());
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        while !rx.has_used() && cpu::ticks() < end {}
        // The interrupt is on its way, unless the device has used the buffer before it could know
        // that one is wanted.
        let end = end.min(cpu::ticks() + cpu::ticks_in(100_000));
        while cpu::interrupts(line) == before && cpu::ticks() < end {}
    }
}

impl Pair {
    fn new(nic: VirtioDevice, number: u16) -> Result<Self, &'static str> {
        let ring = |queue| Ok::<_, &'static str>(Ring::new(queue, queue_size(nic, queue, RING)?));
        let (mut rx, mut tx) = (ring(number * 2)?, ring(number * 2 + 1)?);
        rx.enable(nic);
        tx.enable(nic);
        let rx_buffers = Shared::new(usize::from(rx.size) * RX_BUFFER);
        for index in 0..rx.size {
            let address = rx_buffers.address() + (usize::from(index) * RX_BUFFER) as u64;
            rx.describe(index, Descriptor::new(address, RX_BUFFER as u32, WRITE));
        }
        rx.set_used_event(NEVER);
        tx.set_used_event(NEVER);
        Ok(Self {
            rx_new: 0,
            tx_free: (0..tx.size).collect(),
            tx_buffers: Shared::new(0),
            tx_room: 0,
            rx,
            rx_buffers,
            tx,
        })
    }

    /// Takes back what the device has sent.
    fn reap(&mut self) {
        while let Some((head, _)) = self.tx.take() {
            self.tx_free.push(head);
        }
        self.tx.set_used_event(self.tx.taken().wrapping_add(NEVER));
    }

    fn unsent(&mut self) -> usize {
        self.reap();
        usize::from(self.tx.size) - self.tx_free.len()
    }

    /// Takes the next received frame and gives its buffers back.
    fn take(&mut self) -> Option<Seen> {
        let (head, first) = self.rx.take()?;
        let at = usize::from(head) * RX_BUFFER;
        let buffers: u16 = self.rx_buffers.read(at + HEADER - 2);
        let frame = at + HEADER;
        let kind: u16 = self.rx_buffers.read(frame + KIND);
        let mut seen = Seen {
            source: self.rx_buffers.read(frame + KIND - 4),
            kind: u16::from_be(kind),
            number: self.rx_buffers.read(frame + NUMBER),
            length: (first as usize).saturating_sub(HEADER),
        };
        self.rx.offer(head);
        // The device publishes all buffers of a frame together.
        for _ in 1..buffers {
            let (head, length) = self.rx.take()?;
            seen.length += length as usize;
            self.rx.offer(head);
        }
        self.rx_new += buffers;
        Some(seen)
    }
}

/// Has the device use so many pairs.
fn set_pairs(nic: VirtioDevice, mut ring: Ring, pairs: u16) -> Result<(), &'static str> {
    let mut memory = Shared::new(64);
    memory.put(0, &CONTROL_PAIRS);
    memory.write(2, pairs);
    memory.write(8, u8::MAX);
    let base = memory.address();
    ring.describe(0, Descriptor::new(base, 2, 0).then(1));
    ring.describe(1, Descriptor::new(base + 2, 2, 0).then(2));
    ring.describe(2, Descriptor::new(base + 8, 1, WRITE));
    ring.offer(0);
    nic.notify(ring.queue);
    let end = cpu::now() + cpu::PATIENCE;
    while ring.take().is_none() {
        if cpu::now() > end {
            return Err("the device does not answer a command");
        }
    }
    match memory.read::<u8>(8) {
        0 => Ok(()),
        _ => Err("the device refuses the number of queue pairs"),
    }
}
