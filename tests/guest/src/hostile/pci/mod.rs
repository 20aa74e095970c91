//! What is wrong on the PCI bus only.
//!
//! | file | attacks |
//! | --- | --- |
//! | `bar.rs` | the structures in BAR 0, and BAR 0 moved and switched off |
//! | `messages.rs` | MSI-X: the table, the control register, the pending bits |
//! | `config.rs` | configuration space by either mechanism, and the window that it has into BAR 0 |

mod bar;
mod config;
mod messages;

use super::{Failure, Runner, settle};
use crate::virtio::pci::PciDevice;

/// Runs all of them.
pub fn run(runner: &mut Runner<'_>, nic: PciDevice) {
    bar::run(runner, nic);
    messages::run(runner, nic);
    config::run(runner, nic);
}
