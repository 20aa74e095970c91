//! `minivmm wait`: waits until a running VM has come to something, by what can be seen of it from outside.

use std::io::{self, ErrorKind, Read};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use regex_lite::Regex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::console::{self, ConsoleError};
use crate::agent::{Agent, ConnectError};
use crate::cli::WaitArgs;
use crate::config::{Condition, Patience};
use crate::instance::{self, Ended, FindError, Found, Record};
use crate::qmp::client::ClientError;

mod lines;
mod port;
mod vm;

use lines::Lines;
use vm::Vm;

/// The exit status when the time is over, as of timeout(1).
const TIMED_OUT: u8 = 124;

/// Why a condition is not met.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// There is no such VM.
    #[error(transparent)]
    Find(#[from] FindError),
    /// Its console cannot be read.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// It cannot be asked.
    #[error("cannot ask the VM")]
    Ask(#[from] ClientError),
    /// It can have no agent that this program talks to.
    #[error(transparent)]
    Agent(#[from] ConnectError),
    /// The host refuses something.
    #[error("cannot wait for the console")]
    Read(#[source] io::Error),
    /// It ended first.
    #[error("{name} has ended ({how}) before it had {condition}: {seen}")]
    Ended {
        /// Its name.
        name: String,
        /// How it ended.
        how: String,
        /// What was waited for.
        condition: String,
        /// What was seen of it.
        seen: String,
    },
    /// The time is over.
    #[error("{name} had no {condition} in time: {seen}")]
    TimedOut {
        /// Its name.
        name: String,
        /// What was waited for.
        condition: String,
        /// What was seen of it.
        seen: String,
    },
}

impl WaitError {
    /// The exit status that says so.
    pub fn code(&self) -> u8 {
        match self {
            Self::TimedOut { .. } => TIMED_OUT,
            _ => 1,
        }
    }
}

/// When waiting ends, if ever.
#[derive(Clone, Copy, Debug)]
struct Deadline(Option<Instant>);

impl Deadline {
    fn after(Patience(limit): Patience) -> Self {
        Self(limit.and_then(|limit| Instant::now().checked_add(limit)))
    }

    fn is_over(self) -> bool {
        self.0.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// The earlier of both.
    fn cap(self, other: Instant) -> Instant {
        self.0.map_or(other, |deadline| deadline.min(other))
    }
}

/// What has come of a condition.
#[derive(Debug)]
enum Met {
    Yes,
    /// The VM has ended, or the time is over, and this was seen.
    Not(String),
}

/// How long a VM may take to start, or to say that it has ended, and how often it is looked whether it has.
const STARTING: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// How long an agent may take to answer, and how long until it is asked again.
const AGENT: Duration = Duration::from_secs(12);
const TRY_AGAIN: Duration = Duration::from_millis(50);
/// How long a VM that has ended may take to give back what it had of the host.
const GIVING_BACK: Duration = Duration::from_secs(10);
/// How long one call waits for a VM where there is no limit.
const LONG: Duration = Duration::from_secs(3600);

/// Waits for all conditions, one after the other.
pub fn run(args: &WaitArgs) -> Result<u8, WaitError> {
    let deadline = Deadline::after(args.timeout);
    let (found, mut vm) = match connect(args)? {
        Connected::Running(found, vm) => (found, vm),
        Connected::Ended(ended) => return has_ended(args, &ended),
    };
    for condition in &args.conditions {
        log::debug!("waiting for {}", describe(condition));
        let met = match condition {
            Condition::Address => address(&mut vm, deadline)?,
            Condition::Port(port) => port::wait(&mut vm, *port, deadline)?,
            Condition::Console(regex) => console(&mut vm, &found.record, regex, deadline)?,
            Condition::Agent => agent(&mut vm, &found.record, deadline)?,
            Condition::Exit => exit(&mut vm, &found, deadline)?,
        };
        let Met::Not(seen) = met else {
            continue;
        };
        let (name, condition) = (found.record.name.to_string(), describe(condition));
        return Err(match vm.has_ended {
            true => WaitError::Ended {
                name,
                how: vm.exit().1,
                condition,
                seen,
            },
            false => WaitError::TimedOut {
                name,
                condition,
                seen,
            },
        });
    }
    let ends = args
        .conditions
        .iter()
        .any(|condition| matches!(condition, Condition::Exit));
    Ok(if ends { vm.exit().0 } else { 0 })
}

/// A VM that runs, or one of `-d` that has ended.
#[derive(Debug)]
enum Connected {
    Running(Box<Found>, Vm),
    Ended(Ended),
}

/// Connects to the VM, which may only be starting, or just be ending.
fn connect(args: &WaitArgs) -> Result<Connected, WaitError> {
    let deadline = Instant::now() + STARTING;
    loop {
        let found = instance::find_also_ended(&args.name)?;
        if let Some(ended) = found.record.ended {
            return Ok(Connected::Ended(ended));
        }
        match Vm::connect(&found) {
            Ok(vm) => return Ok(Connected::Running(Box::new(found), vm)),
            Err(ClientError::Connect(..) | ClientError::Closed) if Instant::now() < deadline => {
                thread::sleep(LOOK_AGAIN);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// What comes of waiting for a VM of `-d` that has ended before.
fn has_ended(args: &WaitArgs, ended: &Ended) -> Result<u8, WaitError> {
    let mut conditions = args.conditions.iter();
    match conditions.find(|condition| !matches!(condition, Condition::Exit)) {
        None => Ok(ended.status),
        Some(condition) => Err(WaitError::Ended {
            name: args.name.to_string(),
            how: ended.reason.clone(),
            condition: describe(condition),
            seen: "it was waited for too late".into(),
        }),
    }
}

fn describe(condition: &Condition) -> String {
    match condition {
        Condition::Address => "address".into(),
        Condition::Port(port) => format!("open port {port}"),
        Condition::Console(regex) => format!("line with `{regex}` on its console"),
        Condition::Agent => "answer of an agent".into(),
        Condition::Exit => "end".into(),
    }
}

/// Waits for an address that reaches further than the guest's link, and shows it.
fn address(vm: &mut Vm, deadline: Deadline) -> Result<Met, WaitError> {
    loop {
        if let Some(address) = vm.addresses().next() {
            // A reader that has gone is no error.
            let _ = super::print(&format!("{address}\n"));
            return Ok(Met::Yes);
        }
        if vm.has_ended || deadline.is_over() {
            let all: Vec<_> = vm.nics.iter().flat_map(|nic| &nic.addresses).collect();
            return Ok(Met::Not(match (all.is_empty(), vm.nics.is_empty()) {
                (_, true) => "it has no NIC".into(),
                (true, _) => "the guest has shown none".into(),
                (false, _) => format!("the guest has shown only {}", listed(&all)),
            }));
        }
        vm.listen(deadline.cap(Instant::now() + LONG))?;
    }
}

fn listed(addresses: &[&IpAddr]) -> String {
    let all: Vec<_> = addresses
        .iter()
        .map(|address| address.to_string())
        .collect();
    all.join(", ")
}

/// Waits for a line on the console.
fn console(
    vm: &mut Vm,
    record: &Record,
    regex: &Regex,
    deadline: Deadline,
) -> Result<Met, WaitError> {
    let mut lines = Lines::new(regex);
    let mut connected = console::connect(record)?;
    let mut chunk = [0; 16 << 10];
    while let Some(socket) = &mut connected {
        socket.set_nonblocking(true).map_err(WaitError::Read)?;
        match socket.read(&mut chunk) {
            // The VM's end, or this program was too slow for the guest.
            Ok(0) => connected = console::connect_again(record),
            Ok(length) if lines.find_in(&chunk[..length]) => return Ok(Met::Yes),
            Ok(_) => {}
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock => await_news(vm, socket, deadline)?,
                ErrorKind::Interrupted => {}
                ErrorKind::ConnectionReset => connected = console::connect_again(record),
                _ => return Err(WaitError::Read(error)),
            },
        }
        if deadline.is_over() {
            return Ok(Met::Not(last_line(&lines)));
        }
    }
    vm.await_end();
    Ok(Met::Not(last_line(&lines)))
}

fn last_line(lines: &Lines<'_>) -> String {
    match lines.last() {
        last if last.is_empty() => "the console shows nothing".into(),
        last => format!("the console's last line is `{last}`"),
    }
}

/// Waits until the console or the VM says something.
fn await_news(vm: &mut Vm, console: &UnixStream, deadline: Deadline) -> Result<(), WaitError> {
    let mut watched = vec![PollFd::new(console, PollFlags::IN)];
    if !vm.has_ended {
        watched.push(PollFd::new(&*vm, PollFlags::IN));
    }
    let now = Instant::now();
    let left = deadline.cap(now + LONG).saturating_duration_since(now);
    let _ = poll(&mut watched, Timespec::try_from(left).ok().as_ref());
    // So that what it says does not pile up.
    if !vm.has_ended {
        vm.listen(Instant::now())?;
    }
    Ok(())
}

/// Waits until the agent in the guest answers.
fn agent(vm: &mut Vm, record: &Record, deadline: Deadline) -> Result<Met, WaitError> {
    let agent = Agent::of_record(record)?;
    loop {
        let left = deadline
            .cap(Instant::now() + AGENT)
            .saturating_duration_since(Instant::now());
        let seen = match agent.greet(left.max(LOOK_AGAIN)) {
            Ok(()) => return Ok(Met::Yes),
            Err(error @ ConnectError::Version(_)) => return Err(error.into()),
            Err(error) => error.to_string(),
        };
        vm.listen(deadline.cap(Instant::now() + TRY_AGAIN))?;
        if vm.has_ended || deadline.is_over() {
            return Ok(Met::Not(seen));
        }
    }
}

/// Waits for the end.
fn exit(vm: &mut Vm, found: &Found, deadline: Deadline) -> Result<Met, WaitError> {
    while !vm.has_ended {
        if deadline.is_over() {
            return Ok(Met::Not("it runs on".into()));
        }
        vm.listen(deadline.cap(Instant::now() + LONG))?;
    }
    // What it has taken from the host is given back then.
    found.await_end(GIVING_BACK);
    Ok(Met::Yes)
}
