//! `minivmm net open`: a macvtap for another program, which needs no rights of its own.

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use net::{Macvtap, Placement};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{
    Gid, Pid, Uid, User, geteuid, getgrouplist, getpid, getppid, setgid, setgroups, setuid,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::child;
use crate::cli::OpenArgs;
use crate::handed::Handed;
use crate::handover::Handover;
use crate::limits;
use crate::registry::{self, NicEntry, RegisteredCard, Registration, Runs};
use crate::sharing::{self, Interface, SharedError};
use crate::signals::{self, not_ignored};

/// Why the program was not run.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No such user.
    #[error("there is no user {0:?}")]
    NoUser(String),
    /// The users or groups cannot be read.
    #[error("cannot look up the user {0:?}")]
    LookUp(String, #[source] io::Error),
    /// The macvtap.
    #[error(transparent)]
    Macvtap(#[from] net::Error),
    /// Another process's card.
    #[error(transparent)]
    Shared(#[from] SharedError),
    /// The queues cannot be prepared for the program.
    #[error("cannot hand the queues over")]
    Descriptors(#[source] io::Error),
    /// Signals cannot be passed on.
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    /// The program.
    #[error("cannot run {0:?}")]
    Run(OsString, #[source] io::Error),
}

/// Runs the program and returns its exit status.
///
/// A macvtap in a private namespace ends with the last descriptor of its queues, so minivmm
/// *becomes* the program: nothing is left to clean up, and signals, job control and exit status
/// are the program's own. A macvtap in the host's namespace has to be deleted, so there minivmm
/// waits for the program's end.
///
/// # Errors
///
/// Says why the program was not run. Nothing is left behind then.
pub fn run(args: &OpenArgs) -> Result<u8, OpenError> {
    let user = args.user.clone().or_else(caller_of_sudo);
    if user.is_none() && geteuid().is_root() {
        log::warn!("the program runs as root: choose an ordinary user with --user");
    }
    let user = user.map(Credentials::of).transpose()?;
    let macvtap = Macvtap::open(&args.macvtap)?;
    let interface = Interface::of_macvtap(&macvtap)?;
    sharing::check(std::slice::from_ref(&interface))?;
    let watch = macvtap.watch_socket();
    if let Err(error) = &watch {
        log::warn!("the program cannot watch {}: {error}", macvtap.name());
    }
    let mut command = program(&args.command, &Handed::of(&macvtap, watch.is_ok()));
    let registration = register(&args.command[0], &macvtap, &interface, user.as_ref());
    let (queues, lease) = macvtap.into_parts();
    let handover = hand_over(queues, watch.ok()).map_err(OpenError::Descriptors)?;
    handover.attach(&mut command);
    let waits = args.macvtap.netns == Placement::Host;
    if let Some(user) = &user {
        user.settle(&mut command, Path::new("/run/user"));
    }
    // None is what the program does not die with.
    let parent = waits.then(getpid);
    // SAFETY: what runs between fork and exec makes system calls alone: it allocates nothing and
    // takes no lock.
    unsafe { command.pre_exec(move || enter_program(user.as_ref(), parent)) };
    let failed = |error| OpenError::Run(args.command[0].clone(), error);
    if !waits {
        // Returns only when it fails.
        let error = command.exec();
        drop((registration, lease));
        return Err(failed(error));
    }
    // SIGINT and SIGQUIT of a terminal reach the program by themselves; here they are only not to
    // be deadly.
    let signals = Signals::new(not_ignored(&[SIGTERM, SIGHUP, SIGINT, SIGQUIT]))
        .map_err(OpenError::Signals)?;
    let child = command.spawn().map_err(failed)?;
    drop(handover);
    let status = child::wait(child, signals, &[SIGTERM, SIGHUP]).map_err(failed)?;
    drop((registration, lease));
    Ok(child::exit_code(status))
}

/// Who called sudo, if anybody did.
fn caller_of_sudo() -> Option<String> {
    std::env::var("SUDO_USER")
        .ok()
        .filter(|name| name != "root")
}

/// Everything that makes a process a user's.
#[derive(Debug)]
struct Credentials {
    name: String,
    home: PathBuf,
    user: Uid,
    group: Gid,
    groups: Vec<Gid>,
}

impl Credentials {
    fn of(name: String) -> Result<Self, OpenError> {
        let look_up = |errno: nix::Error| OpenError::LookUp(name.clone(), errno.into());
        let user = User::from_name(&name).map_err(look_up)?;
        let user = user.ok_or_else(|| OpenError::NoUser(name.clone()))?;
        let c_name = CString::new(name.clone()).map_err(|_| OpenError::NoUser(name.clone()))?;
        let groups = getgrouplist(&c_name, user.gid).map_err(look_up)?;
        Ok(Self {
            name: user.name,
            home: user.dir,
            user: user.uid,
            group: user.gid,
            groups,
        })
    }
}

impl Credentials {
    /// Tells the program whose it is: root's directories are not open to it. `runtime` is where
    /// users' own ones are, if they are logged in.
    fn settle(&self, program: &mut Command, runtime: &Path) {
        program
            .env("USER", &self.name)
            .env("LOGNAME", &self.name)
            .env("HOME", &self.home);
        let runtime = runtime.join(self.user.to_string());
        if runtime.is_dir() {
            program.env("XDG_RUNTIME_DIR", runtime);
        } else {
            program.env_remove("XDG_RUNTIME_DIR");
        }
    }
}

fn program(command: &[OsString], handed: &Handed) -> Command {
    let mut program = Command::new(&command[0]);
    program.args(&command[1..]);
    handed.tell(&mut program);
    program
}

/// Tells `net list` and others of the macvtap: by its process and start time, which outlive exec. A
/// user's minivmm will tell of its guest itself, and gets a directory for that.
fn register(
    program: &OsString,
    macvtap: &Macvtap,
    interface: &Interface,
    user: Option<&Credentials>,
) -> Registration {
    if let Some(Credentials { user, group, .. }) = user
        && !user.is_root()
        && let Err(error) = registry::make_directory_for(user.as_raw(), group.as_raw())
    {
        log::debug!("minivmm cannot tell of a guest of the user {user}: {error}");
    }
    let nic = NicEntry::of(macvtap, interface.device);
    Registration::new(
        Runs::Program(program.into()),
        vec![RegisteredCard::new(nic)],
    )
}

/// Makes the queues blocking, as programs expect of what a shell has opened, and gives them and the
/// socket behind them their numbers.
fn hand_over(mut queues: Vec<OwnedFd>, watch: Option<OwnedFd>) -> io::Result<Handover> {
    for queue in &queues {
        rustix::io::ioctl_fionbio(queue, false)?;
    }
    queues.extend(watch);
    Handover::new(queues)
}

/// Becomes the user. Runs between fork and exec; in a process of its own, if there is a `parent`
/// that waits for its end.
fn enter_program(user: Option<&Credentials>, parent: Option<Pid>) -> io::Result<()> {
    signals::restore()?;
    limits::restore()?;
    if let Some(Credentials {
        user,
        group,
        groups,
        ..
    }) = user
    {
        setgroups(groups)?;
        setgid(*group)?;
        setuid(*user)?;
    }
    let Some(parent) = parent else { return Ok(()) };
    // The macvtap of a killed minivmm is anybody's to delete. (A change of user clears this.)
    prctl::set_pdeathsig(Signal::SIGTERM)?;
    // It may have been killed before that.
    if getppid() == parent {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ESRCH))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_whose_parent_is_dead_already_is_not_run() {
        let run = |parent: Pid| {
            let mut program = Command::new("true");
            // SAFETY: as for `run`.
            unsafe { program.pre_exec(move || enter_program(None, Some(parent))) };
            program.status()
        };
        assert!(run(getpid()).unwrap().success());
        let error = run(Pid::from_raw(i32::MAX)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn program_is_told_whose_it_is() {
        let user = Credentials {
            name: "me".into(),
            home: "/home/me".into(),
            user: Uid::from_raw(4711),
            group: Gid::from_raw(4711),
            groups: Vec::new(),
        };
        let runtime = tempfile::tempdir().unwrap();
        let told = |name: &str| {
            let mut program = Command::new("true");
            program.env("XDG_RUNTIME_DIR", "/run/user/0");
            user.settle(&mut program, runtime.path());
            let found = program.get_envs().find(|(variable, _)| *variable == name);
            found.unwrap().1.map(ToOwned::to_owned)
        };
        for (name, value) in [("USER", "me"), ("LOGNAME", "me"), ("HOME", "/home/me")] {
            assert_eq!(told(name), Some(value.into()), "{name}");
        }
        assert_eq!(told("XDG_RUNTIME_DIR"), None);
        let own = runtime.path().join("4711");
        std::fs::create_dir(&own).unwrap();
        assert_eq!(told("XDG_RUNTIME_DIR"), Some(own.into()));
    }
}
