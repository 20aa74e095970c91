//! The block device (virtio 1.2, 5.2) over a disk image.
//!
//! | file | what |
//! | --- | --- |
//! | `features` | feature bits |
//! | `device` | the virtio device: activation, reset, save and restore |
//! | `config` | the configuration space: capacity, block sizes, limits, write cache |
//! | `engine` | who carries out the requests for which a queue's thread would have to wait: io_uring, a pool of threads |
//! | `pending` | a request on its way |
//! | `request` | what a chain asks for, however it is cut into buffers |
//! | `disk` | what all queues share: the image, its rate limit, and how a request is carried out |
//! | `queue` | from chains to requests and back |
//! | `job` | what a queue's thread does |
//! | `counters` | what has been read and written |
//! | `handle` | the device, once it is on its bus |

mod config;
mod counters;
mod device;
mod disk;
mod engine;
pub mod features;
mod handle;
mod job;
mod pending;
pub mod queue;
mod request;

pub use counters::BlkCounters;
pub use device::{Blk, BlkOptions, IoChoice};
pub use disk::Disk;
pub use handle::BlkHandle;

#[cfg(test)]
mod tests;
