//! What the thread of a queue pair does: maps what became ready to the queue that has work.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::backend::Backend;
use super::counters::{self, PairCounters, SharedCounters};
use super::pace::{Pace, Passed};
use super::rx::RxQueue;
use super::tx::TxQueue;
use crate::lock;
use crate::virtio::Interrupt;
use crate::virtio::worker::{Job, Turn};

/// Frames that one queue may move before the other has its turn.
const BUDGET: usize = 64;

/// Turns in a row, at most, of which others see nothing: some milliseconds.
const UNPUBLISHED: u8 = 16;

/// When a ring that was found empty is looked at again.
const LOOK_AGAIN: Duration = Duration::from_micros(200);

const BACKEND: u32 = 0;
const RX_KICK: u32 = 1;
const TX_KICK: u32 = 2;

/// Why a queue's turn has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The driver has nothing to send, which it will notify of, or the backend no frame, and will poll
    /// readable.
    Idle,
    /// There is nothing, but it is looked at again then: the timer ends this, or the driver's
    /// notification.
    Paused(Instant),
    /// The backend has no room; it will poll writable.
    Full,
    /// The driver has no receive buffers, and was not asked to notify: it has to be looked at again.
    Empty,
    /// The driver has no receive buffers: only its notification ends this.
    Starved,
    /// The rate limit lets nothing pass until then: only the timer ends this.
    Limited(Instant),
    /// The budget is used up.
    Budget,
    /// The avail index is invalid: only a reset ends this.
    Broken,
}

/// Whether a queue has work.
#[derive(Clone, Copy, Debug)]
struct Work {
    ready: bool,
    /// Why its last turn has ended.
    stop: Stop,
}

impl Work {
    /// Something happened that is work for a queue, unless one thing alone ends what holds it. Whether
    /// it was that, `ends` says.
    fn wake(&mut self, ends: impl FnOnce(Stop) -> bool) {
        let is_held = self.until().is_some() || matches!(self.stop, Stop::Starved | Stop::Broken);
        self.ready |= !is_held || ends(self.stop);
    }

    /// When the timer ends what holds it.
    fn until(&self) -> Option<Instant> {
        match self.stop {
            Stop::Limited(until) | Stop::Paused(until) => Some(until),
            _ => None,
        }
    }

    fn take(&mut self) -> bool {
        std::mem::take(&mut self.ready)
    }

    fn end_turn(&mut self, stop: Stop) {
        self.ready = stop == Stop::Budget;
        self.stop = stop;
    }
}

/// One queue pair and what it knows of itself.
#[derive(Debug)]
pub struct Pair<B> {
    backend: Arc<B>,
    rx: RxQueue,
    tx: TxQueue,
    /// The driver has made receive buffers available, and frames.
    kicks: [Arc<EventFd>; 2],
    interrupt: Arc<dyn Interrupt>,
    /// Which pair this is: its queues are 2n and 2n + 1 (virtio 1.2, 5.1.2).
    index: u16,
    rx_work: Work,
    tx_work: Work,
    pace: Pace,
    /// How the backend's events are waited for.
    trigger: EventSet,
    counters: PairCounters,
    published: SharedCounters,
    /// Turns since they were published.
    unpublished: u8,
}

impl<B: Backend> Pair<B> {
    /// The pair with this index, whose driver signals `kicks` (the receive queue's first). It
    /// publishes its counters, and counts on from what it finds there.
    pub fn new(
        backend: Arc<B>,
        (mut rx, mut tx): (RxQueue, TxQueue),
        kicks: [Arc<EventFd>; 2],
        interrupt: Arc<dyn Interrupt>,
        index: u16,
        published: SharedCounters,
    ) -> Self {
        let ready = Work {
            ready: true,
            stop: Stop::Budget,
        };
        let counters = counters::read(&published);
        (rx.counters, tx.counters) = (counters.rx, counters.tx);
        let pace = Pace::new(Instant::now(), passed(&rx, &tx));
        Self {
            backend,
            rx,
            tx,
            kicks,
            interrupt,
            index,
            rx_work: ready,
            tx_work: ready,
            pace,
            trigger: EventSet::empty(),
            counters,
            published,
            unpublished: 0,
        }
    }

    fn send(&mut self) {
        let (stop, notify) = self.tx.send(self.backend.as_ref(), BUDGET);
        if notify {
            self.counters.tx_interrupts += 1;
            self.interrupt.queue(2 * self.index + 1);
        }
        self.tx_work.end_turn(stop);
        self.after(stop, "transmit");
    }

