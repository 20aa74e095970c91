//! Queue pairs that the driver does without, as it may with any but the first (virtio 1.2, 5.1.5).

use alloc::format;
use alloc::vec::Vec;

use smoltcp::time::Duration;

use super::rig::{Bench, RING, Rig};
use super::{Failure, Runner};
use crate::cpu;
use crate::memory::{PAGE, Shared};
use crate::virtio::device::status::NEEDS_RESET;
use crate::virtio::net::{Config, RX, TX, feature, go, negotiate};
use crate::virtio::ring::{Descriptor, Ring, WRITE};

const OK: u8 = 0;
const ERR: u8 = 1;
/// The command that sets how many pairs take frames (5.1.6.5.5), without the number.
const PAIRS_SET: [u8; 2] = [4, 0];
/// How long the device may take for a command.
const PATIENCE: Duration = Duration::from_millis(200);

/// Runs them, where the NIC has several pairs.
pub fn run(runner: &mut Runner<'_>) {
    if runner.bench.nic.offered() & feature::MQ == 0 {
        return;
    }
    runner.attack("pairs-fewer", fewer);
    runner.attack("pairs-with-a-gap", |bench| {
        let others = [4, 5].map(|queue| Ring::new(queue, RING));
        works(bench, &others, &[(2, ERR), (3, ERR), (1, OK)])
    });
    for queue in [RX, TX, 2, 3] {
        runner.attack(&format!("pairs-half-{queue}"), |bench| half(bench, queue));
    }
}

/// The first only, and the first two.
fn fewer(bench: &Bench) -> Result<(), Failure> {
    let all = Config::read(bench.nic).pairs;
    works(bench, &[], &[(2, ERR), (all, ERR), (0, ERR), (1, OK)])?;
    let others = [2, 3].map(|queue| Ring::new(queue, RING));
    works(bench, &others, &[(2, OK), (3, ERR), (all, ERR), (1, OK)])
}

/// Starts the NIC with the first pair, these other queues and the control queue, and says how many
/// pairs are to take frames. The NIC must answer each time as expected, and move frames.
fn works(bench: &Bench, others: &[Ring], commands: &[(u16, u8)]) -> Result<(), Failure> {
    let mut control = Control::new(bench);
    negotiate(bench.nic, feature::PLAIN | feature::CTRL_VQ | feature::MQ)?;
    let first = [RX, TX].map(|queue| Ring::new(queue, RING));
    for ring in first.iter().chain(others).chain([&control.ring]) {
        ring.enable(bench.nic);
    }
    let [rx, tx] = first;
    let mut rig = Rig::run(bench, rx, tx);
    if bench.nic.status() & NEEDS_RESET != 0 {
        return Err("it does not start".into());
    }
    for &(pairs, expected) in commands {
        let answer = control.set_pairs(bench, pairs);
        if answer != Some(expected) {
            return Err(format!("{pairs} pairs: {answer:?} instead of {expected}"));
        }
    }
    rig.offer_buffers();
    if !rig.arp() {
        return Err("no answer to ARP".into());
    }
    Ok(())
}

/// One queue of a pair without the other: there is no use in it, and the NIC must say so.
fn half(bench: &Bench, missing: u16) -> Result<(), Failure> {
    negotiate(bench.nic, feature::PLAIN | feature::CTRL_VQ | feature::MQ)?;
    let queues = (0..4).filter(|&queue| queue != missing);
    let rings: Vec<_> = queues.map(|queue| Ring::new(queue, RING)).collect();
    rings.iter().for_each(|ring| ring.enable(bench.nic));
    go(bench.nic);
    let status = bench.nic.status();
    bench.nic.reset();
    match status & NEEDS_RESET {
        0 => Err(format!("it starts without queue {missing}")),
        _ => Ok(()),
    }
}

/// The control queue.
struct Control {
    ring: Ring,
    command: Shared,
}

impl Control {
    /// It comes after those of all pairs that the device has (5.1.2).
    fn new(bench: &Bench) -> Self {
        Self {
            ring: Ring::new(2 * Config::read(bench.nic).pairs, RING),
            command: Shared::new(PAGE),
        }
    }

    /// Says how many pairs take frames, and returns the answer.
    fn set_pairs(&mut self, bench: &Bench, pairs: u16) -> Option<u8> {
        const ANSWER: usize = 8;
        self.command.put(0, &PAIRS_SET);
        self.command.write(2, pairs);
        self.command.write(ANSWER, 0xff_u8);
        let at = self.command.address();
        let answer = Descriptor::new(at + ANSWER as u64, 1, WRITE);
        self.ring.describe(0, Descriptor::new(at, 4, 0).then(1));
        self.ring.describe(1, answer);
        self.ring.offer(0);
        bench.nic.notify(self.ring.queue);
        let end = cpu::now() + PATIENCE;
        while cpu::now() < end {
            if self.ring.take().is_some() {
                return Some(self.command.read(ANSWER));
            }
        }
        None
    }
}
