//! The entropy device (virtio 1.2, 5.4): the host's random numbers for the guest.
//!
//! They come from getrandom(2), straight into guest memory. A driver gets so much a second and no
//! more; one that asks for more waits, and the device's thread sleeps meanwhile.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Buffers, Next, Queue};
use super::rate::{Levels, Limiter, RateLimit};
use super::worker::{Job, Turn, Worker};
use super::{Activation, ActiveQueue, Interrupt, RING_FEATURES, VirtioDevice};
use crate::bus::{BoxError, check};
use crate::events::EventSink;

/// What a driver gets. Linux asks for 64 bytes at a time, and for few of them; what a guest needs
/// of random numbers its kernel makes of those.
pub const LIMIT: RateLimit = RateLimit {
    bits: Some(8 << 20),
    frames: Some(1000),
    burst: Duration::from_millis(100),
};
/// The most bytes that a request gets; the driver sees how many there are (5.4.6).
pub const MAX_REQUEST: usize = 64 << 10;

/// Descriptors in the queue.
const QUEUE_SIZES: [u16; 1] = [64];
/// Of a request so many pieces are filled: each costs a system call.
const MAX_PIECES: usize = 16;
/// Requests that one turn handles.
const BUDGET: usize = 16;
/// The least time that a driver waits which has had its share: the thread would else wake up for
/// each request.
const MIN_WAIT: Duration = Duration::from_millis(10);

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    worker: Worker<RngJob>,
    /// Not the job's: a driver gets no new share by a reset.
    limiter: Arc<Limiter>,
    events: EventSink,
}

impl Rng {
    /// A device whose thread has this name, and is parked until the driver is ready, which is reported
    /// to `events`.
    ///
    /// # Errors
    ///
    /// Fails when the process may not have another thread or descriptor.
    pub fn new(name: &str, events: EventSink) -> io::Result<Self> {
        Ok(Self {
            worker: Worker::new(name.to_owned())?,
            limiter: Arc::new(Limiter::new(LIMIT)),
            events,
        })
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn events(&self) -> Option<&EventSink> {
        Some(&self.events)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), BoxError> {
        let queue = activation.queues.into_iter().next().flatten();
        let queue = queue.ok_or("the driver has not set up the queue")?;
        let interrupt = activation.interrupt;
        let job = RngJob::new(queue, Arc::clone(&self.limiter), Arc::clone(&interrupt));
        Ok(self.worker.start(job, interrupt)?)
    }

    fn pause(&mut self) -> Vec<Option<u16>> {
        self.worker.stop();
        vec![self.worker.join().map(|job| job.queue.next_avail())]
    }

    fn save(&self) -> Result<Value, BoxError> {
        Ok(json!(self.limiter.save()))
    }

    fn check(&self, state: &Value) -> Result<(), BoxError> {
        check::<Levels>(state)
    }

    fn restore(&mut self, state: Value) -> Result<(), BoxError> {
        self.limiter.restore(serde_json::from_value(state)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.pause();
    }
}

/// What the device's thread does.
#[derive(Debug)]
pub struct RngJob {
    queue: Queue,
    kick: Arc<EventFd>,
    limiter: Arc<Limiter>,
    interrupt: Arc<dyn Interrupt>,
    buffers: Buffers,
    state: State,
}

/// How the job goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// There may be requests.
    Ready,
    /// With the driver's next notification.
    Idle,
    /// When there is a share for the driver again.
    Waiting(Instant),
    /// Not at all: only a reset helps.
    Broken,
}

impl RngJob {
    /// Answers what comes by `queue`, as fast as `limiter` lets it.
    pub fn new(queue: ActiveQueue, limiter: Arc<Limiter>, interrupt: Arc<dyn Interrupt>) -> Self {
        Self {
            queue: queue.queue,
            kick: queue.kick,
            limiter,
            interrupt,
            buffers: Buffers::default(),
            state: State::Ready,
        }
    }

    /// Answers up to `budget` requests.
    fn answer(&mut self, budget: usize) -> io::Result<State> {
        for _ in 0..budget {
            if let Err(wait) = self.limiter.admit(Instant::now()) {
                return Ok(State::Waiting(Instant::now() + wait.max(MIN_WAIT)));
            }
            self.buffers.clear();
            let filled = match self.queue.pop(&mut self.buffers) {
                Next::Chain(chain) => {
                    let filled = fill(&self.buffers.writable)?;
                    self.queue.add_used(chain.head, filled as u32);
                    filled
                }
                // It costs the driver as much.
                Next::Bad => 0,
                Next::Empty if self.queue.enable_notification() => continue,
                Next::Empty => return Ok(State::Idle),
                Next::Broken => return Ok(State::Broken),
            };
            self.limiter.charge(filled);
        }
        Ok(State::Ready)
    }
}

const KICK: u32 = 0;

impl Job for RngJob {
    fn wakeups(&self) -> Vec<(RawFd, u32, EventSet)> {
        vec![(self.kick.as_raw_fd(), KICK, EventSet::IN)]
    }

    /// Notifications of a driver that has to wait wake no thread.
    fn varying(&self) -> Option<(RawFd, u32, EventSet)> {
        let events = match self.state {
            State::Ready | State::Idle => EventSet::IN,
            State::Waiting(_) | State::Broken => EventSet::empty(),
        };
        Some((self.kick.as_raw_fd(), KICK, events))
    }

    fn wake(&mut self, _token: u32, _events: EventSet) {
        if self.kick.read().is_ok() && self.state == State::Idle {
            self.state = State::Ready;
        }
    }

    fn timeout(&mut self) {
        if let State::Waiting(_) = self.state {
            self.state = State::Ready;
        }
    }

    fn turn(&mut self) -> Turn {
        if self.state == State::Ready {
            self.state = self.answer(BUDGET).unwrap_or_else(|error| {
                log::error!("cannot get random numbers for the guest: {error}");
                State::Broken
            });
            if self.queue.needs_notification() {
                self.interrupt.queue(0);
            }
            if self.state == State::Broken {
                self.interrupt.needs_reset();
            }
        }
        match self.state {
            State::Waiting(until) => Turn {
                more: false,
                wake_at: Some(until),
            },
            state => Turn {
                more: state == State::Ready,
                wake_at: None,
            },
        }
    }
}

/// Fills the pieces of guest memory, as far as a request goes, and returns how many bytes.
fn fill(pieces: &[libc::iovec]) -> io::Result<usize> {
    let mut filled = 0;
    for piece in pieces.iter().take(MAX_PIECES) {
        let len = piece.iov_len.min(MAX_REQUEST - filled);
        let mut done = 0;
        while done < len {
            let at = piece.iov_base.wrapping_byte_add(done);
            // SAFETY: the piece is one that `Queue::pop` resolved inside guest memory, which the
            // queue keeps mapped and to which there is no reference; it has `len` bytes.
            let got = unsafe { libc::getrandom(at, len - done, 0) };
            match usize::try_from(got) {
                Ok(got) => done += got,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        filled += done;
    }
    Ok(filled)
}

#[cfg(test)]
mod tests;