    fn receive(&mut self) {
        let (stop, notify) = self.rx.receive(self.backend.as_ref(), BUDGET);
        if notify {
            self.counters.rx_interrupts += 1;
            self.interrupt.queue(2 * self.index);
        }
        let stop = self.pause(stop);
        self.rx_work.end_turn(stop);
        self.after(stop, "receive");
    }

    /// What becomes of a turn of the receive queue that ended so.
    fn pause(&mut self, stop: Stop) -> Stop {
        let now = Instant::now();
        match stop {
            Stop::Empty => Stop::Paused(now + LOOK_AGAIN),
            Stop::Idle => {
                let passed = passed(&self.rx, &self.tx);
                let pause = self.pace.pause(now, passed, self.rx.size());
                pause.map_or(stop, |pause| Stop::Paused(now + pause))
            }
            stop => stop,
        }
    }

    fn after(&mut self, stop: Stop, queue: &str) {
        if stop != Stop::Broken {
            return;
        }
        // Nothing moves until the driver resets the device.
        log::debug!("network device: the {queue} queue has an invalid avail index");
        self.rx_work.end_turn(stop);
        self.tx_work.end_turn(stop);
        self.interrupt.needs_reset();
    }
}

impl<B: Backend> Job for Pair<B> {
    fn wakeups(&self) -> Vec<(RawFd, u32, EventSet)> {
        // A notification is an edge: its eventfd is never read.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let [rx_kick, tx_kick] = &self.kicks;
        let kicks = [
            (rx_kick.as_raw_fd(), RX_KICK, edge),
            (tx_kick.as_raw_fd(), TX_KICK, edge),
        ];
        kicks.into_iter().chain(self.varying()).collect()
    }

    /// The backend: while the driver has no buffers, say, frames that wait must not wake the thread
    /// again and again.
    fn varying(&self) -> Option<(RawFd, u32, EventSet)> {
        let mut events = EventSet::empty();
        events.set(EventSet::IN, self.rx_work.stop == Stop::Idle);
        events.set(EventSet::OUT, self.tx_work.stop == Stop::Full);
        Some((self.backend.as_raw_fd(), BACKEND, events | self.trigger))
    }

    fn wake(&mut self, token: u32, events: EventSet) {
        match token {
            BACKEND => {
                // A tap whose interface is gone has an error for ever.
                if events.intersects(EventSet::ERROR | EventSet::HANG_UP) {
                    self.trigger = EventSet::EDGE_TRIGGERED;
                }
                if events.contains(EventSet::IN) {
                    self.rx_work.wake(|_| false);
                }
                if events.contains(EventSet::OUT) {
                    self.tx_work.wake(|_| false);
                }
            }
            RX_KICK => {
                self.counters.rx_kicks += 1;
                self.rx_work
                    .wake(|held| matches!(held, Stop::Starved | Stop::Paused(_)));
            }
            TX_KICK => {
                self.counters.tx_kicks += 1;
                self.tx_work.wake(|_| false);
            }
            _ => {}
        }
    }

    fn timeout(&mut self) {
        let now = Instant::now();
        for work in [&mut self.rx_work, &mut self.tx_work] {
            work.ready |= work.until().is_some_and(|until| until <= now);
        }
    }

    fn turn(&mut self) -> Turn {
        if self.tx_work.take() {
            self.send();
        }
        if self.rx_work.take() {
            self.receive();
        }
        let more = self.tx_work.ready || self.rx_work.ready;
        self.counters.wakeups += u64::from(!more);
        self.unpublished += 1;
        if !more || self.unpublished >= UNPUBLISHED {
            self.publish();
        }
        let until = [self.rx_work.until(), self.tx_work.until()];
        Turn {
            more,
            wake_at: until.into_iter().flatten().min(),
        }
    }
}

impl<B> Pair<B> {
    /// Ends. Returns where the two queues stand, and a received frame that waits for more buffers.
    pub fn park(mut self) -> ([u16; 2], Option<Vec<u8>>) {
        self.publish();
        let (rx, frame) = self.rx.park();
        ([rx, self.tx.next_avail()], frame)
    }

    fn publish(&mut self) {
        self.counters.rx = self.rx.counters;
        self.counters.tx = self.tx.counters;
        *lock(&self.published) = self.counters;
        self.unpublished = 0;
    }
}

fn passed(rx: &RxQueue, tx: &TxQueue) -> Passed {
    Passed {
        received: rx.counters.frames,
        chains: rx.counters.chains,
        sent: tx.counters.frames,
    }
}
