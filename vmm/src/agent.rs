//! The client of the agent in a guest (`vmm/agent`): commands in it, and copies.
//!
//! - `connect`: finds the agent of a VM, and opens connections to it
//! - `copy`: files, from the guest and to it
//! - `session`: a command, from its start to its end
//! - `streams`: its input and output, which this process passes on
//!
//! What the guest says is not trusted: nothing here waits for it beyond a signal of the user's, or keeps more of it than a
//! message.

mod connect;
mod copy;
mod session;
mod streams;

pub use connect::{Agent, ConnectError};
pub use copy::{Bounds, CopyError, copy_from, copy_to, copy_to_place, means_contents};
pub use session::{FORWARDED, Outcome, Reaction, Session, SessionError};
