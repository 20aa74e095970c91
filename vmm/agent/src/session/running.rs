//! A command that runs.

use std::io::Read;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_protocol::session::{FromCommand, Stream, ToCommand};
use agent_protocol::{Inbox, MessageError};
use rustix::event::{PollFd, PollFlags};

use super::pump::{End, Pump};
use super::start::{self, Ends, Started};
use crate::children::{Child, Ended};

/// How long a command whose host has gone has after SIGHUP.
const HANG_UP: Duration = Duration::from_secs(2);
/// How long the host may take to close a connection on which all has been said.
const LINGER: Duration = Duration::from_secs(10);

/// A stream that the host has opened, and what has come on it.
#[derive(Debug)]
pub struct Opened {
    /// Which one.
    pub stream: Stream,
    /// The connection, which does not block.
    pub connection: UnixStream,
    /// What has come.
    pub first: Vec<u8>,
}

/// The connections of a command.
#[derive(Debug)]
pub struct Session {
    /// What the host and the agent say of it.
    pub control: UnixStream,
    /// What has come there.
    pub inbox: Inbox,
    /// Its streams.
    pub streams: Vec<Opened>,
}

/// A command, and the connections of its session.
#[derive(Debug)]
pub struct Running {
    control: UnixStream,
    inbox: Inbox,
    child: Child,
    terminal: Option<Arc<OwnedFd>>,
    /// First the one to the command.
    pumps: Vec<Pump>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// It runs.
    Runs,
    /// The host has gone, and it gets SIGKILL then.
    HungUp(Instant),
    /// It has ended so, and the last of its output is on its way.
    Ended(Ended),
    /// All is said, and the host has until then to close the connection.
    Said(Instant),
    /// There is nothing more to do.
    Over,
}

impl Running {
    /// Passes the streams of a command on that has just been started.
    pub fn new(started: Started, session: Session) -> Self {
        let Started {
            child,
            ends,
            elsewhere,
        } = started;
        let mut running = Self {
            control: session.control,
            inbox: session.inbox,
            terminal: match &ends {
                Ends::Terminal(terminal) => Some(terminal.clone()),
                Ends::Pipes { .. } => None,
            },
            pumps: pumps(&ends, session.streams),
            state: State::Runs,
            child,
        };
        let pid = running.child.pid();
        running.say(&FromCommand::Started { pid, elsewhere });
        running.obey();
        running
    }

    /// Whether there is nothing more to do.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// How many descriptors it has.
    pub fn descriptors(&self) -> usize {
        1 + 2 * self.pumps.len()
    }

