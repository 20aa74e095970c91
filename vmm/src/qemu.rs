//! `minivmm qemu`: QEMU on the same macvtaps, for what a minimal monitor leaves out.
//!
//! | file | what it is |
//! | --- | --- |
//! | `nics.rs` | the keys of `--macvtap`, and the queues |
//! | `args.rs` | QEMU's command line; pure |
//! | `conflict.rs` | what in ARGS would clash with it; pure |
//! | `binary.rs`, `accel.rs` | which QEMU, and what runs the guest's code |
//! | `process.rs` | QEMU as a process, from its start to its end |
//! | `control.rs` | the end of a guest that was asked for by `--kernel`, by QMP |
//! | `hints.rs`, `terminal.rs` | QEMU's stderr, and the terminal after it |
//! | `dry_run.rs`, `script.rs` | `--dry-run`: what would be made, and the script of it |
//!
//! # Why minivmm stays
//!
//! An open queue would keep a private macvtap alive by itself, so minivmm could *become* QEMU. It stays as QEMU's parent
//! to explain failures, to restore the terminal when QEMU is killed, to delete a macvtap of the host's namespace, and,
//! with `--kernel`, to tell the guest's panic from its reboot. QEMU ends with it, whichever way it ends
//! ([`crate::child`]); the kernel deletes a private macvtap with the last of its queues.

mod accel;
mod args;
mod binary;
mod conflict;
mod control;
mod dry_run;
mod hints;
mod nics;
mod process;
mod script;
mod terminal;

use std::ffi::OsString;
use std::fs;
use std::io::{self, IsTerminal};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use net::{ExistingTapError, MacAddr, MacvtapSpec};

use crate::child::{self, Program};
use crate::cli::{Accel, QemuArgs};
use crate::config::{ConsoleTarget, NicSource};
use crate::files::{Files, Role, SharedFile};
use crate::nic::exclusive::{self, SharedError};
use crate::nic::host_link;
use crate::nic::registry::{Claim, Runs};
use crate::tty::may_read;

