//! The control thread: [`event_loop`] waits for events, [`exit`] says how a guest ends.

pub mod event_loop;
pub mod exit;
