//! Whether the guest runs, and its end.

use serde::Serialize;

use super::{Command, Done, NoArguments};
use crate::control::RunState;

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "query-status",
        run: |control, arguments, reply| {
            arguments.answer(reply, |NoArguments {}| Ok(Status::of(control.state())));
        },
    },
    Command {
        name: "stop",
        run: |control, arguments, reply| match arguments.read() {
            Ok(NoArguments {}) => control.pause(Box::new(|| reply.send(Ok(Done {})))),
            Err(error) => reply.fail(error),
        },
    },
    Command {
        name: "cont",
        run: |control, arguments, reply| {
            arguments.answer(reply, |NoArguments {}| {
                control.resume();
                Ok(Done {})
            });
        },
    },
    Command {
        name: "system_powerdown",
        run: |control, arguments, reply| {
            arguments.answer(reply, |NoArguments {}| {
                control.press_power_button();
                Ok(Done {})
            });
        },
    },
    Command {
        name: "system_reset",
        run: |control, arguments, reply| {
            arguments.answer(reply, |NoArguments {}| {
                control.reset();
                Ok(Done {})
            });
        },
    },
    Command {
        name: "quit",
        run: |control, arguments, reply| {
            arguments.answer(reply, |NoArguments {}| {
                control.end();
                Ok(Done {})
            });
        },
    },
];

/// StatusInfo of QEMU.
#[derive(Debug, Serialize)]
struct Status {
    running: bool,
    singlestep: bool,
    status: &'static str,
}

impl Status {
    fn of(state: RunState) -> Self {
        Self {
            running: state == RunState::Running,
            singlestep: false,
            status: status(state),
        }
    }
}

/// RunState of QEMU.
pub(super) fn status(state: RunState) -> &'static str {
    match state {
        RunState::Running => "running",
        RunState::Paused => "paused",
        RunState::Ended => "shutdown",
    }
}
