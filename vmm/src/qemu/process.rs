//! QEMU as a process: started with its descriptors, followed to its end, and never outliving minivmm.

use std::cell::RefCell;
use std::io::{self, IsTerminal};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{ExitStatus, Stdio};
use std::rc::Rc;
use std::sync::Arc;

use event_manager::MutEventSubscriber;

use super::console::{Console, Running};
use super::control::{Begun, Control};
use super::guest::{Guest, Terms};
use super::monitor::{Forward, Monitor};
use super::nics::Followed;
use super::{Plan, QemuError, failed_to, hints};
use crate::child::{self, Arrivals, Child, Program};
use crate::config::{Config, ConsoleTarget, GRACE_WITH_DISKS};
use crate::control::exit::Exit;
use crate::events::EventHub;
use crate::qmp::server::Server;
use crate::qmp::socket::Listener;
use crate::signals::ENDING;
use crate::tty;

/// What minivmm follows QEMU by, and is asked by.
pub(super) struct Attachment {
    /// minivmm's end of QEMU's monitor.
    pub monitor: UnixStream,
    /// What the guest does first (RunState of QEMU).
    pub first_status: &'static str,
    /// Where clients connect.
    pub qmp: Vec<Listener>,
    /// The guest's console, if that is ours.
    pub console: Option<Console>,
    /// In order.
    pub nics: Vec<Followed>,
    /// What else is followed.
    pub followers: Vec<Box<dyn MutEventSubscriber>>,
    /// Where the NICs' news is published.
    pub events: Arc<EventHub>,
    /// What is done once the guest is there.
    pub started: Begun,
}

/// Starts QEMU and follows it to its end: how its guest has ended, if QEMU has not ended of itself, and the exit status.
pub(super) fn supervise(
    mut program: Program,
    mut attachment: Attachment,
    plan: &Plan,
) -> Result<(Option<Exit>, u8), QemuError> {
    let command = &mut program.command;
    command.stderr(Stdio::piped());
    if let Some(machine) = &plan.machine {
        // Ctrl-C of the terminal is for minivmm, which presses the power button.
        command.process_group(0);
        if machine.console == ConsoleTarget::Stdio || io::stdin().is_terminal() {
            command.stdin(Stdio::null());
        }
    }
    let signals = Arrivals::new(&ENDING).map_err(failed_to("catch signals"))?;
    // The console's makes it raw, and restores it.
    let terminal = attachment.console.is_none().then(tty::Saved::save);
    // ARGS may name what the caller has opened.
    program.inherits = true;
    // It holds QEMU's end of the control socket no longer than QEMU does.
    let qemu = program.spawn();
    let mut qemu = qemu.map_err(|error| QemuError::Run(plan.qemu.path.clone(), error))?;
    let stderr = qemu.stderr().map(hints::Relay::start);
    let stderr = stderr
        .transpose()
        .map_err(failed_to("follow QEMU to its end"))?;
    let console = attachment.console.take().map(Console::start).transpose();
    let console = console.map_err(failed_to("pass the console on"))?;
    let ended = follow(qemu, attachment, console.as_ref(), signals, plan);
    let (exit, status) = ended.map_err(failed_to("follow QEMU to its end"))?;
    drop(terminal);
    if let Some(console) = console {
        console.finish();
    }
    let hint = stderr.and_then(hints::Relay::hint);
    let code = match &exit {
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
    Ok((exit, code))
}

/// Follows a QEMU that runs to its end.
fn follow(
    qemu: Child,
    attachment: Attachment,
    console: Option<&Running>,
    signals: Arrivals,
    plan: &Plan,
) -> io::Result<(Option<Exit>, ExitStatus)> {
    let events = attachment.events;
    let monitor = Rc::new(RefCell::new(Monitor::new(
        attachment.monitor,
        attachment.first_status,
    )?));
    let nics = attachment.nics.iter();
    let machine = plan.machine.as_ref();
    let forward = Box::new(Forward {
        monitor: Rc::clone(&monitor),
        version: plan.qemu.version.clone(),
        grace: machine.map_or(GRACE_WITH_DISKS, Config::grace),
        nics: nics
            .map(|nic| (nic.mac, Arc::clone(&nic.observer)))
            .collect(),
    });
    let followers = attachment.nics.into_iter().map(|nic| nic.follower);
    let mut others: Vec<_> = followers.map(boxed).collect();
    others.extend(attachment.followers);
    if !attachment.qmp.is_empty() {
        others.push(boxed(Server::new(attachment.qmp, &events, forward)?));
    }
    let server = console.and_then(|console| console.server.clone());
    others.extend(server.map(boxed));
    let keys = console.map(|console| Arc::clone(&console.exit));
    let guest = machine.map(|machine| {
        let terms = Terms {
            grace: machine.grace(),
            reboot: machine.reboot,
            memory: machine.memory_after_balloon(),
        };
        let (monitor, events) = (Rc::clone(&monitor), Arc::clone(&events));
        Guest::new(monitor, events, terms)
    });
    let control = Control::new(qemu, monitor, signals, guest, keys, events);
    control.when_started(attachment.started).run(others)
}

fn boxed(subscriber: impl MutEventSubscriber + 'static) -> Box<dyn MutEventSubscriber> {
    Box::new(subscriber)
}
