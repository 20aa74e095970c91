//! The socket device (virtio 1.2, 5.10): streams between the guest's AF_VSOCK and Unix sockets of the
//! host.
//!
//! | file | what |
//! | --- | --- |
//! | this | the device |
//! | `header.rs` | the header of each packet |
//! | `connection.rs` | one connection: its state, credit, socket |
//! | `connections.rs` | all of them, and whose turn it is |
//! | `host.rs` | the host's sockets: who connects, and where the guest's connections go |
//! | `job.rs` | the queues |
//! | `counters.rs` | what is counted |
//!
//! Data go straight between guest memory and a socket. What a socket does not take is held, as much as
//! the guest has credit for; what the guest has no room for stays in the socket.

mod connection;
mod connections;
mod counters;
pub mod header;
mod host;
mod job;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use self::connections::Connections;
use self::counters::Counting;
use self::host::Host;
use super::worker::Worker;
use super::{Activation, RING_FEATURES, VirtioDevice, read_at};
use crate::bus::BoxError;
use crate::events::EventSink;

pub use connections::MAX_CONNECTIONS;
pub use counters::{VsockCounters, VsockHandle};
pub use job::VsockJob;

/// Sockets may be streams.
const STREAM: u64 = 1 << 0;
/// Descriptors in each queue: to receive, to send, and of events.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    worker: Worker<VsockJob>,
    cid: u32,
    host: Arc<Host>,
    counting: Arc<Counting>,
    events: EventSink,
    /// The connections of a guest that is paused, and since when it is.
    paused: Option<(Connections, Instant)>,
    /// The driver is to hear that its connections are gone.
    must_reset: bool,
}

impl Vsock {
    /// A device whose thread has this name, of a guest with this CID. Programs of the host connect to
    /// `listener`; a connection of the guest's goes to `path` with `_` and the port at its end. That its
    /// driver is ready is reported to `events`.
    ///
    /// # Errors
    ///
    /// Fails when the process may not have another thread or descriptor.
    pub fn new(
        name: &str,
        cid: u32,
        listener: UnixListener,
        path: PathBuf,
        events: EventSink,
    ) -> io::Result<Self> {
        Ok(Self {
            worker: Worker::new(name.to_owned())?,
            cid,
            host: Arc::new(Host::new(listener, path)?),
            counting: Arc::default(),
            events,
            paused: None,
            must_reset: false,
        })
    }

    /// By which others read what it counts.
    pub fn handle(&self) -> VsockHandle {
        VsockHandle(Arc::clone(&self.counting))
    }

    /// The thread's job, without the thread.
    ///
    /// # Errors
    ///
    /// The driver has not set up a queue.
    pub fn job(&mut self, activation: Activation) -> Result<VsockJob, BoxError> {
        // The last one may be served by another monitor, which has the driver.
        let queues: Vec<_> = activation.queues.into_iter().map_while(|q| q).collect();
        if queues.len() < QUEUE_SIZES.len() - 1 {
            return Err("the driver has not set up all queues".into());
        }
        let connections = match self.paused.take().filter(|_| activation.resumed) {
            Some((mut connections, since)) => {
                connections.shift(since.elapsed());
                connections
            }
            None => Connections::new(Arc::clone(&self.host), self.cid, Arc::clone(&self.counting)),
        };
        let must_reset = std::mem::take(&mut self.must_reset) && activation.resumed;
        Ok(VsockJob::new(
            queues,
            connections,
            self.host.fd(),
            activation.interrupt,
            must_reset,
        ))
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn events(&self) -> Option<&EventSink> {
        Some(&self.events)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES | STREAM
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_at(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), BoxError> {
        let interrupt = Arc::clone(&activation.interrupt);
        let job = self.job(activation)?;
        Ok(self.worker.start(job, interrupt)?)
    }

    fn pause(&mut self) -> Vec<Option<u16>> {
        self.worker.stop();
        let Some(job) = self.worker.join() else {
            return Vec::new();
        };
        let (positions, connections, must_reset) = job.park();
        self.paused = Some((connections, Instant::now()));
        self.must_reset = must_reset;
        positions
    }

    /// Connections belong to programs of this host: the driver that goes on elsewhere has none.
    fn restore(&mut self, _state: Value) -> Result<(), BoxError> {
        self.reset();
        self.must_reset = true;
        Ok(())
    }

    fn reset(&mut self) {
        self.pause();
        if let Some((mut connections, _)) = self.paused.take() {
            connections.close();
        }
        self.must_reset = false;
    }
}
