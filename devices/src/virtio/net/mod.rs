//! The network device (virtio 1.2, 5.1) over a queue of a tap or macvtap interface, or over a
//! stream to a program that forwards its frames.
//!
//! | file | what |
//! | --- | --- |
//! | `features` | feature bits, and which offloads of the backend follow from them |
//! | `device` | the virtio device: activation, reset |
//! | `state` | what a device saves, to go on elsewhere |
//! | `config` | the configuration space: MAC address, link, MTU |
//! | `pair` | what a queue pair's thread does: maps wake-ups to queues |
//! | `pace` | when a thread pauses, so that it finds many frames at once |
//! | `rx`, `tx` | the data path: chains to readv and writev, with no copy between |
//! | `vhost` | the data path in the kernel |
//! | `ctrl` | the control queue: what the driver commands |
//! | `filter` | which frames the driver wants |
//! | `rx_filter` | the same as QMP shows it |
//! | `hooks` | what happens to each frame besides |
//! | `observe` | what a guest's own frames show of it |
//! | `capture`, `pcapng` | what passes, recorded in a file |
//! | `checksum` | DHCP answers for clients that read raw frames |
//! | `counters` | what has passed |
//! | `handle` | the device, once it is on its bus |
//! | `backend` | where frames come from and go to: what the device needs of it |
//! | `tap` | a tap or macvtap |
//! | `stream` | a program at the other end of a socket, and which frames it does not get |

pub mod backend;
pub mod capture;
mod checksum;
pub mod config;
pub mod counters;
pub mod ctrl;
mod device;
pub mod features;
pub mod filter;
mod handle;
pub mod hooks;
pub mod observe;
mod pace;
pub mod pair;
mod pcapng;
pub mod rx;
mod rx_filter;
mod state;
pub mod stream;
pub mod tap;
pub mod tx;
pub mod vhost;

pub use config::NetConfig;
pub use device::{Net, NetOptions};
pub use handle::NetHandle;
pub use rx_filter::{RxFilterInfo, RxState};

#[cfg(test)]
mod tests;
