//! vhost-user: a device's queues are another process's, which has guest memory mapped and is reached
//! by a socket (QEMU's docs/interop/vhost-user.rst; this side is the front end, the other the
//! server).
//!
//! The server is kicked by the ioeventfds and interrupts by the irqfds directly: while it lives, no
//! thread of the monitor is in between. It may die, though, or not reply. Then it is cut off, and
//! [`Outstanding`] says which chains the driver still waits for, so that the device can complete them.

mod channel;
mod front_end;
mod outstanding;
mod state;

pub use front_end::{FrontEnd, VhostUserError};
pub use outstanding::{Inflight, Outstanding};

#[cfg(test)]
pub(crate) mod tests;
