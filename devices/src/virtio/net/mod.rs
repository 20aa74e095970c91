//! The network device (virtio 1.2, 5.1) over a queue of a tap or macvtap interface.
//!
//! | file | what |
//! | --- | --- |
//! | `features` | feature bits, and which offloads of the tap follow from them |
//! | `device` | the virtio device: configuration, activation, reset |
//! | `link` | whether the guest sees a link |
//! | `worker` | the thread of a queue pair: maps wake-ups to queues |
//! | `rx`, `tx` | the data path: chains to readv and writev, with no copy between |
//! | `observe` | what a guest's own frames tell about it |
//! | `ctrl` | the control queue: how many pairs are in use |
//! | `backend`, `tap` | where frames come from and go to |

pub mod backend;
pub mod ctrl;
mod device;
pub mod features;
pub mod link;
pub mod observe;
pub mod rx;
pub mod tap;
pub mod tx;
pub mod worker;

pub use device::{Net, NetConfig};

#[cfg(test)]
mod tests;
