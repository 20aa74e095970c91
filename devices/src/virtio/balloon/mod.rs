//! The memory balloon (virtio 1.2, 5.5): the guest gives memory back to the host.
//!
//! A driver gives back what it has free, without being asked (free page reporting), and holds as
//! many pages as the device asks for and does not use them: it inflates the balloon. When the
//! guest runs out of memory it takes pages out again by itself (DEFLATE_ON_OOM). Either way the
//! host's pages are freed, and a page that the guest uses again is a new one.
//!
//! | file | what |
//! | --- | --- |
//! | this | the device |
//! | `config.rs` | how large the balloon is to be, and is |
//! | `job.rs` | the queues |
//! | `ranges.rs` | the memory that is given back |

mod config;
mod job;
mod ranges;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use serde_json::{Value, json};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::worker::Worker;
use super::{Activation, RING_FEATURES, VirtioDevice};
use crate::bus::{BoxError, check};
use crate::events::EventSink;

pub use config::{BalloonHandle, ConfigSpace};
pub use job::BalloonJob;

/// The driver takes pages out of the balloon before it kills a process for want of memory.
pub const DEFLATE_ON_OOM: u64 = 1 << 2;
/// The driver says what it fills free pages with.
pub const PAGE_POISON: u64 = 1 << 4;
/// The driver reports free pages.
pub const REPORTING: u64 = 1 << 5;

/// Descriptors in each queue: inflate, deflate, statistics, free page hints, reporting.
const QUEUE_SIZES: [u16; 5] = [128; 5];

/// The memory balloon.
#[derive(Debug)]
pub struct Balloon {
    worker: Worker<BalloonJob>,
    config: Arc<ConfigSpace>,
    events: EventSink,
}

impl Balloon {
    /// A device whose thread has this name, and that holds back so many bytes of the guest's memory
    /// from the start. Guest memory has to be all anonymous or all of a memfd, of pages of the usual size. That
    /// its driver is ready is reported to `events`.
    ///
    /// # Errors
    ///
    /// Fails when the process may not have another thread or descriptor.
    pub fn new(name: &str, held_back: u64, events: EventSink) -> io::Result<Self> {
        Ok(Self {
            worker: Worker::new(name.to_owned())?,
            config: Arc::new(ConfigSpace::new(held_back)?),
            events,
        })
    }

    /// By which others ask for more or less, while the device is on its bus.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(Arc::clone(&self.config))
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn events(&self) -> Option<&EventSink> {
        Some(&self.events)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES | DEFLATE_ON_OOM | PAGE_POISON | REPORTING
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.config.generation()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), BoxError> {
        let (interrupt, resumed) = (Arc::clone(&activation.interrupt), activation.resumed);
        let job = BalloonJob::new(activation, Arc::clone(&self.config))?;
        self.worker.start(job, Arc::clone(&interrupt))?;
        self.config.attach(interrupt, resumed);
        Ok(())
    }

    fn pause(&mut self) -> Vec<Option<u16>> {
        self.config.pause();
        self.worker.stop();
        let mut positions = vec![None; QUEUE_SIZES.len()];
        for (index, position) in self.worker.join().into_iter().flat_map(BalloonJob::park) {
            positions[usize::from(index)] = Some(position);
        }
        positions
    }

    fn save(&self) -> Result<Value, BoxError> {
        Ok(json!(self.config.save()))
    }

    fn check(&self, state: &Value) -> Result<(), BoxError> {
        check::<config::Space>(state)
    }

    fn restore(&mut self, state: Value) -> Result<(), BoxError> {
        self.config.restore(serde_json::from_value(state)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.pause();
        self.config.reset();
    }
}
