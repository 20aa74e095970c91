//! What is counted of the guest.

use super::{Command, NoArguments};

pub(super) const COMMANDS: &[Command] = &[Command {
    name: "x-minivmm-stats",
    run: |control, arguments, reply| {
        arguments.answer(reply, |NoArguments {}| Ok(control.stats()));
    },
}];
