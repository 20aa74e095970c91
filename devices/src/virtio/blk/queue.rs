//! A queue of requests: from chains to requests, and back when they are done.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::counters::{BlkCounters, SharedCounters};
use super::disk::Disk;
use super::engine::Engine;
use super::pending::{Pending, tell};
use super::request::{Parts, Request, Status};
use crate::lock;
use crate::virtio::queue::{Buffers, Chain, Next, Queue};

/// Requests that are used together: the driver's processor then loses its copy of the index less
/// often.
const BATCH: u16 = 16;
/// How long the first requests of a turn may wait for others that the image takes time for.
const SLICE: Duration = Duration::from_micros(100);
/// Iovecs for which room is kept between requests.
const KEPT: usize = 64;

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
    /// For the next chains.
    spare: Vec<Buffers>,
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
    /// for ever costs budget too. Says why it stopped, and whether to interrupt the driver.
    pub fn handle(&mut self, budget: usize) -> (Stop, bool) {
        let mut turn = TurnLeft {
            budget,
            started: Instant::now(),
            is_first: true,
        };
        self.collect();
        let mut stop = loop {
            self.queue.disable_notification();
            match self.drain(&mut turn) {
                // Requests came while notifications were still off.
                Stop::Idle if self.queue.enable_notification() && turn.budget > 0 => {
                    turn.budget -= 1;
                }
                Stop::Idle if turn.budget == 0 => break Stop::Budget,
                stop => break stop,
            }
        };
        if let Some(engine) = &mut self.engine
            && let Err(error) = engine.submit()
        {
            log::error!("{}: io_uring fails: {error}", self.disk.label());
            stop = Stop::Broken;
        }
        (stop, self.finish_turn())
    }

    /// Takes what is done, no more. Whether to interrupt the driver.
    pub(super) fn finish_turn(&mut self) -> bool {
        self.collect();
        self.queue.flush_used();
        self.queue.needs_notification()
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
            let mut buffers = self.spare.pop().unwrap_or_default();
            let chain = match self.queue.pop(&mut buffers) {
                Next::Chain(chain) => chain,
                other => {
                    self.recycle(buffers);
                    match other {
                        Next::Empty => return Stop::Idle,
                        Next::Broken => return Stop::Broken,
                        _ => self.counters.bad_chains += 1,
                    }
                    continue;
                }
            };
            match self.parse(chain, buffers) {
                Ok(pending) => {
                    if !self.serve(pending, turn) {
                        return Stop::Budget;
                    }
                    turn.is_first = false;
                }
                Err((buffers, status)) => {
                    tell(&buffers, status);
                    self.used(chain, buffers);
                }
            }
        }
        Stop::Budget
    }

    /// The request of a chain, or what is to be said of it.
    fn parse(&mut self, chain: Chain, mut buffers: Buffers) -> Result<Pending, (Buffers, Status)> {
        let Some(parts) = Parts::split(&mut buffers) else {
            // Without a header, or without room for a status: nothing is done.
            self.counters.bad_chains += 1;
            return Err((buffers, Status::IoError));
        };
        match parts.request(&buffers, self.disk.image(), self.disk.is_readonly()) {
            Ok(request) => Ok(Pending::new(chain, buffers, parts, request)),
            Err(status) => {
                self.counters.refused += 1;
                self.disk.limiter.charge(0);
                Err((buffers, status))
            }
        }
    }

    /// Carries out a request, or has it carried out. False if it would keep others waiting that this
    /// turn has done: it has been put back, for a turn of its own.
    fn serve(&mut self, pending: Pending, turn: &TurnLeft) -> bool {
        let moved = pending.moved;
        let mut result = self.disk.execute_now(&pending);
        let mut pending = Some(pending);
        if result.is_none() {
            if let Some(engine) = &mut self.engine {
                pending = pending.and_then(|pending| engine.start(pending));
            }
            if let Some(slow) = pending.take_if(|slow| turn.is_over_for(&slow.request)) {
                self.recycle(slow.into_buffers());
                self.queue.undo_pop();
                return false;
            }
            result = pending.as_ref().map(|pending| self.disk.execute(pending));
        }
        self.disk.limiter.charge(moved as usize);
        if let (Some(pending), Some(result)) = (pending, result) {
            self.finish(pending, result);
        }
        true
    }

    /// Shows the driver what the engine has done.
    fn collect(&mut self) {
        while let Some((pending, result)) = self.engine.as_mut().and_then(|e| e.completed()) {
            self.finish(pending, result);
        }
    }

    fn finish(&mut self, pending: Pending, result: io::Result<()>) {
        let counters = &mut self.counters;
        let mut status = Status::Ok;
        match (&result, &pending.request) {
            (Err(error), request) => {
                counters.errors += 1;
                self.disk.complain(request, error);
                status = Status::IoError;
            }
            (Ok(()), Request::Read { .. }) => {
                counters.reads += 1;
                counters.read_bytes += pending.moved;
            }
            (Ok(()), Request::Write { .. }) => {
                counters.writes += 1;
                counters.written_bytes += pending.moved;
            }
            (Ok(()), Request::Flush) => counters.flushes += 1,
            (Ok(()), Request::Discard(_) | Request::WriteZeroes { .. }) => counters.discards += 1,
            (Ok(()), Request::Serial) => {}
        }
        let (chain, buffers) = pending.finish(status);
        self.used(chain, buffers);
    }

    /// The driver has been told how this chain ended.
    fn used(&mut self, chain: Chain, buffers: Buffers) {
        // The status is the last byte, so that all of them count as written.
        self.queue.push_used(chain.head, chain.writable.len as u32);
        self.recycle(buffers);
        if self.queue.unflushed() >= BATCH {
            self.queue.flush_used();
        }
    }

    fn recycle(&mut self, mut buffers: Buffers) {
        let is_large = buffers.readable.capacity() + buffers.writable.capacity() > KEPT;
        if !is_large {
            buffers.clear();
            self.spare.push(buffers);
        }
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
