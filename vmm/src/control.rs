//! The control thread: [`event_loop`] waits for events and holds the run state, [`handle`] takes what other threads want
//! done, [`reset`] has a guest begin again, and [`exit`] says how it ends.

use std::io;

use devices::bus::{RestoreError, SaveError};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::kvm::state::KvmState;
use crate::kvm::vm::VmError;

pub mod event_loop;
pub mod exit;
pub mod handle;
pub mod reset;

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

/// What a guest is besides its memory: its vCPUs, interrupt controllers, timer, clock and devices.
#[derive(Debug, Serialize, Deserialize)]
pub struct GuestState {
    kvm: KvmState,
    devices: Value,
}

/// What cannot be done with a guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// It has ended.
    #[error("the guest has ended")]
    Ended,
    /// It runs, or was resumed while it was to be paused.
    #[error("the guest is not paused")]
    NotPaused,
    /// It has no disk of this number.
    #[error("the guest has no disk {0}")]
    NoDisk(usize),
    /// A disk's image cannot have this size.
    #[error("cannot resize disk {0} to {1} bytes")]
    Resize(usize, u64, #[source] io::Error),
    /// KVM refuses something.
    #[error(transparent)]
    Kvm(#[from] VmError),
    /// A device cannot be saved.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// A device does not take its state.
    #[error(transparent)]
    Devices(#[from] RestoreError),
}
