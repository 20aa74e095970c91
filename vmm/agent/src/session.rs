//! Sessions: what the host asks for on a connection.
//!
//! - `server`: all of them, in one thread
//! - `connection`: one that has only been accepted
//! - `running`: a command, from its start to its end
//! - `start`: how a command is started
//! - `user`: who runs it
//! - `pump`: one direction of a stream of its

mod connection;
mod pump;
mod running;
mod server;
mod start;
mod user;

pub use server::serve;
