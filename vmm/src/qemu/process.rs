//! QEMU as a process: started with its descriptors, followed to its end, and never outliving minivmm.

use std::io::{self, IsTerminal};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use signal_hook::consts::SIGCHLD;
use signal_hook::iterator::Signals;

use super::{Plan, QemuError, control, failed_to, hints};
use crate::child::{self, Arrivals, Child, Program};
use crate::config::{Config, ConsoleTarget};
use crate::control::exit::Exit;
use crate::signals::{ENDING, not_ignored};
use crate::tty;

/// Follows QEMU to its end.
type Follow = Box<dyn FnOnce(Child) -> io::Result<(Option<Exit>, ExitStatus)>>;

/// Catches the signals, for a guest that is followed over the control socket or for any program.
fn prepare(control: Option<UnixStream>, machine: Option<&Config>) -> io::Result<Follow> {
    if let Some(socket) = control {
        let signals = Signals::new([not_ignored(&ENDING), vec![SIGCHLD]].concat())?;
        let memory = machine.and_then(Config::memory_after_balloon);
        // The control socket is for a machine of ours.
        let grace = machine.map_or(Duration::ZERO, Config::grace);
        let follow = move |qemu| control::follow(qemu, socket, signals, memory, grace);
        return Ok(Box::new(follow));
    }
    let signals = Arrivals::new(&ENDING)?;
    Ok(Box::new(|qemu| Ok((None, qemu.wait(signals, &ENDING)?))))
}

/// Starts QEMU and follows it to its end.
pub(super) fn supervise(
    mut program: Program,
    control: Option<UnixStream>,
    plan: &Plan,
) -> Result<u8, QemuError> {
    let command = &mut program.command;
    command.stderr(Stdio::piped());
    if let Some(machine) = &plan.machine
        && (!plan.keys || machine.console != ConsoleTarget::Stdio)
    {
        // Ctrl-C of the terminal is for minivmm, which presses the power button.
        command.process_group(0);
        if io::stdin().is_terminal() {
            command.stdin(Stdio::null());
        }
    }
    let follow = prepare(control, plan.machine.as_ref()).map_err(failed_to("catch signals"))?;
    let terminal = tty::Saved::save();
    // ARGS may name what the caller has opened.
    program.inherits = true;
    // It holds QEMU's end of the control socket no longer than QEMU does.
    let qemu = program.spawn();
    let mut qemu = qemu.map_err(|error| QemuError::Run(plan.qemu.clone(), error))?;
    let stderr = qemu.stderr().map(hints::Relay::start);
    let stderr = stderr
        .transpose()
        .map_err(failed_to("follow QEMU to its end"))?;
    let (exit, status) = follow(qemu).map_err(failed_to("follow QEMU to its end"))?;
    drop(terminal);
    let hint = stderr.and_then(hints::Relay::hint);
    let code = match exit {
        Some(exit) => {
            exit.log();
            exit.code()
        }
        None => {
            let code = child::exit_code(status);
            if code > 128 {
                log::error!("QEMU was killed by signal {}", code - 128);
            }
            code
        }
    };
    if let (Some(hint), true) = (hint, code != 0) {
        log::error!("{hint}");
    }
    Ok(code)
}
