//! Starts a command.

use std::ffi::{CString, OsStr};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

use agent_protocol::session::{Exec, ExecFailure, Window};
use rustix::fs::{Mode, OFlags, fchown};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, chdir, geteuid, ioctl_tiocsctty, setrlimit, setsid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::user::{User, UserError};
use crate::children::{Child, Children, Ended};

/// Why a command could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("there is no command")]
    Empty,
    #[error(transparent)]
    User(#[from] UserError),
    #[error("cannot make a terminal")]
    Terminal(#[source] io::Error),
    #[error("cannot make a pipe")]
    Pipe(#[source] io::Error),
    #[error("cannot start a process for {0:?}")]
    Process(String, #[source] io::Error),
    #[error("cannot start a session with a terminal")]
    Session(#[source] io::Error),
    #[error("cannot become user {0:?}")]
    Become(String, #[source] io::Error),
    #[error("cannot go to the directory {0:?}")]
    Directory(String, #[source] io::Error),
    #[error("cannot run {0:?}")]
    Run(String, #[source] io::Error),
}

impl StartError {
    /// What it means for an exit status.
    pub fn reason(&self) -> ExecFailure {
        match self {
            Self::Run(_, error) if error.kind() == ErrorKind::NotFound => ExecFailure::NotFound,
            Self::Run(..) => ExecFailure::NotExecutable,
            _ => ExecFailure::Refused,
        }
    }
}

/// The agent's ends of a command's streams. None of them blocks.
#[derive(Debug)]
pub enum Ends {
    /// Of three pipes.
    Pipes {
        /// Its standard input.
        stdin: Arc<OwnedFd>,
        /// Its standard output.
        stdout: Arc<OwnedFd>,
        /// Its standard error.
        stderr: Arc<OwnedFd>,
    },
    /// Of a terminal.
    Terminal(Arc<OwnedFd>),
}

/// The command's ends.
struct Streams([OwnedFd; 3]);

/// A command that has been started.
#[derive(Debug)]
pub struct Started {
    /// Its process.
    pub child: Child,
    /// The agent's ends of its streams.
    pub ends: Ends,
    /// Its directory is not there, and it has started in the root directory.
    pub elsewhere: bool,
}

/// Starts a command. `ended` is called, by another thread, when its process has ended.
///
/// # Errors
///
/// See [`StartError`].
pub fn start(
    exec: &Exec,
    children: &Arc<Children>,
    ended: impl FnOnce(Ended) + Clone + Send + 'static,
) -> Result<Started, StartError> {
    let attempt = |elsewhere| {
        let (mut command, ends) = prepare(exec, elsewhere)?;
        let spawned = children.spawn(&mut command, ended.clone());
        let child = spawned.map_err(|error| failed(exec, error))?;
        Ok(Started {
            child,
            ends,
            elsewhere,
        })
    };
    let is_required = exec.directory.as_ref().is_some_and(|it| it.required);
    match attempt(false) {
        Err(StartError::Directory(..)) if !is_required => attempt(true),
        started => started,
    }
}

/// Makes the command; `elsewhere` has it start in the root directory.
fn prepare(exec: &Exec, elsewhere: bool) -> Result<(Command, Ends), StartError> {
    let [program, arguments @ ..] = &exec.argv[..] else {
        return Err(StartError::Empty);
    };
    let user = User::find(exec.user.as_deref())?;
    let (Streams([stdin, stdout, stderr]), ends) = match exec.terminal {
        Some(window) => terminal(window, &user).map_err(StartError::Terminal)?,
        None => pipes().map_err(StartError::Pipe)?,
    };
    let mut command = Command::new(OsStr::from_bytes(program));
    command
        .args(arguments.iter().map(|word| OsStr::from_bytes(word)))
        .env_clear()
        .envs(user.environment())
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::from(stdout))
        .stderr(Stdio::from(stderr));
    for variable in &exec.env {
        let mut parts = variable.splitn(2, |byte| *byte == b'=');
        let (name, value) = (parts.next(), parts.next());
        let text = |part: Option<&[u8]>| OsStr::from_bytes(part.unwrap_or_default()).to_owned();
        command.env(text(name), text(value));
    }
    let becomes = (exec.user.is_some() || geteuid().is_root()).then(|| user.clone());
    let set_up = SetUp {
        has_terminal: exec.terminal.is_some(),
        directory: match elsewhere {
            true => c"/".to_owned(),
            false => directory(exec, &user)?,
        },
        core: exec.core,
        becomes,
    };
    // SAFETY: between fork and exec it makes system calls alone, and takes no memory.
    unsafe { command.pre_exec(move || set_up.run()) };
    Ok((command, ends))
}

fn directory(exec: &Exec, user: &User) -> Result<CString, StartError> {
    let path = exec.directory.as_ref().map_or(&user.home, |it| &it.path);
    let failed = |_| StartError::Directory(text(path), ErrorKind::InvalidInput.into());
    CString::new(path.clone()).map_err(failed)
}

/// What failed, of an error of [`Command::spawn`].
fn failed(exec: &Exec, error: io::Error) -> StartError {
    let raw = error.raw_os_error().unwrap_or_default();
    let program = exec
        .argv
        .first()
        .map(|program| text(program))
        .unwrap_or_default();
    let reason = io::Error::from_raw_os_error(raw & ERRNO);
    match raw & !ERRNO {
        SESSION => StartError::Session(reason),
        BECOME => StartError::Become(exec.user.clone().unwrap_or_default(), reason),
        DIRECTORY => {
            let path = exec.directory.as_ref().map(|it| text(&it.path));
            StartError::Directory(path.unwrap_or_default(), reason)
        }
        // Of fork(2), and of exec where it lacks the same. What has no errno is a NUL in an argument.
        _ => match Errno::from_io_error(&error) {
            Some(Errno::AGAIN | Errno::NOMEM | Errno::MFILE | Errno::NFILE) => {
                StartError::Process(program, error)
            }
            _ => StartError::Run(program, error),
        },
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The part of the child's work that failed stands above the errno: the standard library passes both on.
const ERRNO: i32 = 0xffff;
const SESSION: i32 = 1 << 16;
const BECOME: i32 = 2 << 16;
const DIRECTORY: i32 = 3 << 16;

/// What a process does before it runs the program.
struct SetUp {
    has_terminal: bool,
    becomes: Option<User>,
    directory: CString,
    core: bool,
}

impl SetUp {
    fn run(&self) -> io::Result<()> {
        let at = |part: i32| {
            move |errno: Errno| io::Error::from_raw_os_error(part | errno.raw_os_error())
        };
        default_signals();
        setsid().map_err(at(SESSION))?;
        if self.has_terminal {
            ioctl_tiocsctty(rustix::stdio::stdin()).map_err(at(SESSION))?;
        }
        if self.core {
            let limit = Rlimit {
                current: None,
                maximum: None,
            };
            // A hard limit that is not the agent's to raise stays.
            let _ = setrlimit(Resource::Core, limit);
        }
        if let Some(user) = &self.becomes {
            become_user(user).map_err(at(BECOME))?;
        }
        chdir(&self.directory).map_err(at(DIRECTORY))
    }
}

fn become_user(user: &User) -> rustix::io::Result<()> {
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    // A process that has just been forked has one thread.
    let (uid, gid) = (user.uid, user.gid);
    // An agent without rights can run what is its own alone.
    if geteuid().is_root() {
        set_thread_groups(&user.groups)?;
        set_thread_res_gid(gid, gid, gid)?;
    }
    set_thread_res_uid(uid, uid, uid)
}

/// Has every signal do what it does by default: programs inherit which are ignored.
fn default_signals() {
    for signal in 1..=libc::SIGSYS {
        // SAFETY: the default action runs no code of this process.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

fn pipes() -> io::Result<(Streams, Ends)> {
    let ((stdin, to_stdin), (from_stdout, stdout), (from_stderr, stderr)) =
        (io::pipe()?, io::pipe()?, io::pipe()?);
    let ends = Ends::Pipes {
        stdin: own(to_stdin.into())?,
        stdout: own(from_stdout.into())?,
        stderr: own(from_stderr.into())?,
    };
    Ok((Streams([stdin.into(), stdout.into(), stderr.into()]), ends))
}

/// An end of the agent's.
fn own(end: OwnedFd) -> io::Result<Arc<OwnedFd>> {
    rustix::io::ioctl_fionbio(&end, true)?;
    Ok(Arc::new(end))
}

fn terminal(window: Window, user: &User) -> io::Result<(Streams, Ends)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(name, flags, Mode::empty())?;
    if geteuid().is_root() {
        // So that the user can open it once more.
        fchown(&slave, Some(user.uid), None)?;
    }
    resize(&slave, window)?;
    let streams = Streams([slave.try_clone()?, slave.try_clone()?, slave]);
    Ok((streams, Ends::Terminal(own(master)?)))
}

/// Gives a terminal another size, of which its programs get a signal.
///
/// # Errors
///
/// Those of TIOCSWINSZ.
pub fn resize(terminal: impl AsFd, window: Window) -> io::Result<()> {
    let size = Winsize {
        ws_row: window.rows,
        ws_col: window.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(tcsetwinsize(terminal, size)?)
}
