//! The few commands of QEMU's human monitor that programs use.

use devices::virtio::net::NetHandle;
use serde::Deserialize;

use super::{Command, block, run};
use crate::control::event_loop::Control;
use crate::disk::Disk;

pub(super) const COMMANDS: &[Command] = &[Command {
    name: "human-monitor-command",
    run: |control, arguments, reply| {
        arguments.answer(reply, |line: Line| Ok(answer(control, &line.command_line)));
    },
}];

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Line {
    command_line: String,
}

/// What the human monitor prints.
fn answer(control: &Control, line: &str) -> String {
    let words: Vec<_> = line.split_whitespace().collect();
    let paragraphs: Vec<_> = match words[..] {
        ["info", "status"] => vec![format!("VM status: {}\r\n", run::status(control.state()))],
        ["info", "network"] => vec![control.nics.iter().map(|nic| network(nic)).collect()],
        ["info", "block"] => control.disks.iter().map(disk).collect(),
        [] => Vec::new(),
        _ => vec![format!("unknown command: '{}'\r\n", words.join(" "))],
    };
    paragraphs.join("\r\n")
}

fn network(nic: &NetHandle) -> String {
    let mac = nic.config().mac().map(|byte| format!("{byte:02x}"));
    let (name, mac) = (nic.name(), mac.join(":"));
    format!("{name}: index=0,type=nic,model=virtio-net,macaddr={mac}\r\n")
}

fn disk(disk: &Disk) -> String {
    let image = &disk.config.image;
    let (name, format) = (&disk.name, block::format_name(disk));
    let readonly = if image.readonly { ", read-only" } else { "" };
    let direct = if image.direct { ", direct" } else { "" };
    format!(
        "{name} (#{name}): {} ({format}{readonly})\r\n    Cache mode:       writeback{direct}\r\n",
        image.path.display()
    )
}
