//! What the thread of a queue does.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

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

const KICK: u32 = 0;
const DONE: u32 = 1;

/// One queue and what it knows of itself.
#[derive(Debug)]
pub(super) struct BlkJob {
    queue: BlkQueue,
    index: u16,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    ready: bool,
    /// Some request is done that did not end at once.
    done: bool,
    /// Why the last turn has ended.
    stop: Stop,
    published: SharedCounters,
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
            done: false,
            stop: Stop::Budget,
            published,
        }
    }

    /// Ends. Returns where the queue stands, and the engine.
    pub fn park(self) -> (u16, Option<Box<dyn Engine>>) {
        let Self {
            queue, published, ..
        } = self;
        queue.park(&published)
    }

    fn notify(&mut self, notify: bool) {
        if notify {
            self.queue.counters.interrupts += 1;
            self.interrupt.queue(self.index);
        }
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
        if token == DONE {
            self.done = true;
            self.ready |= self.stop == Stop::Full;
        } else {
            self.queue.counters.kicks += 1;
            self.ready |= !matches!(self.stop, Stop::Full | Stop::Limited(_) | Stop::Broken);
        }
    }

    fn timeout(&mut self) {
        let now = Instant::now();
        self.ready |= self.limited_until().is_some_and(|until| until <= now);
    }

    fn turn(&mut self) -> Turn {
        let done = std::mem::take(&mut self.done);
        if std::mem::take(&mut self.ready) {
            let (stop, notify) = self.queue.handle(BUDGET);
            self.notify(notify);
            self.ready = stop == Stop::Budget;
            self.stop = stop;
            if stop == Stop::Broken {
                log::debug!(
                    "block device: queue {} has an invalid avail index",
                    self.index
                );
                self.interrupt.needs_reset();
            }
        } else if done {
            let notify = self.queue.finish_turn();
            self.notify(notify);
        }
        if !self.ready {
            self.queue.counters.wakeups += 1;
            *lock(&self.published) = self.queue.counters;
        }
        Turn {
            more: self.ready,
            wake_at: self.limited_until(),
        }
    }
}
