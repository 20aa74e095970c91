//! What minivmm does besides running a guest: one module for each subcommand.

mod console;
mod cp;
mod doctor;
mod exec;
mod firewall;
mod host_link;
mod initramfs;
mod list;
mod logs;
mod open;
mod package;
mod ps;
mod qmp;
mod stats;
mod stop;
mod targets;
mod wait;

use std::io::{self, ErrorKind, Write};

use crate::cli::{Command, NetCommand};
use crate::instance::{FindError, InstanceError};
use crate::nic::Inherited;
use crate::nic::NicError;
use crate::printable::{printable, printable_json};
use crate::qemu::{self, QemuError};
use crate::qmp::client::ClientError;
use crate::run;

pub use console::ConsoleError;
pub use cp::CpError;
pub use exec::ExecError;
pub use host_link::HostLinkCommandError;
pub use initramfs::InitramfsCommandError;
pub use open::OpenError;
pub use package::PackageError;
pub use stats::StatsError;
pub use targets::RunTargetsError;
pub use wait::WaitError;

/// Why a subcommand could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    HostLink(#[from] HostLinkCommandError),
    #[error(transparent)]
    List(#[from] net::InventoryError),
    #[error(transparent)]
    Gc(#[from] net::StaleError),
    #[error(transparent)]
    Qemu(#[from] QemuError),
    #[error(transparent)]
    Qmp(#[from] ClientError),
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    Console(#[from] ConsoleError),
    #[error(transparent)]
    Cp(#[from] CpError),
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error(transparent)]
    Stats(#[from] StatsError),
    #[error(transparent)]
    Wait(#[from] WaitError),
    #[error(transparent)]
    Initramfs(#[from] InitramfsCommandError),
    #[error(transparent)]
    RunTargets(#[from] RunTargetsError),
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error("cannot write to stdout")]
    Output(#[source] io::Error),
}

impl CommandError {
    /// The exit status that says so.
    pub fn code(&self) -> u8 {
        match self {
            Self::Open(error) => error.code(),
            Self::Wait(error) => error.code(),
            Self::Exec(error) => error.code(),
            Self::RunTargets(_) => run::FAILED,
            _ => 1,
        }
    }

    /// What to do about it, where the text does not say it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Qemu(QemuError::Instance(error)) => InstanceError::remedy(error),
            Self::Qemu(QemuError::Nic(NicError::UserNet(error))) => error.remedy(),
            Self::Qemu(QemuError::Share(error)) => error.remedy(),
            Self::Exec(error) => error.remedy(),
            Self::Cp(error) => error.remedy(),
            Self::Initramfs(error) => error.remedy(),
            _ => net::remedy(self),
        }
    }
}

/// Runs a subcommand and returns the exit status.
pub fn run(command: &Command, inherited: Inherited) -> Result<u8, CommandError> {
    match command {
        Command::Net(NetCommand::Open(args)) => Ok(open::run(args)?),
        Command::Net(NetCommand::HostLink(args)) => print(&host_link::run(args)?).map(|()| 0),
        Command::Net(NetCommand::List(args)) => print(&list::run(args)?).map(|()| 0),
        Command::Net(NetCommand::Gc) => print(&gc()?).map(|()| 0),
        Command::Qemu(args) if args.dry_run => print(&qemu::dry_run(args, inherited)?).map(|()| 0),
        Command::Qemu(args) => Ok(qemu::run(args, inherited)?),
        Command::Run(args) => match &args.file {
            Some(path) => Ok(targets::run(args, path)?),
            None => Ok(run::run(args)),
        },
        Command::Qmp(args) => print(&qmp::run(args)?).map(|()| 0),
        Command::Stats(args) => Ok(stats::run(args).map(|()| 0)?),
        Command::Ps(args) => print(&ps::run(args)?).map(|()| 0),
        Command::Wait(args) => Ok(wait::run(args)?),
        Command::Exec(args) => Ok(exec::run(args)?),
        Command::Cp(args) => Ok(cp::run(args).map(|()| 0)?),
        Command::Console(args) => Ok(console::run(args)?),
        Command::Logs(args) => print(&logs::run(args)?).map(|()| 0),
        Command::Stop(args) => Ok(stop::stop(args)?),
        Command::Kill(args) => Ok(stop::kill(args)?),
        Command::Initramfs(args) => Ok(initramfs::run(args).map(|()| 0)?),
        Command::Agent(args) => Ok(package::run(args).map(|()| 0)?),
        Command::FileServer(_) => unreachable!("main serves before it gets here"),
        Command::Doctor(args) => {
            let (report, healthy) = doctor::run(args);
            print(&report).map(|()| if healthy { 0 } else { 1 })
        }
    }
}

fn gc() -> Result<String, net::StaleError> {
    // Reading the registry removes stale files.
    crate::nic::registry::running();
    let line = |link: net::StaleLink| {
        format!(
            "deleted {} ({}), left by {}",
            link.name,
            link.kind,
            link.owner.describe()
        )
    };
    Ok(report(net::delete_stale()?.into_iter().map(line)))
}

/// Writes to stdout; a reader that has seen enough is no error.
fn print(text: &str) -> Result<(), CommandError> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(CommandError::Output(error)),
        _ => Ok(()),
    }
}

/// Lines whose columns stand under each other. The last one may be of any length.
fn table<const N: usize>(rows: impl IntoIterator<Item = [String; N]>) -> Vec<String> {
    let rows: Vec<_> = rows.into_iter().collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths);
        let cells: Vec<_> = cells
            .map(|(text, width)| format!("{text:width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// Lines for people.
fn report(lines: impl IntoIterator<Item = String>) -> String {
    let mut text = String::new();
    for line in lines {
        text.push_str(&printable(&line));
        text.push('\n');
    }
    text
}

/// Pretty JSON with a line end.
fn json(value: &impl serde::Serialize) -> String {
    // Plain data of our own: there is nothing in it that JSON could not say.
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    printable_json(&text) + "\n"
}
