//! The memory balloon. What these count is the memory that the guest has left, as in QEMU.

use devices::virtio::balloon::BalloonHandle;
use serde::{Deserialize, Serialize};

use super::{Command, Done, NoArguments};
use crate::control::event_loop::Control;
use crate::qmp::{ErrorClass, QmpError};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "query-balloon",
        run: |control, arguments, reply| {
            arguments.answer(reply, |NoArguments {}| {
                let held_back = balloon(control)?.actual();
                let actual = control.memory_size().saturating_sub(held_back);
                Ok(BalloonInfo { actual })
            });
        },
    },
    Command {
        name: "balloon",
        run: |control, arguments, reply| {
            arguments.answer(reply, |Target { value }| {
                let balloon = balloon(control)?;
                let left = u64::try_from(value).ok().filter(|left| *left > 0);
                // By the name that it has inside QEMU.
                let wrong = || QmpError::new("Parameter 'target' expects a size");
                let left = left.ok_or_else(wrong)?;
                balloon.set_target(control.memory_size().saturating_sub(left));
                Ok(Done {})
            });
        },
    },
];

fn balloon(control: &Control) -> Result<&BalloonHandle, QmpError> {
    control.balloon.as_ref().ok_or_else(|| QmpError {
        class: ErrorClass::DeviceNotActive,
        desc: "No balloon device has been activated".into(),
    })
}

/// BalloonInfo of QEMU.
#[derive(Debug, Serialize)]
struct BalloonInfo {
    /// In bytes.
    actual: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    /// In bytes.
    value: i64,
}
