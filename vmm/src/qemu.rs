//! `minivmm qemu`: QEMU on the same macvtaps, for what a minimal monitor leaves out.
//!
//! | file | what it is |
//! | --- | --- |
//! | `nics.rs` | the keys of `--macvtap`, and the queues |
//! | `args.rs` | QEMU's command line; pure |
//! | `conflict.rs` | what in ARGS would clash with it; pure |
//! | `binary.rs`, `accel.rs` | which QEMU, and what runs the guest's code |
//! | `control.rs` | the end of a guest that was asked for by `--kernel`, by QMP |
//! | `hints.rs`, `terminal.rs` | QEMU's stderr, and the terminal after it |
//! | `dry_run.rs`, `script.rs` | `--dry-run`: what would be made, and the script of it |
//!
//! # Why minivmm stays
//!
//! An open queue would keep a private macvtap alive by itself, so minivmm could *become* QEMU. It stays as QEMU's parent
//! to explain failures, to give the terminal back when QEMU is killed, to delete a macvtap of the host's namespace, and,
//! with `--kernel`, to tell the guest's panic from its reboot. QEMU dies with it, whichever way it dies
//! (PR_SET_PDEATHSIG); the kernel deletes a private macvtap with the last of its queues.

mod accel;
mod args;
mod binary;
mod conflict;
mod control;
mod dry_run;
mod hints;
mod nics;
mod script;
mod terminal;

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use net::{AdoptError, Lease, MacAddr};
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::child;
use crate::cli::{Accel, QemuArgs};
use crate::config::{ConsoleTarget, NicSource};
use crate::exit::Exit;
use crate::handover::{self, Handover};
use crate::terminal::may_read;

use accel::Engine;
use args::{Card, Line, Machine};
use conflict::OwnDevice;
use nics::{Numbers, Queues};

pub use binary::BinaryError;
pub use conflict::ConflictError;
pub use dry_run::dry_run;
pub use nics::{NicRequest, parse_nic};

