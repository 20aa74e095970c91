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

use std::error::Error;

mod connection;
mod copy;
mod pump;
mod running;
mod server;
mod start;
mod unpack;
mod user;

pub use server::serve;

/// An error with all its reasons.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
