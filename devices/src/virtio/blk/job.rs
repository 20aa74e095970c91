//! What the thread of a queue does.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::counters::SharedCounters;
use super::queue::{BlkQueue, Stop};
use crate::lock;
use crate::virtio::Interrupt;
use crate::virtio::worker::{Job, Turn};

/// Requests that one turn carries out.
const BUDGET: usize = 64;

const KICK: u32 = 0;

/// One queue and what it knows of itself.
#[derive(Debug)]
pub(super) struct BlkJob {
    queue: BlkQueue,
    index: u16,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    ready: bool,
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
            stop: Stop::Budget,
            published,
        }
    }

    /// Ends. Returns where the queue stands.
    pub fn park(self) -> u16 {
        self.publish();
        self.queue.next_avail()
    }

    fn publish(&self) {
        *lock(&self.published) = self.queue.counters;
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
        vec![(self.kick.as_raw_fd(), KICK, edge)]
    }

    fn wake(&mut self, _token: u32, _events: EventSet) {
        self.queue.counters.kicks += 1;
        self.ready |= !matches!(self.stop, Stop::Limited(_) | Stop::Broken);
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
            self.ready = stop == Stop::Budget;
            self.stop = stop;
            if stop == Stop::Broken {
                log::debug!(
                    "block device: queue {} has an invalid avail index",
                    self.index
                );
                self.interrupt.needs_reset();
            }
        }
        if !self.ready {
            self.queue.counters.wakeups += 1;
            self.publish();
        }
        Turn {
            more: self.ready,
            wake_at: self.limited_until(),
        }
    }
}
