//! What minivmm and the agent in its guests say to each other.
//!
//! The agent is a program in the guest. As its init ([`boot`]) it connects to the host by
//! [`BOOT_PORT`] of vsock, learns what the guest is to be, makes it so, and says how far it is. In
//! every guest, also in one whose init is another program, it listens on [`AGENT_PORT`] for
//! sessions ([`session`]): commands and copies.
//!
//! | connection | opened by | carries |
//! | --- | --- | --- |
//! | boot | the guest, to [`BOOT_PORT`] of the host | [`boot::FromInit`] and [`boot::ToInit`] |
//! | session | the host, to [`AGENT_PORT`] of the guest | a [`session::Request`], then what that says |
//!
//! A message is its length, 4 bytes with the lowest first, and its fields in the form of the crate
//! postcard. A stream of bytes (a command's input and output, a copy) is a connection of its own, so
//! that the flow control and the half-close of vsock are its own.

pub mod boot;
pub mod copy;
mod message;
pub mod session;

pub use message::{Inbox, LONGEST, MessageError, read, write};

/// Both ends must be of the same version, and each says its own first.
pub const VERSION: u32 = 1;

/// The agent's port in the guest.
pub const AGENT_PORT: u32 = 28022;

/// The host's port that the guest's init connects to.
pub const BOOT_PORT: u32 = 28023;
