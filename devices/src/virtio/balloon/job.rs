//! What the balloon's thread does: it takes what the driver gives back.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::config::ConfigSpace;
use super::ranges::{GiveBack, Ranges};
use super::{PAGE_POISON, QUEUE_SIZES, REPORTING};
use crate::virtio::iovec::gather;
use crate::virtio::queue::{Buffers, Chain, Next, Queue};
use crate::virtio::worker::{Job, Turn};
use crate::virtio::{Activation, ActiveQueue, Complaints, Interrupt};

/// Pages that one chain may put into the balloon; what it has beyond them stays in memory. Linux
/// sends 256.
const MAX_PAGES: usize = 4096;
/// What one turn may cost: a chain, a call of the kernel or a [`UNIT`] costs one.
const BUDGET: usize = 64;
/// Bytes that take the kernel some 0.1 ms.
const UNIT: usize = 2 << 20;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// Pages go into the balloon: their numbers, 32 bits each, for the device to read.
    Inflate,
    /// Pages leave it. The driver may use them already, and they come as they are touched.
    Deflate,
    /// Free pages: the chain's buffers are these themselves.
    Report,
}

#[derive(Debug)]
struct Line {
    purpose: Purpose,
    index: u16,
    queue: Queue,
    kick: Arc<EventFd>,
    /// There may be chains.
    ready: bool,
}

/// A chain that is being worked on: the last that its queue gave.
#[derive(Debug)]
struct Pending {
    line: usize,
    head: u16,
    ranges: Ranges,
}

/// The work of the device's thread.
#[derive(Debug)]
pub struct BalloonJob {
    lines: Vec<Line>,
    pending: Option<Pending>,
    buffers: Buffers,
    memory: Arc<GuestMemoryMmap>,
    give_back: GiveBack,
    config: Arc<ConfigSpace>,
    /// Reported pages have to keep what the driver has said.
    poisons: bool,
    interrupt: Arc<dyn Interrupt>,
    broken: bool,
    complaints: Complaints,
}

