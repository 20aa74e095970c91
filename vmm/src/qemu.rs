//! `minivmm qemu`: QEMU on the same macvtaps, for what a minimal monitor leaves out.
//!
//! | file | what it is |
//! | --- | --- |
//! | `extras.rs` | user networks, shares and sockets, which are served outside QEMU |
//! | `nics.rs` | the numbers of the descriptors, and what is known of a NIC before it is made |
//! | `args.rs` | QEMU's command line; pure |
//! | `conflict.rs` | what in ARGS would clash with it; pure |
//! | `binary.rs`, `accel.rs` | which QEMU, and what runs the guest's code |
//! | `process.rs` | QEMU as a process, from its start to its end |
//! | `console.rs` | the console of a guest of `--kernel` |
//! | `control.rs` | QEMU followed to its end, in one event loop with the clients of the QMP sockets |
//! | `guest.rs` | the end of a guest of `--kernel` |
//! | `monitor.rs` | minivmm's end of QEMU's monitor, and clients' commands on their way there |
//! | `hints.rs` | QEMU's stderr |
//! | `dry_run.rs`, `script.rs` | `--dry-run`: what would be made, and the script of it |
//!
//! # Why minivmm stays
//!
//! An open queue would keep a private macvtap alive by itself, so minivmm could *become* QEMU. It stays as QEMU's parent
//! to explain failures, to restore the terminal when QEMU is killed, to delete a macvtap of the host's namespace, and,
//! with `--kernel`, to distinguish the guest's panic from its reboot. QEMU ends with it, whichever way it ends
//! ([`crate::child`]); the kernel deletes a private macvtap with the last of its queues.

mod accel;
mod args;
mod binary;
mod conflict;
mod console;
mod control;
mod dry_run;
mod extras;
mod guest;
mod hints;
mod monitor;
mod nics;
mod process;
mod script;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs;
use std::fs::File;
use std::io::Write;
use std::io::{self, IsTerminal};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use net::{FrameListener, LinkGuard, MacAddr, TapInfo};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::child::{self, Program};
use crate::cli::{Accel, QemuArgs};
use crate::config::{BalloonError, Config, ConsoleTarget, NicSource, QemuNic, QmpSocket};
use crate::control::exit::{Exit, chain};
use crate::detach;
use crate::events::Event;
use crate::events::start::{Start, StartedNic};
use crate::events::writer::EventWriter;
use crate::files::{Files, Role, SharedFile};
use crate::instance::{Instance, InstanceError, Serves};
use crate::nic::acquire::{VHOST_NET, open_vhost};
use crate::nic::registry::{Claim, Runs};
use crate::nic::{self, HostNic, Inherited, NicError, host_link};
use crate::qmp::socket::{Listener, SocketError};
use crate::resources::{ResourceError, open_events};
use crate::run::tie::Tie;
use crate::shares::ShareError;
use crate::tty::may_read;
use crate::vsock::VsockError;

use accel::Engine;
use args::{Line, NetDevice};
use binary::Qemu;
use conflict::OwnDevice;
use console::Console;
use control::Begun;
use extras::Extras;
use nics::{Expected, Numbers};
use process::Attachment;

pub use binary::BinaryError;
pub use conflict::ConflictError;
pub use dry_run::dry_run;

