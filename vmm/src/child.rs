//! Another program: all that starting one takes, and waiting for it.
//!
//! | file | what it is |
//! | --- | --- |
//! | `user.rs` | whose the program is, and its capabilities |
//! | `descriptors.rs` | what it inherits |
//! | `terminal.rs` | a terminal of its own, where root's must not be its |
//! | `guard.rs` | the process that ends it and what it has started |
//! | `leash.rs` | what ends one that starts no other |
//! | `output.rs` | one that only says something |
//!
//! minivmm becomes the program ([`Program::exec`]), or starts it and stays ([`Program::spawn`]). Then a guard stands
//! between the two, so that nothing of the program outlives minivmm, whichever way that ends.

mod descriptors;
mod guard;
mod leash;
mod output;
mod terminal;
mod user;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{ChildStderr, Command, ExitStatus};

use nix::sys::signal::SigSet;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_current_process_group, kill_process,
    set_parent_process_death_signal, waitid,
};
use signal_hook::consts::{SIGCHLD, SIGWINCH};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

use crate::limits;
use crate::log_writer;
use crate::signals::{self, ENDING, not_ignored};
use guard::Guard;
use terminal::{NewTerminal, Relay, Terminal};

pub use descriptors::{FIRST, Passed, close_but, close_on_exec};
pub use guard::Rest;
use guard::must_have_parent;
pub use leash::Leash;
pub use output::MOST;
pub use user::{User, UserError};

/// Variables of systemd's socket activation (sd_listen_fds(3)): the descriptors have other numbers here.
const ACTIVATION: [&str; 3] = ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// A program to be run.
#[derive(Debug)]
pub struct Program {
    /// As for the standard library. Its user, groups and closures are not to be used.
    pub command: Command,
    /// Who it runs as; `None` for who runs minivmm.
    pub user: Option<User>,
    /// Whether it and its descendants can never get privileges, by set-user-ID programs for instance. Not for root's.
    pub no_new_privs: bool,
    /// It finds them as [`FIRST`] and the numbers that follow.
    pub numbered: Vec<OwnedFd>,
    /// It finds them under the numbers beside them, which are free.
    pub placed: Vec<(RawFd, OwnedFd)>,
    /// These stay open in it, under any numbers.
    pub others: Vec<OwnedFd>,
    /// Whether it inherits what minivmm has inherited and not taken over.
    pub inherits: bool,
    /// What becomes of what it has started, when it has ended.
    pub rest: Rest,
}

impl Program {
    /// A program that inherits nothing but the standard descriptors.
    pub fn new(command: Command) -> Self {
        Self {
            command,
            user: None,
            no_new_privs: false,
            numbered: Vec::new(),
            placed: Vec::new(),
            others: Vec::new(),
            inherits: false,
            rest: Rest::End,
        }
    }

    /// Whether [`Program::exec`] won't do: it needs a terminal of its own.
    pub fn takes_a_child(&self) -> bool {
        Terminal::of(self.user.as_ref()).takes_a_child()
    }

    /// Becomes the program; returns only when that fails. Not for one that [takes a child](Self::takes_a_child).
    pub fn exec(mut self) -> io::Error {
        let terminal = match Terminal::of(self.user.as_ref()) {
            Terminal::Keep => Controlling::Inherited,
            Terminal::Leave | Terminal::Replace(_) => Controlling::None,
        };
        match self.prepare(None, terminal) {
            Ok(()) => {
                log_writer::flush();
                self.command.exec()
            }
            Err(error) => error,
        }
    }

    /// Starts the program.
    pub fn spawn(mut self) -> io::Result<Child> {
        let (terminal, relay) = match (Terminal::of(self.user.as_ref()), &self.user) {
            (Terminal::Replace(replaced), Some(user)) => {
                let (terminal, relay) = terminal::make(replaced, user)?;
                (Controlling::New(terminal), Some(relay))
            }
            (Terminal::Leave, _) => (Controlling::None, None),
            _ => (Controlling::Inherited, None),
        };
        self.prepare(Some(Guard::new(self.rest, relay.is_some())), terminal)?;
        let guard = self.command.spawn()?;
        Ok(Child {
            guard,
            relay,
            has_ended: false,
        })
    }

    fn prepare(&mut self, guard: Option<Guard>, terminal: Controlling) -> io::Result<()> {
        if !self.inherits {
            close_on_exec();
        }
        if !self.numbered.is_empty() {
            for name in ACTIVATION {
                self.command.env_remove(name);
            }
        }
        let numbered = (FIRST..).zip(std::mem::take(&mut self.numbered));
        let numbered = numbered.chain(std::mem::take(&mut self.placed)).collect();
        let entry = Entry {
            passed: Passed::new(numbered, std::mem::take(&mut self.others))?,
            user: self.user.take(),
            no_new_privs: self.no_new_privs,
            guard,
            terminal,
        };
        // SAFETY: what runs between fork and exec makes system calls alone: it allocates nothing and takes no lock.
        unsafe { self.command.pre_exec(move || entry.enter()) };
        Ok(())
    }
}

