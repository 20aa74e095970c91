//! The server as the device sees it, and the device's thread: it sleeps while the server lives, and
//! then fails what the guest asks for.

use std::error::Error;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::QUEUE_SIZE;
use crate::events::{DeviceEvent, EventSink};
use crate::lock;
use crate::virtio::iovec::{gather, scatter};
use crate::virtio::queue::{Buffers, Next, Queue};
use crate::virtio::vhost_user::{FrontEnd, Outstanding, VhostUserError};
use crate::virtio::worker::{Job, Turn};
use crate::virtio::{ActiveQueue, Interrupt};

/// Requests of one queue that one turn handles.
const BUDGET: usize = 64;

/// Bytes of `fuse_in_header` that are read, and of `fuse_out_header` (include/uapi/linux/fuse.h).
const HEADER: usize = 16;
/// Opcodes without a reply: FORGET, INTERRUPT, BATCH_FORGET.
const WITHOUT_REPLY: [u32; 3] = [2, 36, 42];

/// The server, or that it is gone.
#[derive(Debug)]
pub(super) struct Server {
    name: String,
    tag: String,
    events: EventSink,
    front_end: FrontEnd,
    process: Option<OwnedFd>,
    /// That it is gone has been logged and reported.
    is_reported: bool,
}

impl Server {
    pub fn new(
        name: &str,
        tag: &str,
        events: EventSink,
        front_end: FrontEnd,
        process: Option<OwnedFd>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            tag: tag.to_owned(),
            events,
            front_end,
            process,
            is_reported: false,
        }
    }

    /// Gives it the queues, or leaves them to [`FsJob`] where it is gone.
    ///
    /// # Errors
    ///
    /// Fails when it refuses them, and lives on.
    pub fn start(
        &mut self,
        memory: &GuestMemoryMmap,
        features: u64,
        queues: &[(u16, ActiveQueue)],
        interrupt: &dyn Interrupt,
    ) -> Result<(), VhostUserError> {
        if self.front_end.is_dead() {
            return Ok(());
        }
        let started = self.front_end.start(memory, features, queues, interrupt);
        match started {
            Err(error) if self.front_end.is_dead() => self.cut_off(&error),
            Err(error) => {
                self.stop(memory);
                return Err(error);
            }
            Ok(()) => {}
        }
        Ok(())
    }

    /// Takes the queues back, and returns where they stand; nothing where the server is gone.
    pub fn stop(&mut self, memory: &GuestMemoryMmap) -> Option<Vec<(u16, u16)>> {
        if self.front_end.is_dead() {
            return None;
        }
        let stopped = self.front_end.stop(memory);
        stopped.inspect_err(|error| self.cut_off(error)).ok()
    }

    /// Whether [`Server::save`] and [`Server::restore`] can be tried.
    ///
    /// # Errors
    ///
    /// Says why not.
    pub fn check_state(&self) -> Result<(), VhostUserError> {
        self.front_end.check_state()
    }

    /// What it knows of the guest. Its queues have been stopped.
    ///
    /// # Errors
    ///
    /// Says what it did not do.
    pub fn save(&mut self) -> Result<Vec<u8>, VhostUserError> {
        let state = self.front_end.save_state();
        self.notice(state)
    }

    /// Has it know what another one knew.
    ///
    /// # Errors
    ///
    /// Says what it did not do.
    pub fn restore(&mut self, state: &[u8]) -> Result<(), VhostUserError> {
        let restored = self.front_end.restore_state(state);
        self.notice(restored)
    }

    /// A request may have shown that it is gone.
    fn notice<T>(&mut self, result: Result<T, VhostUserError>) -> Result<T, VhostUserError> {
        result.inspect_err(|error| {
            if self.front_end.is_dead() {
                self.cut_off(error);
            }
        })
    }

    pub fn reset(&mut self) {
        if !self.front_end.is_dead()
            && let Err(error) = self.front_end.reset()
        {
            self.cut_off(&error);
        }
    }

    pub fn change_interrupt(&mut self, queue: u16, line: &EventFd) {
        if let Err(error) = self.front_end.change_interrupt(queue, line) {
            self.cut_off(&error);
        }
    }

    /// One that does not do what it has to is of no more use.
    fn cut_off(&mut self, why: &dyn Error) {
        self.front_end.cut_off();
        self.kill();
        self.report(why);
    }

    /// Kills its process, which is ours, and waits for that: it touches guest memory no more.
    fn kill(&mut self) {
        let Some(process) = self.process.take() else {
            return;
        };
        let _ = pidfd_send_signal(&process, Signal::KILL);
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        let limit = Timespec::try_from(self.front_end.limit()).ok();
        // One that a file system on the host keeps from ending is left behind.
        let _ = poll(&mut ended, limit.as_ref());
    }

    fn report(&mut self, why: &dyn Error) {
        if !std::mem::replace(&mut self.is_reported, true) {
            let cause = why.source().map(|cause| format!(": {cause}"));
            let reason = format!("{why}{}", cause.unwrap_or_default());
            log::warn!(
                "{}: the guest gets errors (EIO) from now on: {reason}",
                self.name
            );
            let tag = self.tag.clone();
            self.events.report(DeviceEvent::ShareFailed { tag, reason });
        }
    }
}

/// Why a server that has hung up is of no more use.
#[derive(Debug, thiserror::Error)]
#[error("the file server is gone")]
struct HungUp;