    /// When [`Self::late`] is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::HungUp(deadline) | State::Said(deadline) => Some(deadline),
            _ => None,
        }
    }

    /// Its deadline is over.
    pub fn late(&mut self) {
        match self.state {
            // Reaping it ends this.
            State::HungUp(_) => self.kill(),
            State::Said(_) => self.state = State::Over,
            _ => {}
        }
    }

    fn kill(&mut self) {
        let _ = self.child.signal_group(libc::SIGKILL);
        self.state = State::HungUp(Instant::now() + HANG_UP);
    }

    fn has_host(&self) -> bool {
        !matches!(self.state, State::HungUp(_) | State::Over)
    }

    /// Adds what it waits for.
    pub fn watch<'a>(&'a self, list: &mut Vec<PollFd<'a>>) {
        if self.has_host() {
            list.push(PollFd::new(&self.control, PollFlags::IN));
        }
        self.pumps.iter().for_each(|pump| pump.watch(list));
    }

    /// Does what can be done. `ready` has what came of the descriptors of [`Self::watch`].
    pub fn turn(&mut self, ready: &mut impl Iterator<Item = PollFlags>) {
        let control = self.has_host().then(|| ready.next()).flatten();
        self.pumps.iter_mut().for_each(|pump| pump.turn(ready));
        if control.is_some_and(|flags| !flags.is_empty()) {
            self.listen();
        }
        self.say_end();
    }

    /// Its process has ended.
    pub fn ended(&mut self, ended: Ended) {
        if let State::HungUp(_) = self.state {
            self.state = State::Over;
            return;
        }
        self.state = State::Ended(ended);
        let (input, outputs) = self.pumps.split_at_mut(1);
        input.iter_mut().for_each(Pump::close);
        outputs.iter_mut().for_each(Pump::finish);
        self.say_end();
    }

    /// Takes what the host says.
    fn listen(&mut self) {
        let mut bytes = [0; 1024];
        match (&self.control).read(&mut bytes) {
            Ok(length) if length > 0 => {
                self.inbox.add(&bytes[..length]);
                self.obey();
            }
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                ) => {}
            _ => self.hang_up(),
        }
    }

    fn obey(&mut self) {
        loop {
            match self.inbox.take() {
                Ok(Some(ToCommand::Signal(signal))) => {
                    // The kernel refuses a number that is none.
                    let _ = self.child.signal_group(signal);
                }
                Ok(Some(ToCommand::Resize(window))) => {
                    if let Some(terminal) = &self.terminal {
                        let _ = start::resize(terminal.as_fd(), window);
                    }
                }
                Ok(None) => return,
                Err(_) => return self.hang_up(),
            }
        }
    }

    /// The host has gone: the command is to end too.
    fn hang_up(&mut self) {
        match self.state {
            State::Runs => {
                self.child.end_group_with_it();
                let _ = self.child.signal_group(libc::SIGHUP);
                // So that one that is stopped gets it.
                let _ = self.child.signal_group(libc::SIGCONT);
                self.state = State::HungUp(Instant::now() + HANG_UP);
            }
            State::HungUp(_) => {}
            State::Ended(_) | State::Said(_) | State::Over => self.state = State::Over,
        }
        let _ = self.control.shutdown(Shutdown::Both);
        self.terminal = None;
        self.pumps.clear();
    }

    fn say_end(&mut self) {
        let State::Ended(ended) = self.state else {
            return;
        };
        if !self.pumps.iter().all(Pump::is_done) {
            return;
        }
        self.terminal = None;
        self.pumps.clear();
        self.state = State::Said(Instant::now() + LINGER);
        self.say(&match ended {
            Ended::Exited(status) => FromCommand::Exited(status),
            Ended::Killed { signal, core } => FromCommand::Killed { signal, core },
        });
        let _ = self.control.shutdown(Shutdown::Write);
    }

    fn say(&mut self, message: &FromCommand) {
        match agent_protocol::write(&self.control, message) {
            Ok(()) | Err(MessageError::Closed) => {}
            // The host reads nothing, or has gone.
            Err(_) => self.hang_up(),
        }
    }
}

/// The pumps between the host's connections and the command, first the one to it.
fn pumps(ends: &Ends, streams: Vec<Opened>) -> Vec<Pump> {
    let mut streams: Vec<_> = streams;
    streams.sort_by_key(|opened| opened.stream);
    let mut hosts = streams
        .into_iter()
        .map(|opened| (End::Host(Arc::new(opened.connection)), opened.first));
    let mut next = || hosts.next();
    match ends {
        Ends::Terminal(terminal) => {
            let terminal = End::Terminal(terminal.clone());
            let Some((host, first)) = next() else {
                return Vec::new();
            };
            vec![
                Pump::new(host.clone(), terminal.clone(), first),
                Pump::new(terminal, host, Vec::new()),
            ]
        }
        Ends::Pipes {
            stdin,
            stdout,
            stderr,
        } => {
            let pipe = |end: &Arc<OwnedFd>| End::Pipe(end.clone());
            let mut pumps = Vec::new();
            if let Some((host, first)) = next() {
                pumps.push(Pump::new(host, pipe(stdin), first));
            }
            for output in [stdout, stderr] {
                if let Some((host, _)) = next() {
                    pumps.push(Pump::new(pipe(output), host, Vec::new()));
                }
            }
            pumps
        }
    }
}