/// The program's controlling terminal.
#[derive(Debug)]
enum Controlling {
    Inherited,
    None,
    New(NewTerminal),
}

/// What is done between fork and exec.
#[derive(Debug)]
struct Entry {
    guard: Option<Guard>,
    terminal: Controlling,
    passed: Passed,
    user: Option<User>,
    no_new_privs: bool,
}

impl Entry {
    fn enter(&self) -> io::Result<()> {
        let guard = match &self.guard {
            Some(guard) => {
                guard.arm()?;
                if let Controlling::New(terminal) = &self.terminal {
                    terminal.open_session()?;
                }
                Some(guard.fork()?)
            }
            None => None,
        };
        match &self.terminal {
            Controlling::Inherited => {}
            Controlling::None => terminal::leave(),
            Controlling::New(terminal) => terminal.take()?,
        }
        self.passed.place()?;
        user::enter(self.user.as_ref(), self.no_new_privs)?;
        if let Some(guard) = guard {
            // A change of user clears this.
            set_parent_process_death_signal(Some(Signal::KILL))?;
            must_have_parent(guard)?;
            SigSet::empty().thread_set_mask()?;
        }
        limits::restore()?;
        signals::restore()
    }
}

/// A program that runs. It is killed when dropped.
#[derive(Debug)]
pub struct Child {
    guard: std::process::Child,
    relay: Option<Relay>,
    has_ended: bool,
}

impl Child {
    /// Its stderr, if that was to be a pipe.
    pub fn stderr(&mut self) -> Option<ChildStderr> {
        self.guard.stderr.take()
    }

    /// Sends the program a signal.
    pub fn signal(&self, signal: i32) {
        if let (false, Some(signal)) = (self.has_ended, Signal::from_named_raw(signal)) {
            let _ = kill_process(self.pid(), signal);
        }
    }

    /// Kills the program and all that it has started.
    pub fn kill(&mut self) -> io::Result<ExitStatus> {
        self.signal(guard::KILL_ALL.as_raw());
        // It may have stopped with the program.
        self.signal(Signal::CONT.as_raw());
        let status = self.guard.wait();
        self.has_ended = true;
        status
    }

    /// Its exit status, once it has ended.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        let status = self.guard.try_wait()?;
        self.has_ended |= status.is_some();
        Ok(status)
    }

    /// Waits for the program's end, and passes on those of the `signals` that are in `forwarded`; to a program on a
    /// terminal of its own all but those of job control, which come from its keys, too. Take `signals` before the program
    /// is started, so that none is missed.
    pub fn wait(mut self, mut signals: Arrivals, forwarded: &[i32]) -> io::Result<ExitStatus> {
        let forwarded = if self.relay.is_some() {
            &ENDING
        } else {
            forwarded
        };
        loop {
            if let Some(status) = self.try_wait()? {
                if let Some(mut relay) = self.relay.take() {
                    relay.finish();
                }
                return Ok(status);
            }
            match &mut self.relay {
                Some(relay) => relay.pass_on(signals.as_fd())?,
                None => signals.wait()?,
            }
            for signal in signals.take() {
                match (&self.relay, signal) {
                    (Some(relay), SIGWINCH) => relay.copy_size(),
                    (Some(_), SIGCHLD) => self.stop_together(),
                    _ if forwarded.contains(&signal) => self.signal(signal),
                    _ => {}
                }
            }
        }
    }

    /// When the program has stopped, stops minivmm and its whole job, as the terminal's key would have.
    fn stop_together(&self) {
        let stopped = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG;
        if let Ok(Some(_)) = waitid(WaitId::Pid(self.pid()), stopped) {
            let _ = kill_current_process_group(Signal::TSTP);
            // Continued by the user.
            if let Some(relay) = &self.relay {
                relay.go_on();
            }
            self.signal(Signal::CONT.as_raw());
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.guard)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.has_ended {
            let _ = self.kill();
        }
    }
}

/// The signals that come to minivmm while it waits for a program.
#[derive(Debug)]
pub struct Arrivals(SignalDelivery<UnixStream, SignalOnly>);

impl Arrivals {
    /// Of `signals`, as far as they are not ignored, and what waiting takes.
    pub fn new(signals: &[i32]) -> io::Result<Self> {
        let signals = [&not_ignored(signals)[..], &[SIGCHLD, SIGWINCH]].concat();
        let (read, write) = UnixStream::pair()?;
        Ok(Self(SignalDelivery::with_pipe(
            read, write, SignalOnly, signals,
        )?))
    }

    fn wait(&self) -> io::Result<()> {
        match poll(&mut [PollFd::new(self.0.get_read(), PollFlags::IN)], None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Those that have come since.
    pub fn take(&mut self) -> impl Iterator<Item = i32> + use<> {
        self.0.pending()
    }
}

impl AsFd for Arrivals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_read().as_fd()
    }
}

/// The exit status as a shell reports it: 128+N when signal N killed the program.
pub fn exit_code(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128 + signal as u8,
        (None, None) => 1,
    }
}

