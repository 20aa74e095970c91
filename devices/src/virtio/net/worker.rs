//! The thread of a queue pair: maps what became ready to the queue that has work.

use std::io;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::backend::Backend;
use super::counters::{self, PairCounters, SharedCounters};
use super::rx::{RxQueue, RxStop};
use super::tx::{TxQueue, TxStop};
use crate::virtio::Interrupt;

/// Frames that one queue may move before the other has its turn.
const BUDGET: usize = 256;

/// The eventfds that wake the worker.
#[derive(Debug)]
pub struct Wakeups {
    /// The driver has made receive buffers available.
    pub rx_kick: Arc<EventFd>,
    /// The driver has made frames available.
    pub tx_kick: Arc<EventFd>,
    /// The device is being reset.
    pub stop: EventFd,
}

const BACKEND: u32 = 0;
const RX_KICK: u32 = 1;
const TX_KICK: u32 = 2;
const STOP: u32 = 3;
const TIMER: u32 = 4;

/// Runs a thread that lives by events: `turn` does what is ready and says whether there is more to
/// do at once, or `None` when it is over.
///
/// # Errors
///
/// Fails when the process has no file descriptor left for the epoll instance.
pub(super) fn run<S: MutEventSubscriber>(
    subscriber: S,
    mut turn: impl FnMut(&mut S) -> Option<bool>,
) -> io::Result<()> {
    let failed = |error| io::Error::other(format!("event loop of the network device: {error}"));
    let mut events = EventManager::<S>::new().map_err(failed)?;
    let id = events.add_subscriber(subscriber);
    loop {
        let Some(more) = turn(events.subscriber_mut(id).map_err(failed)?) else {
            return Ok(());
        };
        // With work left, only look at what else became ready.
        match events.run_with_timeout(if more { 0 } else { -1 }) {
            Ok(_) => {}
            Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EINTR => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Why a queue does not look for work although there may be some.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Hold {
    #[default]
    None,
    /// The driver has no receive buffers: only its kick ends this.
    Starved,
    /// The rate limit: only the timer ends this.
    Limited,
    /// The avail index is invalid: only a reset ends this.
    Broken,
}

/// Whether a queue has work.
#[derive(Clone, Copy, Debug)]
struct Work {
    ready: bool,
    hold: Hold,
}

impl Work {
    /// Something happened that ends `hold`, if that is what the queue waits for.
    fn wake(&mut self, hold: Hold) {
        if self.hold == hold {
            self.hold = Hold::None;
        }
        self.ready |= self.hold == Hold::None;
    }

    fn take(&mut self) -> bool {
        std::mem::take(&mut self.ready)
    }

    fn hold(&mut self, hold: Hold) {
        *self = Self { ready: false, hold };
    }
}

/// One queue pair and what it knows of itself.
#[derive(Debug)]
pub struct Worker<B> {
    backend: Arc<B>,
    rx: RxQueue,
    tx: TxQueue,
    wakeups: Wakeups,
    interrupt: Arc<dyn Interrupt>,
    /// Which pair this is: its queues are 2n and 2n + 1 (virtio 1.2, 5.1.2).
    pair: u16,
    rx_work: Work,
    tx_work: Work,
    /// Runs while a rate limit holds a queue, until the moment beside it.
    timer: TimerFd,
    wakes_at: Option<Instant>,
    stopped: bool,
    counters: PairCounters,
    published: SharedCounters,
}

impl<B: Backend> Worker<B> {
    /// A pair that has not started yet. It publishes its counters, and counts on from what it
    /// finds there.
    ///
    /// # Errors
    ///
    /// Fails when the process has no file descriptor left.
    pub fn new(
        backend: Arc<B>,
        (rx, tx): (RxQueue, TxQueue),
        wakeups: Wakeups,
        interrupt: Arc<dyn Interrupt>,
        pair: u16,
        published: SharedCounters,
    ) -> io::Result<Self> {
        // Both start as ready: the driver may have kicked before there was a worker.
        let ready = Work {
            ready: true,
            hold: Hold::None,
        };
        let counters = counters::read(&published);
        Ok(Self {
            backend,
            rx: rx.counting_from(counters.rx),
            tx: tx.counting_from(counters.tx),
            wakeups,
            interrupt,
            pair,
            rx_work: ready,
            tx_work: ready,
            timer: TimerFd::new()?,
            wakes_at: None,
            stopped: false,
            counters,
            published,
        })
    }

    /// Moves frames until it is stopped.
    ///
    /// # Errors
    ///
    /// Fails when the process has no file descriptor left for the epoll instance.
    pub fn run(self) -> io::Result<()> {
        run(self, |worker| {
            if !worker.stopped {
                worker.turn();
            }
            let more = worker.rx_work.ready || worker.tx_work.ready;
            if !more || worker.stopped {
                worker.counters.wakeups += 1;
                worker.publish();
            }
            (!worker.stopped).then_some(more)
        })
    }

    fn publish(&mut self) {
        self.counters.rx = self.rx.counters();
        self.counters.tx = self.tx.counters();
        *self
            .published
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = self.counters;
    }

    /// Gives each queue that is ready one turn.
    fn turn(&mut self) {
        if self.tx_work.take() {
            let (stop, interrupt) = self.tx.send(self.backend.as_ref(), BUDGET);
            if interrupt {
                self.counters.tx_interrupts += 1;
                self.interrupt.queue(2 * self.pair + 1);
            }
            match stop {
                TxStop::Budget => self.tx_work.ready = true,
                TxStop::Limited(wait) => {
                    self.tx_work.hold(Hold::Limited);
                    self.wake_after(wait);
                }
                TxStop::Broken => self.give_up("transmit"),
                TxStop::Empty | TxStop::Full => {}
            }
        }
        if self.rx_work.take() {
            let (stop, interrupt) = self.rx.receive(self.backend.as_ref(), BUDGET);
            if interrupt {
                self.counters.rx_interrupts += 1;
                self.interrupt.queue(2 * self.pair);
            }
            match stop {
                RxStop::Budget => self.rx_work.ready = true,
                RxStop::Limited(wait) => {
                    self.rx_work.hold(Hold::Limited);
                    self.wake_after(wait);
                }
                RxStop::Starved => self.rx_work.hold(Hold::Starved),
                RxStop::Broken => self.give_up("receive"),
                RxStop::Idle => {}
            }
        }
    }

    /// Sets the timer, unless it ends sooner.
    fn wake_after(&mut self, wait: Duration) {
        let at = Instant::now() + wait;
        if self.wakes_at.is_none_or(|earlier| at < earlier) {
            self.wakes_at = Some(at);
            if let Err(error) = self.timer.reset(wait, None) {
                log::error!("network device: cannot set a timer: {error}");
                self.interrupt.needs_reset();
            }
        }
    }

    /// A ring has an invalid avail index: nothing moves until the driver resets the device.
    fn give_up(&mut self, queue: &str) {
        log::debug!("network device: the {queue} queue's available index is impossible");
        self.rx_work.hold(Hold::Broken);
        self.tx_work.hold(Hold::Broken);
        self.interrupt.needs_reset();
    }
}

impl<B: Backend> MutEventSubscriber for Worker<B> {
    fn init(&mut self, ops: &mut EventOps) {
        // The backend is edge-triggered: while the driver has no buffers (or the tap no room),
        // frames that wait must not wake the thread again and again.
        let backend = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let all = [
            Events::with_data(self.backend.as_ref(), BACKEND, backend),
            Events::with_data(self.wakeups.rx_kick.as_ref(), RX_KICK, EventSet::IN),
            Events::with_data(self.wakeups.tx_kick.as_ref(), TX_KICK, EventSet::IN),
            Events::with_data(&self.wakeups.stop, STOP, EventSet::IN),
            Events::with_data(&self.timer, TIMER, EventSet::IN),
        ];
        for events in all {
            if let Err(error) = ops.add(events) {
                log::error!("network device: cannot watch a file descriptor: {error}");
                self.interrupt.needs_reset();
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            BACKEND => {
                if events.event_set().contains(EventSet::IN) {
                    self.rx_work.wake(Hold::None);
                }
                if events.event_set().contains(EventSet::OUT) {
                    self.tx_work.wake(Hold::None);
                }
            }
            RX_KICK if self.wakeups.rx_kick.read().is_ok() => {
                self.counters.rx_kicks += 1;
                self.rx_work.wake(Hold::Starved);
            }
            TX_KICK if self.wakeups.tx_kick.read().is_ok() => {
                self.counters.tx_kicks += 1;
                self.tx_work.wake(Hold::None);
            }
            TIMER => {
                let _ = self.timer.wait();
                self.wakes_at = None;
                self.rx_work.wake(Hold::Limited);
                self.tx_work.wake(Hold::Limited);
            }
            STOP => self.stopped = true,
            _ => {}
        }
    }
}