impl BalloonJob {
    /// Takes the queues of a driver that is ready.
    ///
    /// # Errors
    ///
    /// Refuses a driver without one of the queues that it needs.
    pub fn new(activation: Activation, config: Arc<ConfigSpace>) -> Result<Self, &'static str> {
        let Activation {
            memory,
            features,
            mut queues,
            interrupt,
            ..
        } = activation;
        queues.resize_with(QUEUE_SIZES.len(), || None);
        let mut lines = Vec::new();
        let mut add = |purpose, index: usize, queue: ActiveQueue| {
            lines.push(Line {
                purpose,
                index: index as u16,
                queue: queue.queue,
                kick: queue.kick,
                ready: true,
            });
        };
        for (index, purpose) in [Purpose::Inflate, Purpose::Deflate].into_iter().enumerate() {
            let queue = queues[index].take();
            add(purpose, index, queue.ok_or("the driver lacks a queue")?);
        }
        if features & REPORTING != 0 {
            // The queue 4 (5.5.2); but Linux before 6.11 counts none that belong to other features.
            let first = (2..queues.len()).find(|&index| queues[index].is_some());
            let index = first.ok_or("the driver lacks the queue to report free pages by")?;
            if let Some(queue) = queues[index].take() {
                add(Purpose::Report, index, queue);
            }
        }
        Ok(Self {
            lines,
            pending: None,
            buffers: Buffers::default(),
            give_back: GiveBack::of(&memory),
            memory,
            config,
            poisons: features & PAGE_POISON != 0,
            interrupt,
            broken: false,
            complaints: Complaints::default(),
        })
    }

    /// Where the queues stand, each with its index. A chain that is not done yet is popped again.
    pub fn park(mut self) -> Vec<(u16, u16)> {
        if let Some(pending) = self.pending {
            self.lines[pending.line].queue.undo_pop();
        }
        let positions = self.lines.iter();
        positions
            .map(|line| (line.index, line.queue.next_avail()))
            .collect()
    }

    /// Does a part of the work, and returns what it cost; nothing where there is no more.
    fn step(&mut self, budget: usize) -> Option<usize> {
        if let Some(pending) = &mut self.pending {
            let cost = match pending.ranges.take(budget * UNIT) {
                Some(piece) => {
                    self.release(&piece);
                    1 + piece.iov_len / UNIT
                }
                None => 0,
            };
            return Some(self.finish(cost));
        }
        let line = self.lines.iter().position(|line| line.ready)?;
        self.buffers.clear();
        let queue = &mut self.lines[line].queue;
        match queue.pop(&mut self.buffers) {
            Next::Chain(chain) => {
                let ranges = self.ranges(self.lines[line].purpose, &chain);
                self.pending = Some(Pending {
                    line,
                    head: chain.head,
                    ranges,
                });
            }
            Next::Empty => self.lines[line].ready = queue.enable_notification(),
            Next::Bad => {}
            Next::Broken => {
                self.broken = true;
                self.lines.iter_mut().for_each(|line| line.ready = false);
                self.interrupt.needs_reset();
            }
        }
        Some(1)
    }

    /// Gives the chain back to the driver if all of it is done, and passes the cost on.
    fn finish(&mut self, cost: usize) -> usize {
        let done = |pending: &mut Pending| pending.ranges.is_empty();
        if let Some(Pending { line, head, .. }) = self.pending.take_if(done) {
            self.lines[line].queue.add_used(head, 0);
        }
        cost
    }

    /// What a chain gives back.
    fn ranges(&self, purpose: Purpose, chain: &Chain) -> Ranges {
        match purpose {
            Purpose::Inflate => {
                let mut numbers = vec![0; chain.readable.len.min(4 * MAX_PAGES)];
                // SAFETY: the iovecs are those of a chain that `Queue::pop` resolved inside guest
                // memory, which the queue keeps mapped.
                unsafe { gather(&self.buffers.readable, 0, &mut numbers) };
                let (numbers, _) = numbers.as_chunks();
                let numbers = numbers.iter().map(|&number| u32::from_le_bytes(number));
                Ranges::of_pages(&self.memory, numbers)
            }
            // Zeros would be wrong there.
            Purpose::Report if self.poisons && self.config.poison() != 0 => Ranges::default(),
            Purpose::Report => Ranges::within(&self.buffers.writable),
            Purpose::Deflate => Ranges::default(),
        }
    }

    fn release(&self, piece: &libc::iovec) {
        // SAFETY: the piece was resolved inside guest memory, which `self.memory` and the queues keep
        // mapped and to which there is no reference; the driver has said that it needs nothing
        // of it, and harms none but itself where that is not true.
        if let Err(error) = unsafe { self.give_back.release(piece) }
            && self.complaints.may_warn()
        {
            log::warn!("the host does not take memory back that the guest does not use: {error}");
        }
    }
}

impl Job for BalloonJob {
    fn wakeups(&self) -> Vec<(RawFd, u32, EventSet)> {
        let kicks = (0..).zip(&self.lines);
        kicks
            .map(|(token, line)| (line.kick.as_raw_fd(), token, EventSet::IN))
            .collect()
    }

    fn wake(&mut self, token: u32, _events: EventSet) {
        let line = &mut self.lines[token as usize];
        line.ready |= line.kick.read().is_ok() && !self.broken;
    }

    fn turn(&mut self) -> Turn {
        let mut left = BUDGET;
        while left > 0
            && let Some(cost) = self.step(left)
        {
            left = left.saturating_sub(cost);
        }
        for line in &mut self.lines {
            if line.queue.needs_notification() {
                self.interrupt.queue(line.index);
            }
        }
        Turn {
            more: self.pending.is_some() || self.lines.iter().any(|line| line.ready),
            wake_at: None,
        }
    }
}
