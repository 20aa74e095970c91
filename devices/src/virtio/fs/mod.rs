//! The file system device (virtio 1.2, 5.11): a directory of the host's for the guest.
//!
//! A server, which is another process, has the queues by vhost-user and understands FUSE. Here is the
//! configuration space, and what is done when the server is gone: each request gets an error, so that
//! no task of the guest waits for it for ever.

mod failing;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub use self::failing::FsJob;
use self::failing::Server;
use super::vhost_user::{FrontEnd, Inflight, VhostUserError};
use super::worker::Worker;
use super::{Activation, ActiveQueue, RING_FEATURES, VirtioDevice, read_at};
use crate::bus::BoxError;
use crate::events::EventSink;
use crate::lock;

/// Bytes of a tag at most.
pub const MAX_TAG: usize = 36;
/// How many queues there are: one for requests that have to overtake others, one for those.
pub const QUEUES: u16 = 2;
/// Descriptors in each. Linux makes its requests as large as a queue is, up to 1 MiB.
pub const QUEUE_SIZE: u16 = 1024;
/// How long a server has for a reply. It may have a slow disk, and the vCPU waits that asks.
pub const LIMIT: Duration = Duration::from_secs(30);

/// "Mass storage controller, other".
const PCI_CLASS: u32 = 0x01_8000;
/// The tag, and the number of request queues.
const CONFIG_LEN: usize = MAX_TAG + 4;
const REQUEST_QUEUES: u32 = QUEUES as u32 - 1;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// Not by this server.
    #[error(transparent)]
    Server(#[from] VhostUserError),
    /// The process may not have another thread or descriptor.
    #[error("cannot make what a share needs (threads, epoll instances, eventfds)")]
    Host(#[from] io::Error),
}

/// Why a share is neither saved nor restored.
#[derive(Debug, thiserror::Error)]
#[error("the share {0} cannot go on in another guest")]
struct StateError(String, #[source] VhostUserError);

/// What is saved of a device.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    tag: String,
    /// What its server knows of the guest, as only servers understand it: a character for each byte.
    /// A list of numbers would take a whole [`Value`] for each.
    server: String,
}

/// How a server is reached.
#[derive(Debug)]
pub struct Connection {
    /// The socket that it speaks vhost-user on.
    pub socket: UnixStream,
    /// How long it has for each of its replies.
    pub limit: Duration,
    /// Its record of requests in flight, for queues of [`QUEUE_SIZE`], where it was started with one.
    pub inflight: Option<File>,
    /// Its process (pidfd), where that is to be killed before its queues are taken over. It could hang
    /// and go on later.
    pub process: Option<OwnedFd>,
}

impl Connection {
    /// With a server that listens for everybody.
    pub fn to(socket: UnixStream) -> Self {
        Self {
            socket,
            limit: LIMIT,
            inflight: None,
            process: None,
        }
    }
}

/// The file system device.
#[derive(Debug)]
pub struct Fs {
    tag: String,
    config: [u8; CONFIG_LEN],
    features: u64,
    server: Arc<Mutex<Server>>,
    worker: Worker<FsJob>,
    events: EventSink,
    /// While the device is active.
    memory: Option<Arc<GuestMemoryMmap>>,
    /// The server may know something of the guest: a reset has something to undo.
    is_used: bool,
}

impl Fs {
    /// A device named `name`, by whose `tag` the guest mounts what the server serves. That its driver is
    /// ready, and that the server is gone, is reported to `events`.
    ///
    /// # Errors
    ///
    /// See [`FsError`].
    pub fn new(
        name: &str,
        tag: &str,
        server: Connection,
        events: EventSink,
    ) -> Result<Self, FsError> {
        let queues = (QUEUES, QUEUE_SIZE);
        let Connection {
            socket,
            limit,
            inflight,
            process,
        } = server;
        let inflight = inflight.map(|file| Inflight::new(file, QUEUE_SIZE));
        let front_end = FrontEnd::connect(socket, limit, RING_FEATURES, queues, inflight)?;
        let mut config = [0; CONFIG_LEN];
        let len = tag.len().min(MAX_TAG);
        config[..len].copy_from_slice(&tag.as_bytes()[..len]);
        config[MAX_TAG..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        let features = front_end.features();
        let server = Server::new(name, tag, events.clone(), front_end, process);
        Ok(Self {
            tag: tag.to_owned(),
            config,
            features,
            server: Arc::new(Mutex::new(server)),
            worker: Worker::new(name.to_owned())?,
            events,
            memory: None,
            is_used: false,
        })
    }

    /// Gives the server the queues, and returns the thread's job without the thread.
    ///
    /// # Errors
    ///
    /// The driver has not set up all queues, or the server does not take them.
    pub fn job(&mut self, activation: Activation) -> Result<FsJob, BoxError> {
        let Activation {
            memory,
            features,
            queues,
            interrupt,
            ..
        } = activation;
        let numbered = (0..).zip(queues);
        let queues = numbered.filter_map(|(index, queue)| Some((index, queue?)));
        let queues: Vec<(u16, ActiveQueue)> = queues.collect();
        if queues.len() < usize::from(QUEUES) {
            return Err("the driver has not set up all queues".into());
        }
        self.is_used = true;
        lock(&self.server).start(&memory, features, &queues, interrupt.as_ref())?;
        self.memory = Some(Arc::clone(&memory));
        let job = FsJob::new(Arc::clone(&self.server), memory, queues, interrupt);
        Ok(job.inspect_err(|_| drop(self.stop()))?)
    }

    fn failed(&self) -> impl FnOnce(VhostUserError) -> StateError {
        |error| StateError(self.tag.clone(), error)
    }

    /// Stops the queues, whoever has them, and returns where they stand.
    fn stop(&mut self) -> Vec<Option<u16>> {
        self.worker.stop();
        let job = self.worker.join();
        let mut positions = vec![None; QUEUES.into()];
        let Some(memory) = self.memory.take() else {
            return positions;
        };
        let stopped = lock(&self.server).stop(&memory);
        let stopped = stopped.or_else(|| Some(job?.positions()));
        for (index, position) in stopped.into_iter().flatten() {
            positions[usize::from(index)] = Some(position);
        }
        positions
    }
}

impl VirtioDevice for Fs {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn events(&self) -> Option<&EventSink> {
        Some(&self.events)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES as usize]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_at(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), BoxError> {
        let interrupt = Arc::clone(&activation.interrupt);
        let job = self.job(activation)?;
        let started = self.worker.start(job, interrupt);
        Ok(started.inspect_err(|_| drop(self.stop()))?)
    }

    fn interrupt_changed(&mut self, queue: u16, line: &EventFd) {
        lock(&self.server).change_interrupt(queue, line);
    }

    fn pause(&mut self) -> Vec<Option<u16>> {
        self.stop()
    }

    fn save(&self) -> Result<Value, BoxError> {
        let server = lock(&self.server).save().map_err(self.failed())?;
        let server = server.into_iter().map(char::from).collect();
        let tag = self.tag.clone();
        Ok(json!(State { tag, server }))
    }

    fn check(&self, state: &Value) -> Result<(), BoxError> {
        let state = State::deserialize(state)?;
        if state.tag != self.tag {
            return Err(format!("it was the share {}, and is {} here", state.tag, self.tag).into());
        }
        let checked = lock(&self.server).check_state();
        Ok(checked.map_err(self.failed())?)
    }

    fn restore(&mut self, state: Value) -> Result<(), BoxError> {
        self.check(&state)?;
        let State { server, .. } = serde_json::from_value(state)?;
        let server = server
            .chars()
            .map(u8::try_from)
            .collect::<Result<Vec<_>, _>>()?;
        self.is_used = true;
        let restored = lock(&self.server).restore(&server);
        Ok(restored.map_err(self.failed())?)
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.is_used) {
            self.stop();
            lock(&self.server).reset();
        }
    }
}
