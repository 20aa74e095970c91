//! What the thread of a queue does.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::counters::SharedCounters;
use super::engine::Engine;
use super::queue::{BlkQueue, Stop};
use crate::lock;
use crate::virtio::Interrupt;
use crate::virtio::worker::{Job, Turn};

/// Requests that one turn carries out.
const BUDGET: usize = 64;

/// Turns in a row, at most, of which others see nothing: some milliseconds.
const UNPUBLISHED: u8 = 16;

/// How long a driver's answer is waited for: about what it takes to wake a thread.
const LINGER: Duration = Duration::from_micros(10);

const KICK: u32 = 0;
const DONE: u32 = 1;

/// Whether drivers have been worth waiting for.
#[derive(Debug, Default)]
struct Patience {
    /// How often not to wait.
    skipped: u8,
    /// As much as it was after the last time in vain.
    penalty: u8,
}

impl Patience {
    fn is_left(&mut self) -> bool {
        let is_left = self.skipped == 0;
        self.skipped = self.skipped.saturating_sub(1);
        is_left
    }

    /// Something came, or did not: then it is waited for half as often.
    fn learn(&mut self, came: bool) {
        self.penalty = match came {
            true => 0,
            false => self.penalty.saturating_mul(2).max(1),
        };
        self.skipped = self.penalty;
    }
}

/// One queue and what it knows of itself.
#[derive(Debug)]
pub(super) struct BlkJob {
    queue: BlkQueue,
    index: u16,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    ready: bool,
    patience: Patience,
    /// Why the last turn has ended.
    stop: Stop,
    published: SharedCounters,
    /// Turns since they were published.
    unpublished: u8,
}

impl BlkJob {
    /// The queue with this index, whose driver signals `kick`. It publishes its counters, and counts
    /// on from what it finds there.
    pub fn new(
        mut queue: BlkQueue,
        index: u16,
        kick: Arc<EventFd>,
        interrupt: Arc<dyn Interrupt>,
        published: SharedCounters,
    ) -> Self {
        queue.counters = *lock(&published);
        Self {
            queue,
            index,
            kick,
            interrupt,
            ready: true,
            patience: Patience::default(),
            stop: Stop::Budget,
            published,
            unpublished: 0,
        }
    }

    /// Ends. Returns where the queue stands, and the engine.
    pub fn park(self) -> (u16, Option<Box<dyn Engine>>) {
        let Self {
            queue, published, ..
        } = self;
        queue.park(&published)
    }

    /// Before the thread sleeps: whether there is something to do after all. A driver that is there
    /// answers at once to what it is given, and to wait for that takes less than to sleep and to be
    /// woken, for both.
    fn has_more(&mut self) -> bool {
        if self.queue.has_used() && self.patience.is_left() {
            let came = self.queue.linger(LINGER);
            self.patience.learn(came);
            if came {
                return true;
            }
        }
        self.queue.ask_to_notify()
    }

    fn limited_until(&self) -> Option<Instant> {
        match self.stop {
            Stop::Limited(until) => Some(until),
            _ => None,
        }
    }
}

impl Job for BlkJob {
    fn wakeups(&self) -> Vec<(RawFd, u32, EventSet)> {
        // A notification is an edge: its eventfd is never read.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let done = self.queue.event().map(|event| (event, DONE, edge));
        let kick = (self.kick.as_raw_fd(), KICK, edge);
        std::iter::once(kick).chain(done).collect()
    }

    fn wake(&mut self, token: u32, _events: EventSet) {
        if token == KICK {
            self.queue.counters.kicks += 1;
        }
        // A turn takes what is done, whether or not it may begin with something else.
        self.ready |= token == DONE || self.stop == Stop::Idle;
    }

    fn timeout(&mut self) {
        let now = Instant::now();
        self.ready |= self.limited_until().is_some_and(|until| until <= now);
    }

    fn turn(&mut self) -> Turn {
        if std::mem::take(&mut self.ready) {
            let (stop, notify) = self.queue.handle(BUDGET);
            if notify {
                self.queue.counters.interrupts += 1;
                self.interrupt.queue(self.index);
            }
            self.stop = stop;
            self.ready = match stop {
                Stop::Budget => true,
                Stop::Idle => self.has_more(),
                Stop::Full | Stop::Limited(_) => false,
                Stop::Broken => {
                    log::debug!(
                        "block device: queue {} has an invalid avail index",
                        self.index
                    );
                    self.interrupt.needs_reset();
                    false
                }
            };
        }
        self.queue.counters.wakeups += u64::from(!self.ready);
        self.unpublished += 1;
        // A turn that has used its budget, or its time, was a long one.
        if self.stop == Stop::Budget || !self.ready || self.unpublished >= UNPUBLISHED {
            *lock(&self.published) = self.queue.counters;
            self.unpublished = 0;
        }
        Turn {
            more: self.ready,
            wake_at: self.limited_until(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_halves_each_time_in_vain_and_comes_back_at_once() {
        let mut patience = Patience::default();
        let mut waits = |came: bool, turns: u32| {
            let mut waited = 0;
            for _ in 0..turns {
                if patience.is_left() {
                    patience.learn(came);
                    waited += 1;
                }
            }
            waited
        };
        assert_eq!(waits(true, 100), 100);
        // After 0, 2, 5, 10, 19, 36 and 69 turns.
        assert_eq!(waits(false, 100), 7);
        assert_eq!(waits(false, 100_000), 391);
        assert!(waits(true, 256) > 0);
        assert_eq!(waits(true, 100), 100);
    }
}
