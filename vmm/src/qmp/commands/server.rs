//! What the server itself is.

use serde::Serialize;

use super::{Command, GROUPS, NoArguments};
use crate::qmp::message;

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "query-commands",
        run: |_, arguments, reply| {
            arguments.answer(reply, |NoArguments {}| {
                let all = GROUPS.iter().copied().flatten();
                let names = all.map(|command| command.name).chain(["qmp_capabilities"]);
                let mut all: Vec<_> = names.map(|name| CommandInfo { name }).collect();
                all.sort_by_key(|info| info.name);
                Ok(all)
            });
        },
    },
    Command {
        name: "query-version",
        run: |_, arguments, reply| arguments.answer(reply, |NoArguments {}| Ok(message::version())),
    },
];

/// CommandInfo of QEMU.
#[derive(Debug, Serialize)]
struct CommandInfo {
    name: &'static str,
}
