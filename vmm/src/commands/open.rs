//! `minivmm net open`: a macvtap for another program, which needs no rights of its own.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;

use net::{Macvtap, Placement};
use nix::unistd::geteuid;
use signal_hook::consts::{SIGHUP, SIGTERM};

use crate::child::{self, Arrivals, Program, Rest, User, UserError};
use crate::cli::OpenArgs;
use crate::nic::inherited::Variables;
use crate::nic::registry::Runs;
use crate::nic::{HostNic, NicError};
use crate::signals::ENDING;

/// Why the program was not run.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    Nic(#[from] NicError),
    #[error("cannot {0}")]
    Host(&'static str, #[source] io::Error),
    #[error("cannot run {0:?}")]
    Run(OsString, #[source] io::Error),
    #[error("cannot wait for the end of {0:?}")]
    Wait(OsString, #[source] io::Error),
}

impl OpenError {
    /// The exit status, that a shell gives for a program that cannot be run.
    pub fn code(&self) -> u8 {
        match self {
            Self::Run(_, error) => child::exec_failure_code(error),
            _ => 1,
        }
    }
}

/// Runs the program and returns its exit status.
///
/// A macvtap in a private namespace ends with the last descriptor of its queues, so minivmm
/// *becomes* the program: nothing is left to clean up, and signals, job control and exit status
/// are the program's own. A macvtap in the host's namespace has to be deleted, so there minivmm
/// waits for the program's end, as it does when the program gets a terminal of its own.
///
/// # Errors
///
/// Says why the program was not run. Nothing that was made is left then.
pub fn run(args: &OpenArgs) -> Result<u8, OpenError> {
    let user = args.user.clone().or_else(caller_of_sudo);
    if user.is_none() && geteuid().is_root() {
        log::warn!("the program runs as root: choose an ordinary user with --user");
    }
    let user = user.as_deref().map(User::parse).transpose()?;
    let HostNic { claim, macvtap } = acquire(args, user.as_ref())?;
    let watch = macvtap.watch_socket();
    if let Err(error) = &watch {
        let name = &macvtap.info().name;
        log::warn!("the program cannot watch {name}: {error}");
    }
    let mut program = program(&args.command, &Variables::of(&macvtap, watch.is_ok()));
    let (queues, guard) = macvtap.into_parts();
    let failed = |error| OpenError::Host("pass the queues on", error);
    program.numbered = blocking(queues).map_err(failed)?;
    program.numbered.extend(watch.ok());
    // It counts as in use as long as the program runs, whatever becomes of minivmm.
    let lock = claim.share().map_err(failed)?;
    program.numbered.extend(lock);
    if let Some(user) = &user {
        user.settle(&mut program.command, Path::new("/run/user"));
    }
    program.user = user;
    let status = if args.macvtap.netns == Placement::Host {
        // What goes on after the program would have a queue of nothing.
        program.rest = Rest::End;
        wait_for(program, &args.command[0])
    } else if program.takes_a_child() {
        program.rest = Rest::Leave;
        wait_for(program, &args.command[0])
    } else {
        // Returns only when it fails.
        Err(OpenError::Run(args.command[0].clone(), program.exec()))
    };
    drop((claim, guard));
    status
}

/// Runs the program to its end.
fn wait_for(program: Program, name: &OsString) -> Result<u8, OpenError> {
    // SIGINT and SIGQUIT of a terminal reach the program by themselves; here they are only not to
    // be deadly.
    let signals = Arrivals::new(&ENDING);
    let signals = signals.map_err(|error| OpenError::Host("catch signals", error))?;
    let child = program.spawn();
    let child = child.map_err(|error| OpenError::Run(name.clone(), error))?;
    let status = child.wait(signals, &[SIGTERM, SIGHUP]);
    let status = status.map_err(|error| OpenError::Wait(name.clone(), error))?;
    Ok(child::exit_code(status))
}

/// The user who called sudo. Variables of a caller that is not root prove nothing.
fn caller_of_sudo() -> Option<String> {
    std::env::var("SUDO_USER")
        .ok()
        .filter(|name| name != "root" && geteuid().is_root())
}

fn program(command: &[OsString], variables: &Variables) -> Program {
    let mut program = Command::new(&command[0]);
    program.args(&command[1..]);
    variables.set(&mut program);
    let mut program = Program::new(program);
    program.no_new_privs = true;
    program
}

/// Makes the macvtap, and claims it for the program: by this process and its start time, which outlive exec. A user's
/// minivmm will claim its NIC itself, and gets a directory for that.
fn acquire(args: &OpenArgs, user: Option<&User>) -> Result<HostNic, NicError> {
    if let Some(user) = user
        && user.id() != 0
        && let Err(error) = net::make_record_directory_for(user.id(), user.group_id())
    {
        log::debug!(
            "there is no directory for the records of the user {}: {error}",
            user.id()
        );
    }
    let runs = Runs::program(Path::new(&args.command[0]));
    HostNic::claim(Macvtap::open(&args.macvtap)?, &runs, user.map(User::id))
}

/// Makes the queues blocking, as programs expect of what a shell has opened.
fn blocking(queues: Vec<OwnedFd>) -> io::Result<Vec<OwnedFd>> {
    for queue in &queues {
        rustix::io::ioctl_fionbio(queue, false)?;
    }
    Ok(queues)
}
