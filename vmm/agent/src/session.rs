//! Sessions: what the host asks for on a connection.
//!
//! - `server`: all of them, in one thread
//! - `connection`: one that has only been accepted
//! - `running`: a command, from its start to its end
//! - `start`: how a command is started
//! - `user`: who runs it
//! - `unpack`: a root file system that the host sends
//! - `pump`: one direction of a stream of its
//! - `copy`: files, to and from the host

mod connection;
mod copy;
mod pump;
mod running;
mod server;
mod start;
mod unpack;
mod user;

pub use server::serve;
