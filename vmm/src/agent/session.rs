//! A command in a guest.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use agent_protocol::session::{Exec, ExecFailure, FromCommand, Request, Stream, ToCommand, Window};
use agent_protocol::{Inbox, MessageError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use rustix::stdio::{stdin, stdout};
use rustix::termios::tcgetwinsize;

use super::streams::{Output, pass_input, pass_output};
use super::{Agent, ConnectError};
use crate::child::Arrivals;
use crate::tty::RawTerminal;

/// The signals that a command gets of those that reach this process, besides SIGWINCH.
pub const FORWARDED: [i32; 6] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

/// How long a command whose time is over may take to end after SIGTERM.
pub const GRACE: Duration = Duration::from_secs(5);

/// Why a command is not followed to its end.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The agent cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The terminal cannot be used.
    #[error("cannot set up the terminal")]
    Terminal(#[source] io::Error),
    /// The host has no thread, descriptor or random number.
    #[error("cannot pass the command's streams on")]
    Host(#[source] io::Error),
    /// Stdout or stderr cannot be written, for another reason than that nothing reads it.
    #[error("cannot pass the command's output on")]
    Output(#[source] io::Error),
}

/// How a command has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// By itself, with this status.
    Exited(i32),
    /// By a signal.
    Killed {
        /// Its number.
        signal: i32,
        /// Whether it left a core file.
        core: bool,
    },
    /// It did not start.
    NotStarted {
        /// Why.
        reason: ExecFailure,
        /// What was tried on what, and why that failed: of the guest's.
        text: String,
    },
    /// The connection has ended: the VM, or the agent in it.
    Lost,
    /// Its time was over. It has got SIGTERM, and gets SIGHUP and SIGKILL if it goes on.
    TimedOut,
    /// The user did not want to wait any longer: the same.
    Left,
}

impl Outcome {
    /// The exit status that says so: the command's own, 128+N after signal N, 127 and 126 as of a shell for one that is not
    /// there and one that cannot be run, 124 as of timeout(1), and 125 for all else.
    pub fn code(&self) -> u8 {
        match self {
            // As of wait(2), whatever the guest says.
            Self::Exited(status) => (status & 0xff) as u8,
            Self::Killed { signal, .. } => 128 + (signal & 0x7f) as u8,
            Self::NotStarted { reason, .. } => match reason {
                ExecFailure::NotFound => 127,
                ExecFailure::NotExecutable => 126,
                ExecFailure::Refused => 125,
            },
            Self::TimedOut => 124,
            Self::Lost | Self::Left => 125,
        }
    }
}

/// What is to be done at a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// The command gets it.
    Forward,
    /// The command is left: the agent ends it.
    Leave,
}

/// A command that runs in a guest, or is about to. Dropping it has the agent end the command.
#[derive(Debug)]
pub struct Session {
    control: UnixStream,
    inbox: Inbox,
    streams: Vec<Arc<UnixStream>>,
    outputs: Vec<JoinHandle<io::Result<()>>>,
    /// Its other end is closed when no output is passed on any more.
    pass_on: UnixStream,
    has_terminal: bool,
    raw: Option<RawTerminal>,
    /// Where the command is to start.
    directory: Option<String>,
    is_elsewhere: bool,
    elsewhere_level: log::Level,
}

impl Session {
    /// Has the agent start a command, whose streams are those of this process from now on: with `exec.terminal` the terminal on
    /// stdin, which gets raw, and has the size that its own says. `exec.session` is of no account. The signals that are to
    /// be forwarded must be caught before.
    ///
    /// # Errors
    ///
    /// See [`SessionError`].
    pub fn start(agent: &Agent, mut exec: Exec) -> Result<Self, SessionError> {
        exec.session = random().map_err(SessionError::Host)?;
        exec.terminal = exec.terminal.map(|default| window().unwrap_or(default));
        let (session, has_terminal) = (exec.session, exec.terminal.is_some());
        let directory = exec.directory.as_ref();
        let directory = directory.map(|it| String::from_utf8_lossy(&it.path).into_owned());
        let control = agent.request(&Request::Exec(Box::new(exec)))?;
        let open = |stream| agent.request(&Request::Stream { session, stream });
        let streams = match has_terminal {
            true => vec![open(Stream::Terminal)?],
            false => vec![
                open(Stream::Stdin)?,
                open(Stream::Stdout)?,
                open(Stream::Stderr)?,
            ],
        };
        let streams: Vec<_> = streams.into_iter().map(Arc::new).collect();
        let raw = match has_terminal {
            true => RawTerminal::enter_between().map_err(SessionError::Terminal)?,
            false => None,
        };
        control.set_nonblocking(true).map_err(SessionError::Host)?;
        let (pass_on, passes) = UnixStream::pair().map_err(SessionError::Host)?;
        let mut started = Self {
            control,
            inbox: Inbox::default(),
            streams,
            outputs: Vec::new(),
            pass_on,
            has_terminal,
            raw,
            directory,
            is_elsewhere: false,
            elsewhere_level: log::Level::Warn,
        };
        started.pass_on(passes).map_err(SessionError::Host)?;
        Ok(started)
    }

    /// The root is not the host's, so it is no surprise that the current directory is missing.
    pub fn expect_other_root(&mut self) {
        self.elsewhere_level = log::Level::Debug;
    }

    /// What the user should know of the command once it runs.
    pub fn warning(&self) -> Option<String> {
        let directory = self.directory.as_ref().filter(|_| self.is_elsewhere)?;
        Some(format!(
            "the guest has no directory {directory:?} that the command's user may enter: the command starts in / (--share \
             gives the guest a directory, and --workdir chooses another)"
        ))
    }

    /// Starts the threads.
    fn pass_on(&mut self, passes: UnixStream) -> io::Result<()> {
        let input = Arc::clone(&self.streams[0]);
        thread::Builder::new().name("stdin".into()).spawn(move || {
            if let Err(error) = pass_input(&input) {
                log::warn!("cannot read stdin: {error}");
            }
        })?;
        let last = self.streams.len() - 1;
        let outputs = match self.has_terminal {
            true => vec![(0, Output::Stdout, "stdout")],
            false => vec![
                (last - 1, Output::Stdout, "stdout"),
                (last, Output::Stderr, "stderr"),
            ],
        };
        for (index, to, name) in outputs {
            let (from, passes) = (Arc::clone(&self.streams[index]), passes.try_clone()?);
            let thread = thread::Builder::new().name(name.into()).spawn(move || {
                let passed = pass_output(&from, to);
                drop(passes);
                passed
            })?;
            self.outputs.push(thread);
        }
        Ok(())
    }

    /// Waits until the command has ended and all its output is written, and passes signals on meanwhile. `react` is asked
    /// about each of [`FORWARDED`]. At the `deadline` the command gets SIGTERM, and [`GRACE`] to end.
    ///
    /// # Errors
    ///
    /// [`SessionError::Output`] and [`SessionError::Host`].
    pub fn wait(
        &mut self,
        signals: &mut Arrivals,
        mut deadline: Option<Instant>,
        react: &mut dyn FnMut(i32) -> Reaction,
    ) -> Result<Outcome, SessionError> {
        let (mut outcome, mut is_late) = (None, false);
        loop {
            let passed = self.turn(signals.as_fd(), outcome.is_none(), deadline);
            let passed = passed.map_err(SessionError::Host)?;
            if outcome.is_none() {
                outcome = self.news();
            }
            if passed && outcome.is_some() {
                break;
            }
            for signal in signals.take() {
                let leaves = self.signal(signal, react) || outcome.is_some();
                if leaves && signal != libc::SIGWINCH && signal != libc::SIGCHLD {
                    return Ok(outcome.unwrap_or(Outcome::Left));
                }
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                match outcome.take().filter(|_| !is_late) {
                    Some(outcome) => return Ok(outcome),
                    None if is_late => return Ok(Outcome::TimedOut),
                    None => {}
                }
                is_late = true;
                self.send(&ToCommand::Signal(libc::SIGTERM));
                deadline = Some(Instant::now() + GRACE);
            }
        }
        for output in std::mem::take(&mut self.outputs) {
            // It does not panic.
            if let Ok(Err(error)) = output.join() {
                return Err(SessionError::Output(error));
            }
        }
        match is_late {
            true => Ok(Outcome::TimedOut),
            false => Ok(outcome.unwrap_or(Outcome::Lost)),
        }
    }

    /// Waits until something is to be done. Whether all output has been passed on.
    fn turn(
        &self,
        signals: impl AsFd,
        awaits_news: bool,
        deadline: Option<Instant>,
    ) -> io::Result<bool> {
        let mut fds = vec![PollFd::new(&signals, PollFlags::IN)];
        // The threads end after the command; one that ends it before has lost the VM, and has passed on all there is.
        match awaits_news {
            true => fds.push(PollFd::new(&self.control, PollFlags::IN)),
            false => fds.push(PollFd::new(&self.pass_on, PollFlags::IN)),
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, left.as_ref()) {
            Ok(_) => Ok(!awaits_news && !fds[1].revents().is_empty()),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes what the agent says of the command, and returns its end.
    fn news(&mut self) -> Option<Outcome> {
        let mut bytes = [0; 4096];
        let is_open = match self.control.read(&mut bytes) {
            Ok(length) => {
                self.inbox.add(&bytes[..length]);
                length > 0
            }
            Err(error) => matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ),
        };
        loop {
            return match self.inbox.take() {
                Ok(Some(FromCommand::Started { pid, elsewhere })) => {
                    log::debug!("the command is process {pid} of the guest");
                    if elsewhere && !self.is_elsewhere {
                        self.is_elsewhere = true;
                        let level = self.elsewhere_level;
                        self.warning()
                            .iter()
                            .for_each(|text| log::log!(level, "{text}"));
                    }
                    continue;
                }
                Ok(Some(FromCommand::Failed { reason, text })) => {
                    Some(Outcome::NotStarted { reason, text })
                }
                Ok(Some(FromCommand::Exited(status))) => Some(Outcome::Exited(status)),
                Ok(Some(FromCommand::Killed { signal, core })) => {
                    Some(Outcome::Killed { signal, core })
                }
                Ok(None) => (!is_open).then_some(Outcome::Lost),
                Err(error) => {
                    log::warn!("the agent in the guest makes no sense: {error}");
                    // Nor is its output waited for.
                    self.close_streams();
                    Some(Outcome::Lost)
                }
            };
        }
    }

    /// Reacts to a signal; whether the command is to be left.
    fn signal(&self, signal: i32, react: &mut dyn FnMut(i32) -> Reaction) -> bool {
        let message = match signal {
            libc::SIGCHLD => return false,
            libc::SIGWINCH if self.has_terminal => match window() {
                Some(window) => ToCommand::Resize(window),
                None => return false,
            },
            libc::SIGWINCH => ToCommand::Signal(signal),
            _ if react(signal) == Reaction::Leave => return true,
            _ => ToCommand::Signal(signal),
        };
        self.send(&message);
        false
    }

    /// Ends what passes them on.
    fn close_streams(&self) {
        for stream in &self.streams {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Says something to the agent.
    fn send(&self, message: &ToCommand) {
        match agent_protocol::write(&self.control, message) {
            Ok(()) => {}
            // An agent that reads nothing gets no part of a later one: it is as good as gone.
            Err(MessageError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                let _ = self.control.shutdown(Shutdown::Both);
            }
            Err(error) => log::debug!("cannot pass {message:?} on: {error}"),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Restored before anything is said.
        drop(self.raw.take());
        self.close_streams();
    }
}

/// The size of the terminal on stdin, or on stdout.
fn window() -> Option<Window> {
    let size = tcgetwinsize(stdin()).or_else(|_| tcgetwinsize(stdout()));
    let size = size
        .ok()
        .filter(|size| size.ws_row > 0 && size.ws_col > 0)?;
    Some(Window {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    // Up to 256 bytes come in one piece (getrandom(2)).
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(u64::from_le_bytes(bytes))
}
