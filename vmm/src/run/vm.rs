//! The VM's process: this program again, as `minivmm --kernel …` or `minivmm qemu --kernel …`.
//!
//! Nothing of it stays behind, whoever is killed. The VM ends when the leash, a pipe, hangs up. Its directory, with all
//! of its sockets, is removed by itself, by this process when it was killed, or by whoever finds it stale.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeWriter, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{self, Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use agent_protocol::boot::ToInit;
use nix::sys::signal::{SigHandler, Signal as NixSignal, signal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{AddressFamily, SocketType, socket};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, setsid};

use super::RunError;
use super::console::{Tail, show_console, show_log};
use super::follow::{Followed, Known, Shared, end_at_once};
use super::oci::Image;
use super::plan::Plan;
use super::root;
use crate::agent::Agent;
use crate::child::{Arrivals, FIRST, Passed, close_on_exec};
use crate::config::RunnerFds;
use crate::control::exit::chain;
use crate::detach;
use crate::instance::{self, Found};
use crate::limits;
use crate::nic::registry::{self, Entry};
use crate::printable::printable;
use crate::signals;

/// How long the VM's process may take to end once it has been asked to, on a loaded host too.
const END: Duration = Duration::from_secs(10);

/// How often to look whether what it has left can be removed.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A VM that runs, or has ended. Dropped, it is ended.
#[derive(Debug)]
pub struct Vm {
    shared: Arc<Shared>,
    /// Its process.
    pidfd: Arc<OwnedFd>,
    /// The same.
    pid: u32,
    /// The guest's console.
    pub console: Arc<Tail>,
    /// Its own log.
    pub log: Arc<Tail>,
    /// The VM ends when this is closed.
    _leash: PipeWriter,
    _initramfs: File,
}

/// The numbers under which the VM's process finds what it inherits.
#[derive(Clone, Copy, Debug)]
pub struct Numbers {
    events: RawFd,
    leash: RawFd,
    boot: RawFd,
}

impl Numbers {
    /// Those that follow `named`, which are the user's.
    pub fn after(named: &[RawFd]) -> Self {
        let first = named
            .iter()
            .map(|number| number + 1)
            .fold(FIRST, RawFd::max);
        Self {
            events: first,
            leash: first + 1,
            boot: first + 2,
        }
    }

    /// The options that name them, for a VM that may have been detached.
    pub fn options(self, is_detached: bool) -> [OsString; 4] {
        let runner = RunnerFds {
            leash: self.leash,
            boot: self.boot,
            is_detached,
        };
        let runner = runner.to_string();
        let events = format!("fd:{}", self.events);
        ["--events", &events, "--runner", &runner].map(OsString::from)
    }
}

impl Vm {
    /// Starts the VM's process.
    ///
    /// # Errors
    ///
    /// The host refuses something. What the VM's process itself fails at is known later.
    pub fn start(plan: &Plan, shows_console: bool) -> Result<Self, RunError> {
        let failed = |error| RunError::Host("start the VM's process", error);
        Self::spawn(plan, shows_console).map_err(failed)
    }

    fn spawn(plan: &Plan, shows_console: bool) -> io::Result<Self> {
        let mut initramfs = File::from(memfd_create("initramfs", MemfdFlags::CLOEXEC)?);
        initramfs.write_all(&plan.initramfs)?;
        let (console, its_console) = io::pipe()?;
        let (log, its_log) = io::pipe()?;
        let (events, its_events) = io::pipe()?;
        let (its_leash, leash) = io::pipe()?;
        let boot = socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
        let path = format!("/proc/{}/fd/{}", process::id(), initramfs.as_raw_fd());
        let mut command = Command::new(env::current_exe()?);
        command.args(plan.words(path.as_ref()));
        command
            .env("RUST_LOG_STYLE", "never")
            .env_remove("RUST_LOG");
        command
            .stdin(Stdio::null())
            .stdout(its_console)
            .stderr(its_log);
        let numbers = plan.numbers;
        let placed = vec![
            (numbers.events, OwnedFd::from(its_events)),
            (numbers.leash, its_leash.into()),
            (numbers.boot, boot.try_clone()?),
        ];
        let child = start(command, placed, plan.inherited.clone())?;
        let pid = Pid::from_child(&child);
        let pidfd = Arc::new(pidfd_open(pid, PidfdFlags::empty())?);
        let number = child.id();
        let show = shows_console.then_some(show_console as fn(&str));
        let followed = Followed {
            child,
            pidfd: Arc::clone(&pidfd),
            events,
            boot: Some(boot.into()),
        };
        Ok(Self {
            shared: Shared::follow(followed)?,
            pidfd,
            pid: number,
            console: Tail::follow(console, "console", show)?,
            log: Tail::follow(log, "vm-log", Some(show_log))?,
            _leash: leash,
            _initramfs: initramfs,
        })
    }