/// What the device's thread does.
#[derive(Debug)]
pub struct FsJob {
    server: Arc<Mutex<Server>>,
    /// Readable when the server has hung up.
    socket: RawFd,
    memory: Arc<GuestMemoryMmap>,
    queues: Vec<(u16, ActiveQueue)>,
    interrupt: Arc<dyn Interrupt>,
    /// The notifications of all queues, once the server is gone: it would miss those that this thread
    /// reads.
    kicks: Epoll,
    state: State,
    buffers: Buffers,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The server has the queues.
    Served,
    /// There may be requests to fail.
    Ready,
    /// With the driver's next notification.
    Idle,
    /// The rings make no sense: only a reset helps.
    Broken,
}

const HANG_UP: u32 = 0;
const KICK: u32 = 1;

impl FsJob {
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub(super) fn new(
        server: Arc<Mutex<Server>>,
        memory: Arc<GuestMemoryMmap>,
        queues: Vec<(u16, ActiveQueue)>,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let socket = lock(&server).front_end.as_raw_fd();
        Ok(Self {
            socket,
            server,
            memory,
            queues,
            interrupt,
            kicks: Epoll::new()?,
            state: State::Served,
            buffers: Buffers::default(),
        })
    }

    /// Where the queues stand of a server that is gone. What it had taken is found out when they are
    /// taken over.
    pub(super) fn positions(&self) -> Vec<(u16, u16)> {
        let position = |(index, active): &(u16, ActiveQueue)| (*index, active.queue.next_avail());
        self.queues.iter().map(position).collect()
    }

    /// Takes the queues over from a server that is gone, and fails what it had taken.
    fn take_over(&mut self) -> State {
        let inflight = {
            let mut server = lock(&self.server);
            server.cut_off(&HungUp);
            server.front_end.take_inflight()
        };
        for (index, active) in &mut self.queues {
            let watched = self.kicks.ctl(
                ControlOperation::Add,
                active.kick.as_raw_fd(),
                EpollEvent::new(EventSet::IN, 0),
            );
            let config = &active.config;
            let found = Outstanding::find(&self.memory, *index, config, inflight.as_ref());
            let (Ok(()), Some(outstanding)) = (watched, found) else {
                return State::Broken;
            };
            let heads = &outstanding.heads;
            if let Ok(mut taken) = Queue::of_heads(config, QUEUE_SIZE, &self.memory, heads) {
                // What the driver writes meanwhile makes them no more.
                fail(&mut taken, heads.len(), &mut self.buffers);
            }
            active.queue.resume(outstanding.next_avail);
            // For what the server has used without an interrupt, too.
            self.interrupt.queue(*index);
        }
        State::Ready
    }

    /// Fails up to [`BUDGET`] requests of each queue.
    fn fail_requests(&mut self) -> State {
        let mut state = State::Idle;
        for (index, active) in &mut self.queues {
            let queue = &mut active.queue;
            let mut end = fail(queue, BUDGET, &mut self.buffers);
            if end == Some(Next::Empty) && queue.enable_notification() {
                end = None;
            }
            if queue.needs_notification() {
                self.interrupt.queue(*index);
            }
            match end {
                Some(Next::Broken) => return State::Broken,
                None => state = State::Ready,
                _ => {}
            }
        }
        state
    }
}

impl Job for FsJob {
    fn wakeups(&self) -> Vec<(RawFd, u32, EventSet)> {
        let hang_up = EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        vec![
            (self.socket, HANG_UP, hang_up),
            (self.kicks.as_raw_fd(), KICK, EventSet::IN),
        ]
    }

    fn wake(&mut self, token: u32, _events: EventSet) {
        if token == HANG_UP && self.state == State::Served {
            self.state = self.take_over();
        } else if token == KICK {
            for (_, active) in &self.queues {
                let _ = active.kick.read();
            }
            if self.state == State::Idle {
                self.state = State::Ready;
            }
        }
        if self.state == State::Broken {
            self.interrupt.needs_reset();
        }
    }

    fn turn(&mut self) -> Turn {
        if self.state == State::Ready {
            self.state = self.fail_requests();
            if self.state == State::Broken {
                self.interrupt.needs_reset();
            }
        }
        Turn {
            more: self.state == State::Ready,
            wake_at: None,
        }
    }
}

/// Fails up to `budget` requests, and returns what ends them: `None` where there may be more.
fn fail(queue: &mut Queue, budget: usize, buffers: &mut Buffers) -> Option<Next> {
    for _ in 0..budget {
        buffers.clear();
        match queue.pop(buffers) {
            Next::Chain(chain) => queue.add_used(chain.head, reply(buffers)),
            Next::Bad => {}
            end => return Some(end),
        }
    }
    None
}

/// Writes that a request has failed, if it is one that has a reply, and returns how long that is.
fn reply(buffers: &Buffers) -> u32 {
    let mut request = [0; HEADER];
    // SAFETY: the iovecs are those that `Queue::pop` resolved inside guest memory, which the queue keeps
    // mapped.
    let len = unsafe { gather(&buffers.readable, 0, &mut request) };
    let room: usize = buffers.writable.iter().map(|iovec| iovec.iov_len).sum();
    let [_, _, _, _, opcode @ .., _, _, _, _, _, _, _, _] = request;
    let opcode = u32::from_le_bytes(opcode);
    if len < HEADER || room < HEADER || WITHOUT_REPLY.contains(&opcode) {
        return 0;
    }
    // Length, error, and which request it is.
    let mut header = request;
    header[..4].copy_from_slice(&(HEADER as u32).to_le_bytes());
    header[4..8].copy_from_slice(&(-libc::EIO).to_le_bytes());
    // SAFETY: as above.
    unsafe { scatter(&buffers.writable, 0, &header) };
    HEADER as u32
}
