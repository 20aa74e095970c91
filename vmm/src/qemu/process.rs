//! QEMU as a process: started with its descriptors, followed to its end, and never outliving minivmm.

use std::io::{self, IsTerminal};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{Plan, QemuError, control, hints, terminal};
use crate::child;
use crate::config::ConsoleTarget;
use crate::exit::Exit;
use crate::handover::Handover;
use crate::limits;
use crate::signals::{self, not_ignored};

/// What ends minivmm, and QEMU with it.
const SIGNALS: [i32; 4] = [SIGTERM, SIGHUP, SIGINT, SIGQUIT];

/// Starts QEMU and follows it to its end.
pub(super) fn supervise(
    mut command: Command,
    descriptors: Vec<OwnedFd>,
    control: Option<UnixStream>,
    plan: &Plan,
) -> Result<u8, QemuError> {
    let handover = Handover::new(descriptors).map_err(QemuError::Descriptors)?;
    handover.attach(&mut command);
    die_together(&mut command);
    command.stderr(Stdio::piped());
    if let Some(machine) = &plan.machine
        && (!machine.keys || machine.console != ConsoleTarget::Stdio)
    {
        // Ctrl-C of the terminal is for minivmm, which presses the power button.
        command.process_group(0);
        if io::stdin().is_terminal() {
            command.stdin(Stdio::null());
        }
    }
    let signals = Signals::new([not_ignored(&SIGNALS), vec![SIGCHLD]].concat())
        .map_err(QemuError::Signals)?;
    let terminal = terminal::SavedTerminal::save();
    let mut qemu = command
        .spawn()
        .map_err(|error| QemuError::Run(plan.qemu.clone(), error))?;
    drop(handover);
    // It holds QEMU's end of the control socket no longer than QEMU does.
    drop(command);
    let stderr = qemu.stderr.take().map(hints::Relay::start);
    let stderr = stderr.transpose().map_err(QemuError::Follow)?;
    let (exit, status) = end_of(qemu, control, signals).map_err(QemuError::Follow)?;
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

/// Waits for QEMU's end: as the native monitor's guest over the control socket, else as any program's.
fn end_of(
    mut qemu: Child,
    control: Option<UnixStream>,
    signals: Signals,
) -> io::Result<(Option<Exit>, ExitStatus)> {
    match control {
        Some(socket) => {
            let exit = control::follow(&mut qemu, socket, signals)?;
            Ok((exit, qemu.wait()?))
        }
        None => Ok((None, child::wait(qemu, signals, &SIGNALS)?)),
    }
}

/// Has the kernel kill the program when this process dies.
fn die_together(command: &mut Command) {
    let parent = getpid();
    let arm = move || {
        signals::restore()?;
        limits::restore()?;
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have died before that.
        if getppid() == Some(parent) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    };
    // SAFETY: what runs between fork and exec makes system calls alone: it allocates nothing and takes no lock.
    unsafe { command.pre_exec(arm) };
}
