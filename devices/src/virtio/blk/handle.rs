//! What can be done with a block device once it is on its bus.

use std::io;
use std::sync::Arc;

use super::config::ConfigSpace;
use super::counters::{BlkCounters, SharedCounters};
use super::disk::Disk;
use crate::lock;

/// A block device, for the control thread.
#[derive(Debug)]
pub struct BlkHandle {
    pub(super) name: String,
    pub(super) disk: Arc<Disk>,
    pub(super) config: Arc<ConfigSpace>,
    pub(super) counters: Vec<SharedCounters>,
}

impl BlkHandle {
    /// Grows the image to `size` bytes, and notifies the driver. One that has grown already,
    /// such as a block device, stays as it is.
    ///
    /// # Errors
    ///
    /// The image's, see [`Image::grow`](crate::disk::Image::grow).
    pub fn grow(&self, size: u64) -> io::Result<()> {
        let image = self.disk.image();
        image.grow(size)?;
        self.config.set_capacity(image.size());
        Ok(())
    }

    /// The disk's name: `disk0`, and so on.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.disk.image().size()
    }

    /// The disk's name in what is said of its guest.
    pub fn label(&self) -> &str {
        self.disk.label()
    }

    /// What each queue has done.
    pub fn queues(&self) -> Vec<BlkCounters> {
        let counters = self.counters.iter();
        counters.map(|counters| *lock(counters)).collect()
    }

    /// What its queues have done together.
    pub fn counters(&self) -> BlkCounters {
        let queues = self.queues().into_iter();
        queues.fold(BlkCounters::default(), BlkCounters::plus)
    }
}
