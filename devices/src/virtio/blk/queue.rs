//! A queue of requests: from chains to requests, and back when they are done.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::counters::{BlkCounters, SharedCounters};
use super::disk::Disk;
use super::engine::Engine;
use super::pending::Pending;
use super::request::{Request, Status};
use crate::lock;
use crate::virtio::queue::{Next, Queue};

/// Requests that are used together: the driver's processor then loses its copy of the index less
/// often.
const BATCH: u16 = 16;
/// How often the ring is looked at between two looks at the clock.
const LOOKS: u32 = 16;
/// How long the first requests of a turn may wait for others that the image takes time for.
const SLICE: Duration = Duration::from_micros(100);

/// Bytes that cost a turn as much as another request.
const TURN_UNIT: u64 = 64 << 10;

/// Why a queue's turn has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The driver has no more requests, and will notify of the next one.
    Idle,
    /// As many requests as may be are under way.
    Full,
    /// The rate limit lets nothing pass until then: only the timer ends this.
    Limited(Instant),
    /// The budget is used up.
    Budget,
    /// The avail index is invalid: only a reset ends this.
    Broken,
}

/// A queue of a disk.
#[derive(Debug)]
pub struct BlkQueue {
    /// Whoever carries out what this thread would have to wait for; without, it waits. Dropped before
    /// the queue, which keeps guest memory mapped.
    engine: Option<Box<dyn Engine>>,
    queue: Queue,
    disk: Arc<Disk>,
    /// Some chain has been used in this turn.
    has_used: bool,
    /// Room for the next chains.
    spare: Vec<Pending>,
    /// What it has done so far.
    pub counters: BlkCounters,
}

impl BlkQueue {
    /// Does what `queue` asks of `disk`, all of it in the calling thread.
    pub fn new(queue: Queue, disk: Arc<Disk>) -> Self {
        Self {
            engine: None,
            queue,
            disk,
            has_used: false,
            spare: Vec::new(),
            counters: BlkCounters::default(),
        }
    }

    /// Leaves to `engine` what would take long.
    pub(super) fn with_engine(mut self, engine: Option<Box<dyn Engine>>) -> Self {
        self.engine = engine;
        self
    }

    /// What becomes readable when a request is done that did not end at once.
    pub(super) fn event(&self) -> Option<RawFd> {
        self.engine.as_ref().map(|engine| engine.event())
    }

    /// Waits for all that is under way, and shows it to the driver. Returns where the queue stands,
    /// and the engine.
    pub(super) fn park(mut self, counters: &SharedCounters) -> (u16, Option<Box<dyn Engine>>) {
        while let Some(engine) = &mut self.engine
            && engine.under_way() > 0
        {
            if let Err(error) = engine.submit().and_then(|()| engine.wait()) {
                log::error!("{}: requests are lost: {error}", self.disk.label());
                break;
            }
            self.collect();
        }
        self.queue.flush_used();
        *lock(counters) = self.counters;
        (self.queue.next_avail(), self.engine.take())
    }

    /// Takes what is done, and carries out up to `budget` requests; whatever else a driver can repeat
    /// for ever costs budget too. Says why it stopped, and whether to interrupt the driver. Before it
    /// may sleep, a queue that is [`Stop::Idle`] has to call [`BlkQueue::ask_to_notify`].
    pub fn handle(&mut self, budget: usize) -> (Stop, bool) {
        let mut turn = TurnLeft {
            budget,
            started: Instant::now(),
            is_first: true,
        };
        self.has_used = false;
        self.collect();
        self.queue.disable_notification();
        let mut stop = self.drain(&mut turn);
        if let Some(engine) = &mut self.engine
            && let Err(error) = engine.submit()
        {
            log::error!("{}: io_uring fails: {error}", self.disk.label());
            stop = Stop::Broken;
        }
        self.collect();
        self.queue.flush_used();
        (stop, self.queue.needs_notification())
    }

    /// Asks the driver to notify of its next request. True when there is one already, of which no
    /// notification may come.
    pub fn ask_to_notify(&mut self) -> bool {
        self.queue.enable_notification()
    }

