//! VMs that others find by name: `ps` and the commands beside it. Each test sees its own VMs alone
//! (`harness/runtime.rs`); the guests are a few instructions each (`harness/tiny.rs`).

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

#[path = "control/console.rs"]
mod console;
#[path = "control/detached.rs"]
mod detached;
#[path = "control/ends.rs"]
mod ends;
#[path = "control/events.rs"]
mod events;
mod harness;
#[path = "control/host.rs"]
mod host;
#[path = "control/names.rs"]
mod names;
#[path = "harness/session.rs"]
mod session;
#[path = "control/shown.rs"]
mod shown;
#[path = "control/stats.rs"]
mod stats;
#[path = "harness/tiny.rs"]
mod tiny;
#[path = "control/wait.rs"]
mod wait;
