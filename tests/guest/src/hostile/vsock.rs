//! Everything that a driver must not do with the socket device (virtio 1.2, 5.10). After each attack the
//! device must work again after a reset, which bytes prove that a program of the host echoes; and
//! whatever a packet says, a connection that it is not about goes on.

use alloc::format;
use alloc::vec::Vec;

use smoltcp::time::Duration;

use super::chains::{Place, poisons};
use super::queues::{SETUPS, set_up};
use super::{Failure, Runner, Subject, run_on, settle};
use crate::boot::Boot;
use crate::cpu;
use crate::memory::{PAGE, Shared};
use crate::options::Options;
use crate::virtio::Kind;
use crate::virtio::device::{VirtioDevice, go, negotiate, queue_size};
use crate::virtio::ring::{Descriptor, Ring, WRITE, configure};
use crate::vsock::rig::{
    CLOSED, CREDIT_REQUEST, CREDIT_UPDATE, HEADER, HOST, REQUEST, RESPONSE, RST, RW, SHUTDOWN,
    STREAM,
};

/// How many descriptors an attacked queue has.
const RING: u16 = 16;
/// VIRTIO_F_VERSION_1 and VIRTIO_F_INDIRECT_DESC.
const FEATURES: u64 = 1 << 32 | 1 << 28;
/// The queues: to receive, to send, and for events.
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// Where a packet to send lies in the scratch memory, after the buffers to receive, and its data.
const PACKET: usize = RING as usize * PAGE;
const MAX_DATA: usize = 64 << 10;
/// Within this time a good packet is used, and a program answers.
const PATIENCE: Duration = Duration::from_secs(20);
/// The guest's ports of a connection that is attacked, and of one that is not.
const VICTIM: u32 = 20_000;
const NEIGHBOUR: u32 = 20_001;
/// What the guest says that it can take of a connection.
const BUFFER: u32 = 256 << 10;

/// The device under attack.
pub struct SocketBench {
    device: VirtioDevice,
    ram_end: u64,
    /// A program of the host's listens there, which echoes.
    port: u32,
}

impl Subject for SocketBench {
    /// Connects to the program, and has bytes echoed.
    fn prove(&self) -> Result<(), Failure> {
        let mut rig = Rig::start(self)?;
        rig.open(NEIGHBOUR)?;
        rig.echo(NEIGHBOUR)
    }
}

/// Runs every attack whose name begins with `guest.only`.
pub fn run(options: &Options, boot: &Boot) {
    let bench = VirtioDevice::find(Kind::Vsock, options.index).map(|device| SocketBench {
        device,
        ram_end: boot.ram.end,
        port: options.port.unwrap_or(7).into(),
    });
    let attacks = [chains, queues, packets, life];
    run_on("hostile-vsock", options, bench, &attacks);
}

