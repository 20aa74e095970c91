//! A queue of the guest's device, and the thread that serves its requests.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
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
}

/// A queue. The front end changes it by a thread other than the one that serves it.
pub(crate) struct Ring {
    state: Mutex<State>,
    /// Whether the front end waits for the state.
    wanted: AtomicBool,
    /// Written when the state has changed.
    changed: OwnedFd,
    inflight: Inflight,
}

impl Ring {
    pub fn new(inflight: Inflight) -> std::io::Result<Self> {
        let queue = Queue::new(QUEUE_SIZE).map_err(std::io::Error::other)?;
        let state = State {
            queue,
            memory: None,
            kick: None,
            call: None,
            enabled: false,
        };
        Ok(Self {
            state: Mutex::new(state),
            wanted: AtomicBool::new(false),
            changed: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            inflight,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state between two requests: what is being served is answered first.
    pub fn change<T>(&self, change: impl FnOnce(&mut State, &Inflight) -> T) -> T {
        self.wanted.store(true, Ordering::Release);
        let mut state = self.lock();
        self.wanted.store(false, Ordering::Release);
        let result = change(&mut state, &self.inflight);
        drop(state);
        // It is full only while a change is noted already.
        let _ = rustix::io::write(&self.changed, &1u64.to_ne_bytes());
        result
    }

    /// Serves the requests that the guest makes available, with what `serve` answers: how many bytes it has written.
    pub fn run(&self, serve: impl Fn(&Memory, Chain) -> u32) {
        loop {
            let kick = self.lock().kick.clone();
            let mut fds = vec![PollFd::new(&self.changed, PollFlags::IN)];
            fds.extend(kick.iter().map(|kick| PollFd::new(kick, PollFlags::IN)));
            if poll(&mut fds, None).is_err() {
                continue;
            }
            let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            let both = [
                Some(self.changed.as_fd()),
                kick.as_ref().map(|kick| kick.as_fd()),
            ];
            for (fd, _) in both
                .into_iter()
                .flatten()
                .zip(ready)
                .filter(|(_, ready)| *ready)
            {
                let _ = rustix::io::read(fd, &mut [0; 8]);
            }
            loop {
                if self.wanted.load(Ordering::Acquire) || !self.serve_one(&serve) {
                    break;
                }
            }
        }
    }

    /// Serves one request; `false` when there is none.
    fn serve_one(&self, serve: impl Fn(&Memory, Chain) -> u32) -> bool {
        let mut state = self.lock();
        let State {
            queue,
            memory: Some(memory),
            kick: Some(_),
            call,
            enabled: true,
        } = &mut *state
        else {
            return false;
        };
        let memory: &Memory = memory;
        let Ok(next) = queue.iter(memory).map(|mut available| available.next()) else {
            // The guest has spoilt its ring: it may only start it again.
            return false;
        };
        let Some(chain) = next else {
            // One that came before the guest had to kick for it is not missed.
            return queue.enable_notification(memory).unwrap_or(false);
        };
        let head = chain.head_index();
        self.inflight.begin(head);
        let len = serve(memory, chain);
        self.inflight.complete(head);
        if queue.add_used(memory, head, len).is_err() {
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