use accel::Engine;
use args::{Line, Machine, NetDevice};
use conflict::OwnDevice;
use nics::{Expected, Numbers, Queues};

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
    /// The host's own access.
    #[error(transparent)]
    HostLink(#[from] host_link::HostLinkError),
    /// Descriptors of somebody else's.
    #[error("cannot use the file descriptors of --macvtap fd=")]
    Existing(#[from] ExistingTapError),
    /// One interface for two NICs.
    #[error(transparent)]
    Shared(#[from] SharedError),
    /// One file for two uses.
    #[error(transparent)]
    File(#[from] SharedFile),
    /// vhost-net that was asked for.
    #[error(
        "cannot open {} for vhost=on: `modprobe vhost_net`, or omit vhost=on",
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
        machine.as_ref().map_or(Ok(()), check_files)?;
        let vhost = nics::open_vhost();
        if args.macvtap.iter().any(|nic| nic.vhost == Some(true)) {
            nics::open_vhost().map_err(QemuError::Vhost)?;
        }
        let numbers = nics::number(&args.macvtap, vhost.is_ok(), child::FIRST, !follow);
        let mut taken: Vec<RawFd> = numbers
            .iter()
            .flat_map(|n| n.fds.iter().chain(&n.vhost).copied())
            .collect();
        let control = (follow && machine.is_some()).then_some(child::FIRST + taken.len() as RawFd);
        taken.extend(control);
        conflict::check(&args.args, &all_ids(args, &ids), &taken)?;
        let own_devices = own_devices(args, &ids)?;
        for (own, nic) in own_devices.iter().zip(&args.macvtap) {
            own.as_ref()
                .map_or(Ok(()), |own| check_expected(own, nic))?;
        }
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

    /// The n-th NIC, once its address is known.
    fn nic(
        &self,
        n: usize,
        nic: &NicRequest,
        mac: MacAddr,
        mtu: u32,
    ) -> Result<NetDevice, QemuError> {
        self.check_mac(n, mac)?;
        Ok(NetDevice {
            id: self.ids[n].clone(),
            fds: self.numbers[n].fds.clone(),
            vhost: self.numbers[n].vhost.clone(),
            mac,
            mtu,
            device: self.own_devices[n].is_none().then(|| nic.device.clone()),
        })
    }

    /// Whether the n-th NIC's device, if ARGS have one, has this address.
    fn check_mac(&self, n: usize, mac: MacAddr) -> Result<(), ConflictError> {
        let own = self.own_devices[n].as_ref();
        own.map_or(Ok(()), |own| own.check(mac))
    }

    fn line(&self, nics: &[NetDevice], args: &[OsString]) -> Vec<OsString> {
        let line = Line {
            machine: self.machine.as_ref(),
            engine: self.engine,
            nics,
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

/// Refuses a console's file that would write over another one. A file that does not exist is QEMU's to complain of.
fn check_files(machine: &Machine) -> Result<(), SharedFile> {
    let mut files = Files::standard(machine.console == ConsoleTarget::Stdio);
    let console = match &machine.console {
        ConsoleTarget::File(path) => Some(path),
        _ => None,
    };
    for (role, path) in [
        (Role::Kernel, Some(&machine.kernel)),
        (Role::Initrd, machine.initrd.as_ref()),
        (Role::Console, console),
    ] {
        if let Some(path) = path
            && let Ok(metadata) = fs::metadata(path)
        {
            files.add(role, path, &metadata)?;
        }
    }
    Ok(())
}

/// Checks a device's address against that of a macvtap still to be made, as far as it is known.
fn check_expected(own: &OwnDevice, nic: &NicRequest) -> Result<(), ConflictError> {
    match &nic.source {
        NicSource::Macvtap(spec) => match nics::expected_mac(spec) {
            Expected::Known(mac) => own.check(mac),
            Expected::Random => Err(ConflictError::RandomMac(own.text.clone(), own.mac)),
            Expected::Unknown => Ok(()),
        },
        NicSource::Descriptors(_) => Ok(()),
    }
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
    let (mut nics, mut descriptors, mut guards) = (Vec::new(), Vec::new(), Vec::new());
    let mut interfaces = Vec::new();
    for (n, origin) in origins(args, &plan, &mut inherited)?
        .into_iter()
        .enumerate()
    {
        let queues = match origin {
            Origin::ToMake(spec) => Queues::make(spec)?,
            Origin::Open(queues) => *queues,
        };
        nics.push(plan.nic(n, &args.macvtap[n], queues.mac, queues.entry.mtu)?);
        descriptors.extend(queues.descriptors);
        for _ in &plan.numbers[n].vhost {
            descriptors.push(nics::open_vhost().map_err(QemuError::Vhost)?.into());
        }
        guards.extend(queues.guard);
        interfaces.push((queues.interface, queues.entry));
    }
    let runs = match &args.machine.kernel {
        Some(kernel) => Runs::kernel(kernel),
        None => Runs::program(&plan.qemu),
    };
    let wanted: Vec<_> = interfaces.iter().map(|(one, entry)| (one, entry)).collect();
    // Given up when QEMU has ended.
    let claims = exclusive::claim(&runs, None, &wanted)?;
    let host_link = host_link::make(claims.first().map(Claim::nic), &args.host_link)?;
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
    command.args(plan.line(&nics, &args.args));
    log::debug!("running {command:?}");
    let mut program = Program::new(command);
    program.numbered = descriptors;
    let locks = claims.iter().filter_map(|claim| claim.share().transpose());
    program.others = locks
        .collect::<Result<_, _>>()
        .map_err(QemuError::Descriptors)?;
    let status = process::supervise(program, control, &plan);
    drop((guards, host_link));
    status
}

/// Where a NIC's queues come from.
#[derive(Debug)]
enum Origin<'a> {
    ToMake(&'a MacvtapSpec),
    Open(Box<Queues>),
}

/// Takes over the queues that somebody else has opened: what is wrong with them is told before anything is made.
fn origins<'a>(
    args: &'a QemuArgs,
    plan: &Plan,
    inherited: &mut impl Iterator<Item = OwnedFd>,
) -> Result<Vec<Origin<'a>>, QemuError> {
    let origin = |(n, nic): (usize, &'a NicRequest)| match &nic.source {
        NicSource::Macvtap(spec) => Ok(Origin::ToMake(spec)),
        NicSource::Descriptors(fds) => {
            let queues = Queues::from_fds(inherited.by_ref().take(fds.len()).collect(), fds)?;
            plan.check_mac(n, queues.mac)?;
            Ok(Origin::Open(Box::new(queues)))
        }
    };
    args.macvtap.iter().enumerate().map(origin).collect()
}