/// Why QEMU was not run.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    #[error(transparent)]
    Binary(#[from] BinaryError),
    #[error(transparent)]
    Conflict(#[from] ConflictError),
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error(transparent)]
    Nic(#[from] NicError),
    #[error(transparent)]
    HostLink(#[from] host_link::HostLinkError),
    #[error(transparent)]
    File(#[from] SharedFile),
    #[error("cannot open {VHOST_NET} for vhost=on: `modprobe vhost_net`, or omit vhost=on")]
    Vhost(#[source] io::Error),
    #[error("QEMU {2}.{3} or newer is needed for {0}: this one has no {1}")]
    Old(&'static str, &'static str, u64, u64),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Vsock(#[from] VsockError),
    #[error("cannot read the {1} of `{0}`")]
    Link(String, &'static str, #[source] io::Error),
    #[error(transparent)]
    Qmp(#[from] SocketError),
    #[error(transparent)]
    Events(#[from] Box<ResourceError>),
    #[error("cannot write the console to {0}")]
    Console(String, #[source] io::Error),
    #[error("cannot run {0:?}")]
    Run(PathBuf, #[source] io::Error),
    #[error("cannot {0}")]
    Host(&'static str, #[source] io::Error),
}

fn failed_to(what: &'static str) -> impl Fn(io::Error) -> QemuError {
    move |error| QemuError::Host(what, error)
}

/// What is settled before anything is made.
#[derive(Debug)]
struct Plan {
    qemu: Qemu,
    engine: Option<Engine>,
    machine: Option<Config>,
    /// Ctrl-A is the monitor's key.
    keys: bool,
    ids: Vec<String>,
    numbers: Vec<Numbers>,
    own_devices: Vec<Option<OwnDevice>>,
}

impl Plan {
    fn new(args: &QemuArgs, follow: bool) -> Result<Self, QemuError> {
        let ids: Vec<_> = (0..args.macvtap.len())
            .map(|n| format!("macvtap{n}"))
            .collect();
        let has_kernel = args.machine.kernel.is_some();
        let has_sockets = args.vsock.is_some() || args.runner.is_some();
        let shares = !args.share.is_empty() || has_sockets;
        let machine = has_kernel.then(|| Config {
            shared_memory: shares,
            ..args.machine.clone().into()
        });
        if shares && machine.is_none() && !conflict::shares_memory(&args.args) {
            return Err(ConflictError::PrivateMemory.into());
        }
        machine.as_ref().map_or(Ok(()), Config::check_balloon)?;
        machine.as_ref().map_or(Ok(()), check_files)?;
        let vhost = open_vhost();
        if args.macvtap.iter().any(|nic| nic.vhost == Some(true)) {
            open_vhost().map_err(QemuError::Vhost)?;
        }
        let numbers = nics::number(&args.macvtap, vhost.is_ok(), child::FIRST, !follow);
        conflict::check(&args.args, &all_ids(args, &ids), &taken(&numbers))?;
        let nics = ids.iter().zip(&args.macvtap);
        let own_devices = nics
            .map(|(id, nic)| own_device(args, id, nic))
            .collect::<Result<_, _>>()?;
        let engine = engine(args, has_kernel)?;
        let qemu = binary::find(args.qemu.as_deref())?;
        Ok(Self {
            engine: engine.map(|wanted| accel::choose(wanted, &qemu.path)),
            qemu,
            machine,
            keys: io::stdin().is_terminal() && may_read(),
            ids,
            numbers,
            own_devices,
        })
    }

    /// The n-th NIC, once its address is known.
    fn nic(&self, n: usize, nic: &QemuNic, mac: MacAddr, mtu: u32) -> Result<NetDevice, QemuError> {
        let own = self.own_devices[n].as_ref();
        own.map_or(Ok(()), |own| own.check(mac))?;
        Ok(NetDevice {
            id: self.ids[n].clone(),
            fds: self.numbers[n].fds.clone(),
            vhost: self.numbers[n].vhost.clone(),
            mac,
            mtu,
            device: self.own_devices[n].is_none().then(|| nic.device.clone()),
        })
    }

    /// QEMU's arguments; a script's has no monitor of minivmm's.
    fn line(
        &self,
        nics: &[NetDevice],
        control: Option<args::Control>,
        extras: &[OsString],
        args: &[OsString],
    ) -> Vec<OsString> {
        let line = Line {
            machine: self.machine.as_ref(),
            keys: self.keys,
            engine: self.engine,
            nics,
            control,
            extras,
            args,
        };
        line.build()
    }
}

/// The numbers of the NICs' descriptors.
fn taken(numbers: &[Numbers]) -> Vec<RawFd> {
    let of_nic = |n: &Numbers| [&n.fds[..], &n.vhost].concat();
    numbers.iter().flat_map(of_nic).collect()
}

/// The netdevs' ids, and those that the user gives our devices.
fn all_ids(args: &QemuArgs, ids: &[String]) -> Vec<String> {
    let properties = args.macvtap.iter().flat_map(|nic| &nic.device);
    let given = properties.filter(|(key, _)| key == "id");
    ids.iter()
        .cloned()
        .chain(given.map(|(_, id)| id.clone()))
        .collect()
}

/// The device of ARGS for a NIC, if there is one, with the address that the macvtap has or will have, as far as that is known.
fn own_device(
    args: &QemuArgs,
    id: &str,
    nic: &QemuNic,
) -> Result<Option<OwnDevice>, ConflictError> {
    let Some(own) = conflict::own_device(&args.args, id)? else {
        return Ok(None);
    };
    if let Some((key, _)) = nic.device.first() {
        return Err(ConflictError::Properties(own.text, key.clone()));
    }
    if let NicSource::Macvtap(spec) = &nic.source {
        match nics::expected_mac(spec) {
            Expected::Known(mac) => own.check(mac)?,
            Expected::Random => return Err(ConflictError::RandomMac(own.text, own.mac)),
            Expected::Unknown => {}
        }
    }
    Ok(Some(own))
}

/// Refuses a console's file that would write over another one. A file that does not exist is QEMU's to complain of.
fn check_files(machine: &Config) -> Result<(), SharedFile> {
    let mut files = Files::standard(machine.console == ConsoleTarget::Stdio);
    let console = match &machine.console {
        ConsoleTarget::File(path) => Some(path),
        _ => None,
    };
    let disks = machine.disks.iter().map(|disk| &disk.image.path);
    let read = [(Role::Kernel, &machine.kernel)].into_iter();
    let read = read.chain(machine.initrd.iter().map(|path| (Role::Initrd, path)));
    let read = read.chain(disks.map(|path| (Role::Disk, path)));
    for (role, path) in read.chain(console.map(|path| (Role::Console, path))) {
        if let Ok(metadata) = fs::metadata(path) {
            files.add(role, path, &metadata)?;
        }
    }
    Ok(())
}

/// What to settle, unless ARGS do it.
fn engine(args: &QemuArgs, machine: bool) -> Result<Option<Accel>, ConflictError> {
    match (args.accel, conflict::chooses_accel(&args.args)) {
        (Some(_), true) => Err(ConflictError::Accel),
        (None, true) => Ok(None),
        (wanted, false) => Ok(wanted.or(machine.then_some(Accel::Auto))),
    }
}

/// Runs QEMU and returns the exit status: QEMU's, or with `--kernel` that of the native monitor.
///
/// # Errors
///
/// Says why QEMU was not run. Nothing is left of it then.
pub fn run(args: &QemuArgs, mut inherited: Inherited) -> Result<u8, QemuError> {
    let start = Start::new(Instant::now());
    let plan = Plan::new(args, true)?;
    let runs = match &args.machine.kernel {
        Some(kernel) => Runs::kernel(kernel),
        None => Runs::program(&plan.qemu.path),
    };
    // Dropped last.
    let serves = Serves {
        runs: &runs,
        qmp: &args.qmp,
        vsock: args.vsock.as_ref(),
        runner: args.runner,
    };
    let instance = Instance::of_program(args.name.as_ref(), &serves)?;
    let tied = args.runner.zip(instance.as_ref());
    let tied = tied.map(|(fds, instance)| instance.tie(fds, &mut inherited));
    let (vsock, tie) = tied.transpose()?.unzip();
    let vsock = vsock.or_else(|| args.vsock.clone());
    let args = &QemuArgs {
        vsock,
        ..args.clone()
    };
    let target = args.events.as_ref();
    let file = target.map(|target| open_events(&mut Files::default(), target, &mut inherited));
    let file = file.transpose().map_err(Box::new)?;
    let writer = file.map(|(file, place)| EventWriter::start(file, place, &start.events));
    // Waits at the end until the last event is written.
    let _writer = writer
        .transpose()
        .map_err(failed_to("start the events' thread"))?;
    let events = Arc::clone(&start.events);
    let place = (instance.as_ref(), tie);
    let ended = run_planned(start, &plan, args, inherited, &runs, place);
    let (code, reason, text) = match &ended {
        Ok((Some(exit), code)) => (*code, exit.reason(), exit.to_string()),
        Ok((None, 0)) => (0, "quit", "QEMU has ended".to_owned()),
        Ok((None, code)) => (
            *code,
            "failure",
            format!("QEMU has ended with status {code}"),
        ),
        Err(error) => (1, "failure", chain(error)),
    };
    if let Some(instance) = instance {
        instance.end(code, text.clone());
    }
    events.publish(Event::Exit { code, reason, text });
    ended.map(|(_, code)| code)
}

/// The same with all that can be settled before.
fn run_planned(
    start: Start,
    plan: &Plan,
    args: &QemuArgs,
    mut inherited: Inherited,
    runs: &Runs,
    (instance, tie): (Option<&Instance>, Option<Tie>),
) -> Result<(Option<Exit>, u8), QemuError> {
    let own = instance.map(Instance::qmp_path).map(QmpSocket::Path);
    let qmp = args.qmp.iter().chain(&own);
    let qmp = qmp.map(|socket| Listener::open(socket, &mut inherited));
    let qmp = qmp.collect::<Result<_, _>>()?;
    let console = open_console(plan, instance)?;
    start.note(|stages| &mut stages.opened);
    let mut taken = Taken::from_host(plan, args, inherited, runs)?;
    start.note(|stages| &mut stages.network);
    let first = taken.nics.first().map(|(claim, _)| &claim.nic().tap);
    let host_link = host_link::make(first, &args.host_link)?;
    let control = number_control(taken.descriptors.len(), console.is_some(), &args.args);
    let last = control.console.unwrap_or(control.config);
    let mut extras = Extras::start(plan, args, last + 1, &start.events)?;
    let attached = attach(control).map_err(failed_to("make a monitor for QEMU"))?;
    let (monitor, mut placed) = attached;
    let (console, theirs) = console.unzip();
    placed.extend(control.console.zip(theirs));
    placed.append(&mut extras.placed);
    let mut command = Command::new(&plan.qemu.path);
    command.args(plan.line(&taken.devices, Some(control), &extras.args, &args.args));
    log::debug!("running {command:?}");
    let mut program = Program::new(command);
    program.numbered = std::mem::take(&mut taken.descriptors);
    program.placed = placed;
    let locks = taken.nics.iter();
    let locks = locks.filter_map(|(claim, _)| claim.share().transpose());
    let locks = locks.collect::<Result<_, _>>();
    program.others = locks.map_err(failed_to("pass the queues on to QEMU"))?;
    let named = plan.ids.iter().zip(&taken.nics);
    let shown = named.map(|(id, (claim, _))| StartedNic::new(id, &claim.nic().tap));
    let shown = shown.chain(extras.nics.drain(..)).collect();
    // They give the claims up when QEMU has ended.
    let nics = plan.ids.iter().zip(taken.nics);
    let events = Arc::clone(&start.events);
    let nics = nics.map(|(id, (claim, listener))| nics::follow(claim, listener, id, &events));
    let nics = nics.collect::<Result<_, _>>();
    let attachment = Attachment {
        monitor,
        first_status: first_status(&args.args),
        qmp,
        console,
        nics: nics.map_err(failed_to("follow the NICs"))?,
        followers: std::mem::take(&mut extras.followers),
        started: has_started(start, instance, tie, shown),
        events,
    };
    let ended = process::supervise(program, attachment, plan);
    drop((taken.guards, host_link, extras));
    ended
}

/// Publishes that the guest is there; the command of one that is to be detached ends then.
fn has_started(
    start: Start,
    instance: Option<&Instance>,
    tie: Option<Tie>,
    nics: Vec<StartedNic>,
) -> Begun {
    let name = instance.map(|instance| instance.name().clone());
    Box::new(move || {
        tie.map_or(Ok(()), Tie::hold)?;
        start.note(|stages| &mut stages.vcpus);
        start.publish(name.clone(), nics);
        detach::started(name.as_ref())
    })
}

/// What a guest does with these options once QEMU has made it (RunState of QEMU).
fn first_status(args: &[OsString]) -> &'static str {
    match args::has_option(args, &["S"]) {
        true => "prelaunch",
        false if args::has_option(args, &["incoming"]) => "inmigrate",
        false => "running",
    }
}

/// The descriptors that QEMU's own options name.
pub fn descriptors_of(args: &[OsString]) -> Vec<RawFd> {
    conflict::named(args)
}

/// The console of a guest of `--kernel`, and QEMU's end of it.
fn open_console(
    plan: &Plan,
    instance: Option<&Instance>,
) -> Result<Option<(Console, OwnedFd)>, QemuError> {
    let Some(machine) = plan.machine.as_ref().filter(|m| m.console.has_port()) else {
        return Ok(None);
    };
    let listener = instance.map(|instance| Listener::bind(&instance.console_path()));
    let failed = |error| QemuError::Console(machine.console.place(), error);
    Console::open(&machine.console, listener.transpose()?).map_err(failed)
}

/// What is taken from the host for the NICs, in order.
#[derive(Debug, Default)]
struct Taken {
    devices: Vec<NetDevice>,
    /// What QEMU gets.
    descriptors: Vec<OwnedFd>,
    nics: Vec<(Claim, Option<FrameListener>)>,
    guards: Vec<LinkGuard>,
}

impl Taken {
    fn from_host(
        plan: &Plan,
        args: &QemuArgs,
        inherited: Inherited,
        runs: &Runs,
    ) -> Result<Self, QemuError> {
        let sources = args.macvtap.iter().map(|nic| &nic.source);
        let hosts = nic::acquire(sources, inherited, runs)?;
        let mut taken = Self::default();
        for (n, HostNic { claim, macvtap }) in hosts.into_iter().enumerate() {
            let TapInfo {
                lower, mac, mtu, ..
            } = macvtap.info();
            log::info!("NIC on {lower}: MAC {mac}, MTU {mtu}");
            let device = plan.nic(n, &args.macvtap[n], *mac, *mtu)?;
            taken.devices.push(device);
            taken.nics.push((claim, nic::acquire::listen(&macvtap)));
            let (queues, guard) = macvtap.into_parts();
            taken.descriptors.extend(queues);
            for _ in &plan.numbers[n].vhost {
                let vhost = open_vhost().map_err(QemuError::Vhost)?;
                taken.descriptors.push(vhost.into());
            }
            taken.guards.push(guard);
        }
        Ok(taken)
    }
}

/// The numbers of what minivmm's monitor takes, and the console, after those of the NICs' `descriptors`.
fn number_control(descriptors: usize, has_console: bool, args: &[OsString]) -> args::Control {
    let named = conflict::named(args);
    let socket = nics::free(child::FIRST + descriptors as RawFd, &named);
    let config = nics::free(socket + 1, &named);
    args::Control {
        socket,
        config,
        console: has_console.then(|| nics::free(config + 1, &named)),
    }
}

/// minivmm's end of QEMU's monitor, and what QEMU gets for it by its numbers.
fn attach(numbers: args::Control) -> io::Result<(UnixStream, Vec<(RawFd, OwnedFd)>)> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut config = File::from(memfd_create("minivmm-control", MemfdFlags::CLOEXEC)?);
    config.write_all(args::MONITOR.as_bytes())?;
    let placed = vec![
        (numbers.socket, theirs.into()),
        (numbers.config, config.into()),
    ];
    Ok((ours, placed))
}
