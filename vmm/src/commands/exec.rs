//! `minivmm exec`: a command in a VM whose guest has the agent.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use agent_protocol::session::{Directory, Exec, ExecFailure, Window};

use crate::agent::{Agent, ConnectError, FORWARDED, Outcome, Reaction, Session, SessionError};
use crate::child::Arrivals;
use crate::cli::ExecArgs;
use crate::tty;

/// The exit status when the VM or its agent fails.
const FAILED: u8 = 125;

/// So many of SIGINT and SIGTERM within this time leave a command that does not end by them, as with Docker.
const MANY: usize = 3;
const SOON: Duration = Duration::from_secs(1);

/// The size of a terminal that has none.
const WINDOW: Window = Window {
    rows: 24,
    columns: 80,
};

/// Why a command's own end is not known.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// Its agent cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Its streams cannot be passed on.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The host refuses something.
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    /// It did not start.
    #[error("{text}")]
    NotStarted {
        /// Why.
        reason: ExecFailure,
        /// What was tried on what.
        text: String,
    },
    /// The VM or the agent has ended.
    #[error("the connection to the guest's agent is lost: the VM or the agent has ended")]
    Lost,
    /// The user has left it.
    #[error("left the command, which the agent ends, after {MANY} signals within a second")]
    Left,
}

impl ExecError {
    /// The exit status that says so.
    pub fn code(&self) -> u8 {
        match self {
            Self::NotStarted { reason, text } => {
                let (reason, text) = (*reason, text.clone());
                Outcome::NotStarted { reason, text }.code()
            }
            _ => FAILED,
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Connect(error) | Self::Session(SessionError::Connect(error)) => error.remedy(),
            _ => None,
        }
    }
}

/// Runs the command and returns its status.
pub fn run(args: &ExecArgs) -> Result<u8, ExecError> {
    let agent = Agent::of(&args.target)?;
    let mut signals = Arrivals::new(&FORWARDED).map_err(ExecError::Signals)?;
    tty::restore_on_panic();
    let mut session = Session::start(&agent, exec(args))?;
    let mut impatience = Impatience::default();
    let mut react = |signal| impatience.react(signal);
    let outcome = session.wait(&mut signals, None, &mut react)?;
    drop(session);
    match outcome {
        Outcome::NotStarted { reason, text } => Err(ExecError::NotStarted { reason, text }),
        Outcome::Lost => Err(ExecError::Lost),
        Outcome::Left => Err(ExecError::Left),
        ended => Ok(ended.code()),
    }
}

/// When signals came that ask for an end, of late.
#[derive(Debug, Default)]
struct Impatience(Vec<Instant>);

impl Impatience {
    fn react(&mut self, signal: i32) -> Reaction {
        if matches!(signal, libc::SIGINT | libc::SIGTERM) {
            self.0.retain(|came| came.elapsed() < SOON);
            self.0.push(Instant::now());
        }
        match self.0.len() < MANY {
            true => Reaction::Forward,
            false => Reaction::Leave,
        }
    }
}

fn exec(args: &ExecArgs) -> Exec {
    let terminal = args.terminal.then_some(WINDOW);
    let term = std::env::var_os("TERM").filter(|_| args.terminal);
    let term = term.map(|term| [b"TERM=", term.as_bytes()].concat());
    let chosen = args.env.iter().filter_map(|variable| variable.resolve());
    Exec {
        session: 0,
        argv: args
            .command
            .iter()
            .map(|word| word.as_bytes().to_vec())
            .collect(),
        env: term.into_iter().chain(chosen).collect(),
        directory: args.workdir.as_ref().map(|path| Directory {
            path: path.as_os_str().as_bytes().to_vec(),
            required: true,
        }),
        user: args.user.clone(),
        terminal,
        core: false,
    }
}
