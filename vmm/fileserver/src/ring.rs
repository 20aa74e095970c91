//! A queue of the guest's device, and the threads that serve its requests.
//!
//! Each of them waits for the guest's kicks by an epoll set of its own, and the kernel wakes one for each: a request is
//! served by the thread that its kick wakes, and one that waits for the host holds up no other while there are threads.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use crate::inflight::{Inflight, QUEUE_SIZE};

/// The guest's memory.
pub(crate) type Memory = GuestMemoryMmap<BitmapMmapRegion>;
/// A request.
pub(crate) type Chain<'m> = DescriptorChain<&'m Memory>;

/// What the front end says of a queue.
pub(crate) struct State {
    pub queue: Queue,
    pub memory: Option<Arc<Memory>>,
    /// The guest's kicks: `Some` from its start to its stop.
    pub kick: Option<Arc<OwnedFd>>,
    pub call: Option<OwnedFd>,
    pub enabled: bool,
    /// Requests that are being served.
    serving: usize,
}

/// What wakes one of the threads.
struct Waker {
    epoll: OwnedFd,
    /// Written when the state has changed.
    changed: OwnedFd,
}

impl Waker {
    fn new() -> std::io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let changed = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        // Each write wakes: it is never read.
        let events = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &changed, EventData::new_u64(0), events)?;
        Ok(Self { epoll, changed })
    }

    /// Watches the guest's kicks in place of earlier ones.
    fn watch(&self, kick: Option<&Arc<OwnedFd>>, watched: &mut Option<Arc<OwnedFd>>) {
        let is_same = match (kick, &*watched) {
            (Some(kick), Some(watched)) => Arc::ptr_eq(kick, watched),
            (kick, watched) => kick.is_none() && watched.is_none(),
        };
        if is_same {
            return;
        }
        if let Some(old) = watched.take() {
            let _ = epoll::delete(&self.epoll, &old);
        }
        // Each kick wakes one of the threads that wait.
        let events = EventFlags::IN | EventFlags::ET | EventFlags::EXCLUSIVE;
        *watched = kick
            .cloned()
            .filter(|kick| epoll::add(&self.epoll, kick, EventData::new_u64(0), events).is_ok());
    }
}

/// A queue. The front end changes it by a thread other than those that serve it.
pub(crate) struct Ring {
    state: Mutex<State>,
    /// Nothing is being served.
    answered: Condvar,
    /// Whether the front end waits for the state.
    wanted: AtomicBool,
    wakers: Vec<Waker>,
    inflight: Inflight,
}

impl Ring {
    /// A queue that so many threads are to serve.
    pub fn new(inflight: Inflight, threads: usize) -> std::io::Result<Self> {
        let queue = Queue::new(QUEUE_SIZE).map_err(std::io::Error::other)?;
        let state = State {
            queue,
            memory: None,
            kick: None,
            call: None,
            enabled: false,
            serving: 0,
        };
        let wakers = (0..threads).map(|_| Waker::new());
        Ok(Self {
            state: Mutex::new(state),
            answered: Condvar::new(),
            wanted: AtomicBool::new(false),
            wakers: wakers.collect::<std::io::Result<_>>()?,
            inflight,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state between two requests: what is being served is answered first.
    pub fn change<T>(&self, change: impl FnOnce(&mut State, &Inflight) -> T) -> T {
        self.wanted.store(true, Ordering::Release);
        let state = self
            .answered
            .wait_while(self.lock(), |state| state.serving > 0);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        self.wanted.store(false, Ordering::Release);
        let result = change(&mut state, &self.inflight);
        drop(state);
        for waker in &self.wakers {
            let _ = rustix::io::write(&waker.changed, &1u64.to_ne_bytes());
        }
        result
    }

    /// Serves the requests that the guest makes available, as one of the threads, with what `serve` answers: how many bytes
    /// it has written.
    pub fn run(&self, thread: usize, serve: impl Fn(&Memory, Chain) -> u32) {
        let Some(waker) = self.wakers.get(thread) else {
            return;
        };
        let mut watched = None;
        let mut events = Vec::with_capacity(2);
        loop {
            let kick = self.lock().kick.clone();
            waker.watch(kick.as_ref(), &mut watched);
            drop(kick);
            loop {
                if self.wanted.load(Ordering::Acquire) || !self.serve_one(&serve) {
                    break;
                }
            }
            events.clear();
            // Interrupted, it looks again.
            let _ = epoll::wait(
                &waker.epoll,
                rustix::buffer::spare_capacity(&mut events),
                None,
            );
        }
    }

    /// Serves one request; `false` when there is none.
    pub fn serve_one(&self, serve: impl Fn(&Memory, Chain) -> u32) -> bool {
        let mut state = self.lock();
        let State {
            queue,
            memory: Some(memory),
            kick: Some(kick),
            enabled: true,
            serving,
            ..
        } = &mut *state
        else {
            return false;
        };
        let memory = memory.clone();
        let Ok(next) = queue.iter(&*memory).map(|mut available| available.next()) else {
            // The guest has spoilt its ring: it may only start it again.
            return false;
        };
        let Some(chain) = next else {
            // One that came before the guest had to kick for it is not missed.
            return queue.enable_notification(&*memory).unwrap_or(false);
        };
        *serving += 1;
        // As long as a thread waits the guest kicks for each request.
        let has_thread = *serving < self.wakers.len();
        if has_thread && queue.enable_notification(&*memory).unwrap_or(false) {
            // Another thread serves the next one.
            let _ = rustix::io::write(kick.as_fd(), &1u64.to_ne_bytes());
        }
        let head = chain.head_index();
        self.inflight.begin(head);
        drop(state);
        let len = serve(&memory, chain);
        self.answer(&memory, head, len)
    }

    /// Puts an answer of so many bytes into the used ring; `false` where the guest has spoilt it.
    fn answer(&self, memory: &Memory, head: u16, len: u32) -> bool {
        let mut state = self.lock();
        let State {
            queue,
            call,
            enabled,
            serving,
            ..
        } = &mut *state;
        *serving -= 1;
        if *serving == 0 {
            self.answered.notify_all();
        }
        self.inflight.complete(head);
        if queue.add_used(memory, head, len).is_err() {
            // No descriptor of this queue, or its used ring is nowhere. It counts as not taken: the front end waits until
            // all that is taken is used. The guest may only start the queue again.
            queue.set_next_avail(queue.next_avail().wrapping_sub(1));
            *enabled = false;
            self.inflight.end(head, queue.next_used());
            return false;
        }
        self.inflight.end(head, queue.next_used());
        if queue.needs_notification(memory).unwrap_or(true)
            && let Some(call) = call
        {
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
        true
    }
}
