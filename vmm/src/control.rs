//! The control thread: [`event_loop`] waits for events and holds the run state, [`handle`] takes what other threads want
//! done, and [`exit`] says how a guest ends.

pub mod event_loop;
pub mod exit;
pub mod handle;

/// Whether a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Its vCPUs and devices run.
    Running,
    /// Nothing of it runs, and it can go on.
    Paused,
    /// It has ended, or is about to.
    Ended,
}
