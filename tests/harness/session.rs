//! minivmm with a guest of a few instructions, on a pseudo-terminal of its own.

#![allow(dead_code)] // Each test binary uses its own part of this module.
#![allow(clippy::unwrap_used)] // A helper that panics fails the test, as it should.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{LocalModes, tcgetattr};
use tempfile::TempDir;

use super::harness::process::Killed;
use super::harness::pty::Pty;
use super::harness::vm::binary;
use super::harness::{AT_ONCE, PATIENCE};
use super::tiny::Tiny;

/// minivmm with a guest of ours. The file lives as long as the directory.
pub fn minivmm(guest: Tiny) -> (Command, TempDir) {
    let directory = TempDir::new().unwrap();
    let kernel = directory.path().join("guest");
    guest.write(&kernel);
    let mut command = Command::new(binary());
    command.arg("--kernel").arg(kernel).env_remove("RUST_LOG");
    (command, directory)
}

/// The same by a shell, where `line` stands for how the shell starts `"$@"`.
pub fn by_shell(line: &str, guest: Tiny) -> (Command, TempDir) {
    let (command, directory) = minivmm(guest);
    let mut shell = Command::new("sh");
    shell.args(["-c", line, "sh"]).arg(command.get_program());
    shell.args(command.get_args()).env_remove("RUST_LOG");
    (shell, directory)
}

/// A pseudo-terminal with a session of its own on it.
pub struct Session {
    /// The user's side; `None` once hung up.
    pub keyboard: Option<File>,
    /// The program's side, to look at its settings.
    pub terminal: OwnedFd,
    pub before: String,
    pub child: Killed,
    pub shown: Vec<u8>,
    /// Where in `shown` the next [`Session::wait_for`] begins.
    pub seen: usize,
    _directory: TempDir,
}

impl Session {
    /// A guest that echoes, as soon as it does.
    pub fn with_echo() -> Self {
        let mut session = Self::start(minivmm(Tiny::Echo));
        session.wait_for("ready");
        session
    }

    pub fn start((mut command, directory): (Command, TempDir)) -> Self {
        let pty = Pty::new();
        Self {
            before: settings(&pty.terminal),
            child: pty.start(&mut command),
            keyboard: Some(pty.keyboard),
            terminal: pty.terminal,
            shown: Vec::new(),
            seen: 0,
            _directory: directory,
        }
    }

    pub fn type_keys(&mut self, keys: &str) {
        let keyboard = self.keyboard.as_mut().expect("not hung up");
        keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Reads what the terminal shows within a tenth of a second.
    pub fn look(&mut self) {
        let Some(keyboard) = &mut self.keyboard else {
            return;
        };
        let patience = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        let ready = poll(&mut [PollFd::new(keyboard, PollFlags::IN)], Some(&patience));
        if ready == Ok(1) {
            let mut buffer = [0; 4096];
            let length = keyboard.read(&mut buffer).unwrap_or(0);
            self.shown.extend(&buffer[..length]);
        }
    }

    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown).into_owned()
    }

    /// Waits until the terminal shows `text`, after what earlier calls have found.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let rest = &self.shown[self.seen..];
            let found = rest.windows(text.len()).position(|w| w == text.as_bytes());
            if let Some(at) = found {
                self.seen += at + text.len();
                return;
            }
            let shown = self.shown();
            assert!(Instant::now() < deadline, "no {text:?}, but {shown:?}");
            self.look();
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The first presses the power button, of which these guests know nothing, the second ends.
    pub fn signal_twice(&mut self, signal: Signal) {
        self.signal(signal);
        self.wait_for("power button");
        self.signal(signal);
    }

    /// Waits for the end and returns the exit status.
    #[track_caller]
    pub fn wait_exit(&mut self) -> Option<i32> {
        self.wait_exit_within(PATIENCE)
    }

    /// The same, for an end that is to be quick.
    #[track_caller]
    pub fn wait_exit_within(&mut self, limit: Duration) -> Option<i32> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.look();
                return status.code();
            }
            let shown = self.shown();
            assert!(
                Instant::now() < deadline,
                "still there after {limit:?}: {shown:?}"
            );
            self.look();
        }
    }

    #[track_caller]
    pub fn assert_raw(&self) {
        let modes = tcgetattr(&self.terminal).unwrap().local_modes;
        let line_mode = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        assert!(!modes.intersects(line_mode), "not raw: {modes:?}");
    }

    /// Waits for the end with this status, and for the terminal as it was.
    #[track_caller]
    pub fn assert_ends(&mut self, status: i32) {
        let ended = self.wait_exit_within(AT_ONCE);
        assert_eq!(ended, Some(status), "{:?}", self.shown());
        assert_eq!(settings(&self.terminal), self.before, "the terminal");
    }
}

/// Everything that a terminal can be set to.
pub fn settings(terminal: &OwnedFd) -> String {
    format!("{:?}", tcgetattr(terminal).unwrap())
}