/// Why QEMU was not run.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// QEMU itself.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// ARGS.
    #[error(transparent)]
    Conflict(#[from] ConflictError),
    /// A macvtap.
    #[error(transparent)]
    Macvtap(#[from] net::Error),
    /// Descriptors of somebody else's.
    #[error("cannot use the file descriptors of --macvtap fd=")]
    Adopt(#[from] AdoptError),
    /// vhost-net that was asked for.
    #[error(
        "cannot open {} for vhost=on: `modprobe vhost_net`, or leave vhost=on out",
        nics::VHOST_NET
    )]
    Vhost(#[source] io::Error),
    /// The queues cannot be prepared for QEMU.
    #[error("cannot hand the queues over to QEMU")]
    Descriptors(#[source] io::Error),
    /// The interface of a dry run.
    #[error("cannot read the {what} of `{link}`")]
    Link {
        /// What is read.
        what: &'static str,
        /// As given.
        link: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No random numbers.
    #[error("cannot choose a MAC address")]
    Random(#[source] io::Error),
    /// Signals.
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    /// QEMU does not start.
    #[error("cannot run {0:?}")]
    Run(PathBuf, #[source] io::Error),
    /// QEMU cannot be followed.
    #[error("cannot follow QEMU to its end")]
    Follow(#[source] io::Error),
}

/// What is settled before anything is made.
#[derive(Debug)]
struct Plan {
    qemu: PathBuf,
    engine: Option<Engine>,
    machine: Option<Machine>,
    ids: Vec<String>,
    numbers: Vec<Numbers>,
    own_devices: Vec<Option<OwnDevice>>,
    /// The number of QEMU's end of the control socket.
    control: Option<RawFd>,
}

impl Plan {
    fn new(args: &QemuArgs, follow: bool) -> Result<Self, QemuError> {
        let ids: Vec<_> = (0..args.macvtap.len())
            .map(|n| format!("macvtap{n}"))
            .collect();
        let keys = io::stdin().is_terminal() && may_read();
        let machine = Machine::new(&args.machine, keys);
        let vhost = nics::open_vhost();
        if args.macvtap.iter().any(|nic| nic.vhost == Some(true)) {
            nics::open_vhost().map_err(QemuError::Vhost)?;
        }
        let numbers = nics::number(&args.macvtap, vhost.is_ok(), handover::FIRST);
        let mut taken: Vec<RawFd> = numbers
            .iter()
            .flat_map(|n| n.fds.iter().chain(&n.vhost).copied())
            .collect();
        let control =
            (follow && machine.is_some()).then_some(handover::FIRST + taken.len() as RawFd);
        taken.extend(control);
        conflict::check(&args.args, &all_ids(args, &ids), &taken)?;
        let own_devices = own_devices(args, &ids)?;
        let engine = engine(args, machine.is_some())?;
        let qemu = binary::find(args.qemu.as_deref())?;
        Ok(Self {
            engine: engine.map(|wanted| accel::choose(wanted, &qemu)),
            qemu,
            machine,
            ids,
            numbers,
            own_devices,
            control,
        })
    }

    /// The n-th card, once its address is known.
    fn card(&self, n: usize, nic: &NicRequest, mac: MacAddr, mtu: u32) -> Result<Card, QemuError> {
        let own = self.own_devices[n].as_ref();
        own.map_or(Ok(()), |own| own.check(mac))?;
        Ok(Card {
            id: self.ids[n].clone(),
            fds: self.numbers[n].fds.clone(),
            vhost: self.numbers[n].vhost.clone(),
            mac,
            mtu,
            device: own.is_none().then(|| nic.device.clone()),
        })
    }

    fn line(&self, cards: &[Card], args: &[OsString]) -> Vec<OsString> {
        let line = Line {
            machine: self.machine.as_ref(),
            engine: self.engine,
            cards,
            control: self.control,
            args,
        };
        line.build()
    }
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

fn own_devices(args: &QemuArgs, ids: &[String]) -> Result<Vec<Option<OwnDevice>>, ConflictError> {
    let own_device = |(id, nic): (&String, &NicRequest)| {
        let own = conflict::own_device(&args.args, id)?;
        match (&own, nic.device.first()) {
            (Some(own), Some((key, _))) => {
                Err(ConflictError::Properties(own.text.clone(), key.clone()))
            }
            _ => Ok(own),
        }
    };
    ids.iter().zip(&args.macvtap).map(own_device).collect()
}

/// What to settle, unless ARGS do it.
fn engine(args: &QemuArgs, machine: bool) -> Result<Option<Accel>, ConflictError> {
    match (args.accel, conflict::chooses_accel(&args.args)) {
        (Some(_), true) => Err(ConflictError::Accel),
        (None, true) => Ok(None),
        (wanted, false) => Ok(wanted.or(machine.then_some(Accel::Auto))),
    }
}

/// Takes over the descriptors that `--macvtap fd=` names.
///
/// # Safety
///
/// As for [`net::inherit`].
unsafe fn inherit(args: &QemuArgs) -> Result<Vec<OwnedFd>, QemuError> {
    let sources = args.macvtap.iter().map(|nic| &nic.source);
    let numbers: Vec<RawFd> = sources.flat_map(NicSource::descriptors).collect();
    // SAFETY: as for this function.
    Ok(unsafe { net::inherit(&numbers) }?)
}

/// Runs QEMU and returns the exit status: QEMU's, or with `--kernel` that of the native monitor.
///
/// # Errors
///
/// Says why QEMU was not run. Nothing is left behind then.
///
/// # Safety
///
/// Nothing in this process may own the descriptors that `--macvtap fd=` names: call it before anything is opened.
pub unsafe fn run(args: &QemuArgs) -> Result<u8, QemuError> {
    // SAFETY: as for this function.
    let mut inherited = unsafe { inherit(args) }?.into_iter();
    let plan = Plan::new(args, true)?;
    let (mut cards, mut descriptors, mut leases) = (Vec::new(), Vec::new(), Vec::new());
    for (n, nic) in args.macvtap.iter().enumerate() {
        let queues = match &nic.source {
            NicSource::Macvtap(spec) => Queues::make(spec)?,
            NicSource::Descriptors(fds) => {
                Queues::adopt(inherited.by_ref().take(fds.len()).collect())?
            }
        };
        cards.push(plan.card(n, nic, queues.mac, queues.mtu)?);
        descriptors.extend(queues.descriptors);
        for _ in &plan.numbers[n].vhost {
            descriptors.push(nics::open_vhost().map_err(QemuError::Vhost)?.into());
        }
        leases.extend(queues.lease);
    }
    let control = plan
        .control
        .map(|_| UnixStream::pair())
        .transpose()
        .map_err(QemuError::Descriptors)?;
    let control = control.map(|(ours, theirs)| {
        descriptors.push(theirs.into());
        ours
    });
    let mut command = Command::new(&plan.qemu);
    command.args(plan.line(&cards, &args.args));
    log::debug!("running {command:?}");
    supervise(command, descriptors, control, &plan, leases)
}

/// Starts QEMU and follows it to its end, when the macvtaps go.
fn supervise(
    mut command: Command,
    descriptors: Vec<OwnedFd>,
    control: Option<UnixStream>,
    plan: &Plan,
    leases: Vec<Lease>,
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
    let signals = Signals::new([SIGTERM, SIGHUP, SIGINT, SIGQUIT]).map_err(QemuError::Signals)?;
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
    drop(leases);
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
        None => {
            let forwarded = [SIGTERM, SIGHUP, SIGINT, SIGQUIT];
            Ok((None, child::wait(qemu, signals, &forwarded)?))
        }
    }
}

/// Has the kernel kill the program when this process dies.
fn die_together(command: &mut Command) {
    let parent = getpid();
    let arm = move || {
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