    /// What is known of it now.
    pub fn known<T>(&self, look: impl FnOnce(&Known) -> T) -> T {
        look(&self.shared.known())
    }

    /// Adds to what the user should know.
    pub fn note_warning(&self, warning: String) {
        self.shared.change(|known| known.warn(warning));
    }

    /// Waits until something more is known, a signal has come, or the time is over.
    ///
    /// # Errors
    ///
    /// As of poll(2).
    pub fn wait(&self, signals: &Arrivals, until: Option<Instant>) -> io::Result<()> {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = [
            PollFd::new(signals, PollFlags::IN),
            PollFd::from_borrowed_fd(self.shared.news(), PollFlags::IN),
        ];
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {
                self.shared.take_news();
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Says something to the guest's init. One that does not read it ends otherwise.
    pub fn send(&self, message: &ToInit) {
        self.shared.send(message);
    }

    /// Sends an image's files to the guest, by a thread of its own.
    ///
    /// # Errors
    ///
    /// There can be no thread.
    pub fn unpack(&self, agent: Agent, image: Arc<Image>, path: Vec<u8>) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let send = move || {
            // A guest that takes what it gets is not silent.
            let said = || shared.change(|known| known.said = Some(Instant::now()));
            let sent = root::send(&agent, &image, path, &said);
            let sent = sent.map_err(|error| printable(&chain(&error)).into_owned());
            shared.change(|known| known.unpacked = Some(sent));
        };
        let builder = thread::Builder::new().name("image".into());
        builder.spawn(send).map(drop)
    }

    /// Waits for the end of the VM's process; whether that has come in time.
    pub fn await_end(&self, patience: Duration) -> bool {
        let has_ended = |known: &Known| known.ended.is_some();
        self.shared.wait_until(patience, has_ended)
    }

    /// Ends the VM at once, and removes what it has left if it had to be killed.
    pub fn end(&self) {
        end_at_once(&self.pidfd);
        if !self.await_end(END) {
            let _ = pidfd_send_signal(&*self.pidfd, Signal::KILL);
            self.await_end(END);
        }
        self.clean();
    }

    /// Removes what a VM has left whose process was killed; and what is to be remembered of one of `-d`, if no one has learned its
    /// name.
    pub fn clean(&self) {
        let was_killed = |known: &Known| known.ended.is_some_and(|end| end.code().is_none());
        let is_unknown = detach::is_wanted() && !detach::is_done();
        if !self.known(was_killed) && !is_unknown {
            return;
        }
        // A look at all VMs removes what is stale. What it has started may have the lock a little longer.
        let is_this = |found: &Found| found.record.pid == self.pid;
        for found in instance::all_also_ended().into_iter().filter(is_this) {
            found.await_end(END);
            if is_unknown {
                found.forget();
            }
        }
        // Likewise with the records of its NICs. Nothing says when a lock is free.
        let deadline = Instant::now() + END;
        let is_this = |entry: &Entry| entry.pid == self.pid;
        while registry::running().iter().any(is_this) && Instant::now() < deadline {
            thread::sleep(LOOK_AGAIN);
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.known(|known| known.ended.is_none()) {
            self.end();
        }
    }
}

/// Starts the command with what it inherits: `placed` under its numbers, and what this process has inherited under those
/// of `inherited`.
fn start(
    mut command: Command,
    placed: Vec<(RawFd, OwnedFd)>,
    inherited: Vec<RawFd>,
) -> io::Result<Child> {
    let passed = Passed::new(placed, Vec::new())?;
    let enter = move || {
        // The keys of a terminal are for this process alone.
        setsid()?;
        close_on_exec();
        for number in &inherited {
            // SAFETY: it takes numbers, and changes what exec does alone.
            unsafe { libc::fcntl(*number, libc::F_SETFD, 0) };
        }
        passed.place()?;
        limits::restore()?;
        signals::restore()?;
        for ending in [
            NixSignal::SIGTERM,
            NixSignal::SIGINT,
            NixSignal::SIGHUP,
            NixSignal::SIGQUIT,
        ] {
            // SAFETY: the default action runs no code of this process.
            unsafe { signal(ending, SigHandler::SigDfl) }?;
        }
        Ok(())
    };
    // SAFETY: what runs between fork and exec makes system calls alone: it allocates nothing and takes no lock.
    unsafe { command.pre_exec(enter) };
    command.spawn()
}