    /// Looks for `time` whether the driver answers to what it was given in the last turn. True if there
    /// is something to do.
    pub(super) fn linger(&mut self, time: Duration) -> bool {
        let end = Instant::now() + time;
        loop {
            for _ in 0..LOOKS {
                if !self.queue.is_empty() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if Instant::now() >= end {
                return false;
            }
        }
    }

    /// Whether the driver was given anything in the last turn.
    pub(super) fn has_used(&self) -> bool {
        self.has_used
    }

    fn drain(&mut self, turn: &mut TurnLeft) -> Stop {
        while turn.budget > 0 {
            turn.budget -= 1;
            if let Some(until) = self.disk.limiter.held_until() {
                self.counters.limited += 1;
                return Stop::Limited(until);
            }
            if self
                .engine
                .as_ref()
                .is_some_and(|engine| !engine.has_room())
            {
                return Stop::Full;
            }
            let mut pending = self.spare.pop().unwrap_or_default();
            match pending.pop(&mut self.queue) {
                Next::Chain(_) => {}
                Next::Bad => {
                    self.counters.bad_chains += 1;
                    self.recycle(pending);
                    continue;
                }
                other => {
                    self.recycle(pending);
                    return match other {
                        Next::Empty => Stop::Idle,
                        _ => Stop::Broken,
                    };
                }
            }
            match self.parse(&mut pending) {
                Ok(()) => {
                    let parts = pending.moved() / TURN_UNIT;
                    turn.budget = turn.budget.saturating_sub(parts as usize);
                    if !self.serve(pending, turn) {
                        return Stop::Budget;
                    }
                    turn.is_first = false;
                }
                Err(status) => self.used(pending, status),
            }
        }
        Stop::Budget
    }

    /// Finds out what a chain asks for, or what is to be said of it.
    fn parse(&mut self, pending: &mut Pending) -> Result<(), Status> {
        // Without a header, or without room for a status: nothing is done.
        if !pending.split() {
            self.counters.bad_chains += 1;
            return Err(Status::IoError);
        }
        let parsed = pending.parse(&self.disk);
        parsed.inspect_err(|_| {
            self.counters.refused += 1;
            self.disk.limiter.charge(0);
        })
    }

    /// Carries out a request, or has it carried out. False if it would keep others waiting that this
    /// turn has done: it has been put back, for a turn of its own.
    fn serve(&mut self, mut pending: Pending, turn: &TurnLeft) -> bool {
        let moved = pending.moved();
        let result = self.disk.execute_now(&pending);
        if result.is_none()
            && let Some(engine) = &mut self.engine
        {
            match engine.start(pending) {
                Some(refused) => pending = refused,
                None => {
                    self.disk.limiter.charge(moved as usize);
                    return true;
                }
            }
        }
        if result.is_none() && turn.is_over_for(pending.request()) {
            self.recycle(pending);
            self.queue.undo_pop();
            return false;
        }
        self.disk.limiter.charge(moved as usize);
        let result = result.unwrap_or_else(|| self.disk.execute(&pending));
        self.finish(pending, result);
        true
    }

    /// Shows the driver what the engine has done.
    fn collect(&mut self) {
        while let Some((pending, result)) = self.engine.as_mut().and_then(|e| e.completed()) {
            self.finish(pending, result);
        }
    }

    fn finish(&mut self, pending: Pending, mut result: io::Result<()>) {
        if result.is_ok() && pending.wants_flush(&self.disk) {
            result = self.disk.image().flush();
        }
        let counters = &mut self.counters;
        let mut status = Status::Ok;
        match (&result, pending.request()) {
            (Err(error), request) => {
                counters.errors += 1;
                self.disk.complain(request, error);
                status = Status::IoError;
            }
            (Ok(()), Request::Read { .. }) => {
                counters.reads += 1;
                counters.read_bytes += pending.moved();
            }
            (Ok(()), Request::Write { .. }) => {
                counters.writes += 1;
                counters.written_bytes += pending.moved();
            }
            (Ok(()), Request::Flush) => counters.flushes += 1,
            (Ok(()), Request::Discard(_) | Request::WriteZeroes { .. }) => counters.discards += 1,
            (Ok(()), Request::Serial) => {}
        }
        self.used(pending, status);
    }

    /// Tells the driver how a chain ended.
    fn used(&mut self, pending: Pending, status: Status) {
        pending.tell(status);
        self.has_used = true;
        let chain = pending.chain();
        // The status is the last byte, so that all of them count as written.
        self.queue.push_used(chain.head, chain.writable.len as u32);
        self.recycle(pending);
        if self.queue.unflushed() >= BATCH {
            self.queue.flush_used();
        }
    }

    fn recycle(&mut self, pending: Pending) {
        self.spare.extend(pending.recycle());
    }
}

/// What is left of a turn.
#[derive(Debug)]
struct TurnLeft {
    /// How many requests, at the most.
    budget: usize,
    started: Instant,
    /// It has done nothing yet.
    is_first: bool,
}

impl TurnLeft {
    /// Whether what has been done is not to wait for this request, which may take long.
    fn is_over_for(&self, request: &Request) -> bool {
        let transfers = matches!(request, Request::Read { .. } | Request::Write { .. });
        !self.is_first && (!transfers || self.started.elapsed() > SLICE)
    }
}