/// The status that a shell gives for a program that cannot be run: 127 when there is none, else 126.
pub fn exec_failure_code(error: &io::Error) -> u8 {
    if error.kind() == io::ErrorKind::NotFound {
        127
    } else {
        126
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use super::*;

    fn shell(script: &str) -> Program {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Program::new(command)
    }

    #[test]
    fn descriptors_come_under_their_numbers_and_others_stay_open() {
        let pipes: Vec<_> = (0..4).map(|_| io::pipe().unwrap()).collect();
        let (mut readers, mut writers): (Vec<_>, Vec<_>) = pipes.into_iter().unzip();
        let mut program = shell(
            "printf a >&3; printf b >&4; printf c >&5; for fd in /proc/$$/fd/*; do \
             [ -p $fd ] && [ ${fd##*/} -gt 5 ] && printf d >$fd; done; :",
        );
        program.others.extend(writers.pop().map(OwnedFd::from));
        program.numbered = writers.into_iter().map(OwnedFd::from).collect();
        let mut child = program.spawn().unwrap();
        assert!(child.guard.wait().unwrap().success());
        for (reader, expected) in readers.iter_mut().zip(["a", "b", "c", "d"]) {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn program_that_is_missing_is_an_error() {
        let mut program = Program::new(Command::new("/no/such/program"));
        program.numbered = vec![File::open("/dev/null").unwrap().into()];
        let error = program.spawn().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(exec_failure_code(&error), 127);
        let error = Program::new(Command::new("/etc/passwd"))
            .spawn()
            .unwrap_err();
        assert_eq!(exec_failure_code(&error), 126);
    }

    #[test]
    fn program_whose_parent_is_dead_already_is_not_run() {
        let unused = Pid::from_raw(i32::MAX).unwrap();
        let error = must_have_parent(unused).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn child_ends_as_the_program_did() {
        for (script, code) in [
            ("exit 7", 7),
            ("kill -KILL $$", 137),
            ("kill -SEGV $$", 139),
        ] {
            let mut child = shell(script).spawn().unwrap();
            assert_eq!(exit_code(child.guard.wait().unwrap()), code, "{script}");
        }
    }

    #[test]
    fn signal_reaches_the_program_and_its_status_comes_back() {
        let signals = Arrivals::new(&[libc::SIGUSR2]).unwrap();
        // $PPID is the guard, and its parent minivmm.
        let script = "read -r _ _ _ minivmm _ </proc/$PPID/stat; trap 'exit 9' USR2; kill -USR2 $minivmm; \
                      while :; do sleep 0.1; done";
        let child = shell(script).spawn().unwrap();
        let status = child.wait(signals, &[libc::SIGUSR2]).unwrap();
        assert_eq!(exit_code(status), 9);
    }

    /// The pid that a program writes to the pipe which it has as descriptor 3.
    fn read_pid(mut reader: impl Read) -> i32 {
        let mut digits = Vec::new();
        let mut byte = [0];
        while reader.read(&mut byte).unwrap() == 1 && byte != [b'\n'] {
            digits.extend(byte);
        }
        String::from_utf8(digits).unwrap().parse().unwrap()
    }

    fn is_there(pid: i32) -> bool {
        rustix::process::test_kill_process(Pid::from_raw(pid).unwrap()).is_ok()
    }

    #[test]
    fn what_a_program_has_started_ends_with_it_also_out_of_its_group_and_session() {
        for rest in [Rest::End, Rest::Kill] {
            let (reader, writer) = io::pipe().unwrap();
            let (go, mut goes) = io::pipe().unwrap();
            // Its parent and grandparent have ended before the program does.
            let mut program = shell(
                "setsid sh -c 'sh -c \"echo \\$\\$ >&3; exec sleep 1000\" & exit' & wait; read x <&4; exit 5",
            );
            program.numbered = vec![writer.into(), go.into()];
            program.rest = rest;
            let mut child = program.spawn().unwrap();
            let pid = read_pid(reader);
            goes.write_all(b"\n").unwrap();
            assert_eq!(exit_code(child.guard.wait().unwrap()), 5);
            assert!(!is_there(pid), "{rest:?}");
        }
    }

    #[test]
    fn what_a_program_has_started_goes_on_where_it_may() {
        let (reader, writer) = io::pipe().unwrap();
        let mut program = shell("sh -c 'echo $$ >&3; exec sleep 1000' & exit 5");
        program.numbered.push(writer.into());
        program.rest = Rest::Leave;
        let mut child = program.spawn().unwrap();
        let pid = read_pid(reader);
        assert_eq!(exit_code(child.guard.wait().unwrap()), 5);
        assert!(is_there(pid));
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }

    #[test]
    fn child_that_is_killed_or_dropped_takes_all_along() {
        for kills in [true, false] {
            let (reader, writer) = io::pipe().unwrap();
            let mut program = shell("trap '' TERM; sh -c 'echo $$ >&3; exec sleep 1000'; :");
            program.numbered.push(writer.into());
            let mut child = program.spawn().unwrap();
            let pid = read_pid(reader);
            if kills {
                assert_eq!(exit_code(child.kill().unwrap()), 137);
            }
            drop(child);
            assert!(!is_there(pid));
        }
    }
}
