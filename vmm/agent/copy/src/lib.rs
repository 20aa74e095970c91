//! Copies of files between host and guest, for both ends: one [`pack()`]s and the other [`unpack()`]s.
//!
//! What passes is a tree in the order in which it is made: each entry has a name of one part, and lies in the directory that was
//! entered last ([`agent_protocol::copy`]). So there are no paths, and no link that one could lead through: whatever the
//! other end says, [`unpack()`] writes nothing outside of its target.

mod pack;
mod place;
mod unpack;

pub use pack::{PackError, pack};
pub use place::Place;
pub use unpack::{Limits, Ownership, Target, UnpackError, unpack};
