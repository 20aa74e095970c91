//! `minivmm run -- true` beside virtme-ng's `vng -- true`: the same kernel, the root of this machine, a user network, in
//! turns. Where KVM cannot run Linux both emulate. `vng` is looked for as other monitors are, and takes the kernel's modules
//! from /lib/modules.
//!
//! What it costs beside the kernel alone, and where, is counted by `linux run` (`linux/runs.rs`).

use std::process::{Command, Stdio};
use std::time::Instant;

use crate::harness::assets::assets;
use crate::harness::process::Killed;
use crate::harness::vm;
use crate::lab::machine::peer;
use crate::lab::{Place, place};

use super::native::Effort;
use super::report::Table;

/// The name of the row that others are compared with.
const VNG: &str = "vng";

/// One table: exec to exit.
pub fn run(effort: Effort) -> Vec<Table> {
    let title = "a command in a guest with a user network, exec to exit";
    eprintln!("{title}");
    let mut table = Table::new(title, &[("s", 2)]);
    let vng = vng();
    if vng.is_none() {
        eprintln!("vng: not here");
    }
    for _ in 0..if effort.quick { 3 } else { 5 } {
        table.add("minivmm run", &[seconds(minivmm())]);
        if let Some(vng) = &vng {
            table.add(VNG, &[seconds(vng())]);
        }
    }
    table.add_ratio("of vng", 0, VNG);
    vec![table]
}

fn minivmm() -> Command {
    let mut command = Command::new(vm::binary());
    command.args(["run", "--user-net", "--kernel"]);
    command.arg(assets().bzimage()).arg("--modules");
    command.arg(assets().modules()).args(["--", "true"]);
    command
}

/// What makes virtme-ng's command, where it is installed.
fn vng() -> Option<impl Fn() -> Command> {
    let program = peer("vng")?;
    let emulates = place() == Place::Lab;
    Some(move || {
        let mut command = Command::new(&program);
        command.arg("--run").arg(assets().bzimage());
        command.args(emulates.then_some("--disable-kvm"));
        command.args(["--network", "user", "--", "true"]);
        command
    })
}

/// How long a program takes; nothing if it fails.
fn seconds(mut command: Command) -> Option<f64> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let start = Instant::now();
    let mut child = Killed(command.spawn().ok()?);
    let status = child.wait().ok()?;
    let took = start.elapsed().as_secs_f64();
    if !status.success() {
        eprintln!("{command:?}: {status}");
    }
    status.success().then_some(took)
}