/// A packet's header, each field of which may lie.
#[derive(Clone, Copy)]
struct Packet {
    src_cid: u64,
    dst_cid: u64,
    port: u32,
    host: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Packet {
    fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        let kind = u32::from(self.kind) | u32::from(self.op) << 16;
        let words = [
            self.port,
            self.host,
            self.len,
            kind,
            self.flags,
            self.buf_alloc,
            self.fwd_cnt,
        ];
        for (to, word) in bytes[16..].chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// The device brought up with its queues. It is reset when dropped, before their memory is freed.
struct Rig<'a> {
    bench: &'a SocketBench,
    rings: [Ring; 3],
    scratch: Shared,
}

impl<'a> Rig<'a> {
    /// Without a buffer in any queue.
    fn bare(bench: &'a SocketBench) -> Result<Self, &'static str> {
        negotiate(bench.device, FEATURES)?;
        let sizes = [0, 1, 2].map(|queue| queue_size(bench.device, queue, RING));
        let [rx, tx, event] = sizes;
        let rings = [Ring::new(0, rx?), Ring::new(1, tx?), Ring::new(2, event?)];
        rings.iter().for_each(|ring| ring.enable(bench.device));
        go(bench.device);
        Ok(Self {
            bench,
            rings,
            scratch: Shared::new(PACKET + PAGE + MAX_DATA),
        })
    }

    fn start(bench: &'a SocketBench) -> Result<Self, &'static str> {
        let mut rig = Self::bare(bench)?;
        rig.offer_buffers();
        Ok(rig)
    }

    /// Gives the device buffers to receive.
    fn offer_buffers(&mut self) {
        for index in 0..self.rings[RX].size {
            let address = self.scratch.address() + u64::from(index) * PAGE as u64;
            let buffer = Descriptor::new(address, PAGE as u32, WRITE);
            self.rings[RX].describe(index, buffer);
            self.rings[RX].offer(index);
        }
        self.bench.device.notify(RX as u16);
    }

    /// A packet that is right, without data.
    fn packet(&self, port: u32, op: u16) -> Packet {
        Packet {
            src_cid: self.bench.device.config(0),
            dst_cid: HOST,
            port,
            host: self.bench.port,
            len: 0,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: BUFFER,
            fwd_cnt: 0,
        }
    }

    /// Makes a chain available that has so many bytes of a packet and what follows it.
    fn offer(&mut self, packet: &Packet, bytes: u32) {
        self.scratch.put(PACKET, &packet.bytes());
        let address = self.scratch.address() + PACKET as u64;
        self.rings[TX].describe(0, Descriptor::new(address, bytes, 0));
        self.rings[TX].offer(0);
        self.bench.device.notify(TX as u16);
    }

    /// Whether the device has used such a chain in time.
    fn is_used(&mut self, patience: Duration) -> bool {
        let end = cpu::now() + patience;
        while cpu::now() < end {
            if self.rings[TX].take().is_some() {
                return true;
            }
        }
        false
    }

    /// Sends so many bytes, and waits until they are used.
    fn send_bytes(&mut self, packet: &Packet, bytes: u32) -> Result<(), Failure> {
        self.offer(packet, bytes);
        match self.is_used(PATIENCE) {
            true => Ok(()),
            false => Err("the device does not use a packet".into()),
        }
    }

    /// Sends a packet with as much data as it says.
    fn send(&mut self, packet: &Packet) -> Result<(), Failure> {
        self.send_bytes(packet, HEADER as u32 + packet.len)
    }

    /// The next packet received: its port, what it is, and its data.
    fn receive(&mut self) -> Option<(u32, u16, Vec<u8>)> {
        let (head, len) = self.rings[RX].take()?;
        let at = usize::from(head) * PAGE;
        let (port, kind) = (
            self.scratch.read::<u32>(at + 20),
            self.scratch.read::<u32>(at + 28),
        );
        let mut data = alloc::vec![0; (len as usize).saturating_sub(HEADER)];
        self.scratch.get(at + HEADER, &mut data);
        self.rings[RX].offer(head);
        self.bench.device.notify(RX as u16);
        Some((port, (kind >> 16) as u16, data))
    }

    /// Waits for a packet of a connection.
    fn wait(&mut self, port: u32, op: u16) -> Result<Vec<u8>, Failure> {
        let end = cpu::now() + PATIENCE;
        while cpu::now() < end {
            match self.receive() {
                Some((to, got, data)) if (to, got) == (port, op) => return Ok(data),
                Some((to, RST, _)) if to == port => {
                    return Err(format!("port {port} is reset instead of {op}"));
                }
                _ => {}
            }
        }
        Err(format!("port {port} gets no {op}"))
    }

    /// Connects to the program.
    fn open(&mut self, port: u32) -> Result<(), Failure> {
        self.send(&self.packet(port, REQUEST))?;
        self.wait(port, RESPONSE).map(drop)
    }

    /// Has bytes echoed.
    fn echo(&mut self, port: u32) -> Result<(), Failure> {
        const SAID: &[u8] = b"echo";
        self.scratch.put(PACKET + HEADER, SAID);
        let mut packet = self.packet(port, RW);
        packet.len = SAID.len() as u32;
        self.send(&packet)?;
        match self.wait(port, RW)? == SAID {
            true => Ok(()),
            false => Err("other bytes come back".into()),
        }
    }
}

impl Drop for Rig<'_> {
    fn drop(&mut self) {
        self.bench.device.reset();
    }
}

/// The chains that are wrong for every device, in each queue.
fn chains(runner: &mut Runner<'_, SocketBench>) {
    for (name, poison) in poisons() {
        for (queue, own) in [(RX, WRITE), (TX, 0), (EVENT, WRITE)] {
            runner.attack(&format!("vsock-chain-{name}-{queue}"), |bench| {
                let mut rig = Rig::bare(bench)?;
                let mut place = Place::new(bench.device, bench.ram_end, rig.scratch.address(), own);
                place.spoil(&mut rig.rings[queue], *poison);
                if queue != TX {
                    // So that the device has something for the guest.
                    rig.offer(&rig.packet(VICTIM, RW), HEADER as u32);
                }
                settle();
                // Explicitly before the table is freed.
                drop(rig);
                Ok(())
            });
        }
    }
}

/// Queues of wrong sizes at wrong places.
fn queues(runner: &mut Runner<'_, SocketBench>) {
    for (name, spoil) in SETUPS {
        for queue in 0..3 {
            runner.attack(&format!("vsock-queue-{name}-{queue}"), |bench| {
                set_up(bench.device, bench.ram_end, FEATURES, 3, (queue, *spoil))
            });
        }
    }
}

type Attack = fn(&mut Rig<'_>) -> Result<(), Failure>;

/// Packets that lie. [`VICTIM`] is open; so is [`NEIGHBOUR`], which goes on.
const PACKETS: &[(&str, Attack)] = &[
    ("ops", |rig| {
        for op in [0, 8, 9, 0xff, 0x100, 0xffff] {
            for port in [VICTIM, VICTIM + 5] {
                rig.send(&rig.packet(port, op))?;
            }
        }
        Ok(())
    }),
    ("types", |rig| {
        for kind in [0, 2, 3, 0x100, 0xffff] {
            for op in [REQUEST, RW, SHUTDOWN] {
                let packet = rig.packet(VICTIM, op);
                rig.send(&Packet { kind, ..packet })?;
            }
        }
        Ok(())
    }),
    ("cids", |rig| {
        for cid in [0, 1, 2, 4, 0xffff_ffff, 1 << 32, u64::MAX] {
            for op in [REQUEST, RW, RST] {
                let packet = rig.packet(VICTIM, op);
                rig.send(&Packet {
                    src_cid: cid,
                    ..packet
                })?;
                rig.send(&Packet {
                    dst_cid: cid,
                    port: VICTIM + 5,
                    ..packet
                })?;
            }
        }
        Ok(())
    }),
    ("ports", |rig| {
        for port in [0, 1, u32::MAX - 1, u32::MAX] {
            for op in [REQUEST, RW, RST] {
                let packet = rig.packet(port, op);
                rig.send(&packet)?;
                rig.send(&Packet {
                    host: port,
                    ..packet
                })?;
            }
        }
        Ok(())
    }),
    ("lengths", |rig| {
        for len in [1, 4096, 0x1_0000, 0x7fff_ffff, u32::MAX - 43, u32::MAX] {
            let packet = rig.packet(VICTIM, RW);
            rig.send_bytes(&Packet { len, ..packet }, HEADER as u32)?;
        }
        Ok(())
    }),
    ("headers-cut", |rig| {
        for bytes in [0, 1, 8, 43] {
            rig.send_bytes(&rig.packet(VICTIM, RST), bytes)?;
        }
        Ok(())
    }),
    ("data-with-every-op", |rig| {
        for op in [CREDIT_UPDATE, CREDIT_REQUEST, REQUEST, RESPONSE, SHUTDOWN] {
            let packet = rig.packet(VICTIM, op);
            let len = MAX_DATA as u32;
            rig.send(&Packet { len, ..packet })?;
        }
        Ok(())
    }),
    ("credit-lies", |rig| {
        for (buf_alloc, fwd_cnt) in [
            (0, 0),
            (0, u32::MAX),
            (u32::MAX, 0),
            (u32::MAX, u32::MAX),
            (1, 1 << 31),
            (BUFFER, 0x7fff_ffff),
        ] {
            let packet = rig.packet(VICTIM, RW);
            rig.send(&Packet {
                len: 1000,
                buf_alloc,
                fwd_cnt,
                ..packet
            })?;
            rig.send(&Packet {
                op: CREDIT_REQUEST,
                ..packet
            })?;
        }
        Ok(())
    }),
    ("more-than-credit", |rig| {
        // Nothing is taken of what comes back, so that the program does not go on reading.
        for _ in 0..64 {
            let packet = rig.packet(VICTIM, RW);
            rig.send(&Packet {
                len: MAX_DATA as u32,
                buf_alloc: 0,
                ..packet
            })?;
        }
        Ok(())
    }),
    ("request-again", |rig| {
        rig.send(&rig.packet(VICTIM, REQUEST))
    }),
    ("response-to-nothing", |rig| {
        rig.send(&rig.packet(VICTIM, RESPONSE))?;
        rig.send(&rig.packet(VICTIM + 5, RESPONSE))
    }),
    ("data-after-shutdown", |rig| {
        for flags in [0, !CLOSED, 2, CLOSED, u32::MAX] {
            let packet = rig.packet(VICTIM, SHUTDOWN);
            rig.send(&Packet { flags, ..packet })?;
            let packet = rig.packet(VICTIM, RW);
            rig.send(&Packet { len: 100, ..packet })?;
        }
        Ok(())
    }),
    ("resets", |rig| {
        for n in 0..3000 {
            rig.send(&rig.packet(VICTIM + 2 * (n % 7), RST))?;
        }
        Ok(())
    }),
    ("requests", |rig| {
        // More than there may be connections, and than the program accepts at once.
        for n in 0..3000 {
            rig.send(&rig.packet(VICTIM + 10 + n, REQUEST))?;
            while rig.receive().is_some() {}
        }
        Ok(())
    }),
    ("open-and-reset", |rig| {
        for n in 0..3000 {
            let op = [REQUEST, RST][n as usize % 2];
            rig.send(&rig.packet(VICTIM + 10 + n / 2, op))?;
            while rig.receive().is_some() {}
        }
        Ok(())
    }),
];

fn packets(runner: &mut Runner<'_, SocketBench>) {
    for (name, attack) in PACKETS {
        runner.attack(&format!("vsock-packet-{name}"), |bench| {
            let mut rig = Rig::start(bench)?;
            rig.open(NEIGHBOUR)?;
            rig.open(VICTIM)?;
            attack(&mut rig)?;
            rig.echo(NEIGHBOUR)
        });
    }
    runner.attack("vsock-packet-no-room-for-answers", |bench| {
        let mut rig = Rig::bare(bench)?;
        let packet = rig.packet(VICTIM, RW);
        // The device takes no more of them once so many answers wait.
        let mut is_used = true;
        for _ in 0..1000 {
            rig.offer(&packet, HEADER as u32);
            is_used = rig.is_used(Duration::from_millis(100));
            if !is_used {
                break;
            }
        }
        rig.offer_buffers();
        let end = cpu::now() + PATIENCE;
        while !is_used && cpu::now() < end {
            while rig.receive().is_some() {}
            is_used = rig.rings[TX].take().is_some();
        }
        match is_used {
            true => rig.open(NEIGHBOUR).and_then(|()| rig.echo(NEIGHBOUR)),
            false => Err("the device does not go on when there is room".into()),
        }
    });
}

/// Notifications and resets out of order, again and again.
fn life(runner: &mut Runner<'_, SocketBench>) {
    let rounds = runner.rounds;
    runner.attack("vsock-life-notifications", |bench| {
        let rig = Rig::start(bench)?;
        for queue in [0, 1, 2, 3, 100, 0xffff, u32::MAX] {
            (0..rounds).for_each(|_| bench.device.notify_any(queue));
        }
        settle();
        drop(rig);
        Ok(())
    });
    runner.attack("vsock-life-resets-in-traffic", |bench| {
        for round in 0..rounds {
            busy(bench).map_err(|why| format!("round {round}: {why}"))?;
        }
        Ok(())
    });
    runner.attack("vsock-life-queue-taken-away", |bench| {
        for round in 0..rounds {
            let rig = busy(bench).map_err(|why| format!("round {round}: {why}"))?;
            for queue in 0..3 {
                bench.device.select_queue(queue);
                bench.device.set_queue_ready(0);
                configure(bench.device, queue as u16, 4, [bench.ram_end, 1, u64::MAX]);
                bench.device.set_queue_ready(1);
                bench.device.notify(queue as u16);
            }
            drop(rig);
        }
        Ok(())
    });
}

/// A device that has connections, and data to pass on both ways.
fn busy(bench: &SocketBench) -> Result<Rig<'_>, Failure> {
    let mut rig = Rig::start(bench)?;
    for port in VICTIM..VICTIM + 4 {
        rig.open(port)?;
        let packet = rig.packet(port, RW);
        let len = MAX_DATA as u32;
        rig.send(&Packet { len, ..packet })?;
    }
    Ok(rig)
}
