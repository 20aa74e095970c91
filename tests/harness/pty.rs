//! A pseudo-terminal for a command.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use super::process::Killed;

/// Both sides of a pseudo-terminal.
#[derive(Debug)]
pub struct Pty {
    /// The user's side.
    pub keyboard: File,
    /// The program's side, to look at its settings.
    pub terminal: OwnedFd,
}

impl Pty {
    /// Makes one.
    pub fn new() -> Self {
        // No child may keep the user's side open.
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let keyboard = openpt(flags).expect("a pseudo-terminal");
        grantpt(&keyboard).expect("it is ours");
        unlockpt(&keyboard).expect("it is ours");
        let name = ptsname(&keyboard, Vec::new()).expect("it has a name");
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = rustix::fs::open(name, flags, Mode::empty()).expect("its other side opens");
        Self {
            keyboard: keyboard.into(),
            terminal,
        }
    }

    /// Starts a command with a session of its own on it.
    pub fn start(&self, command: &mut Command) -> Killed {
        let stdio = || Stdio::from(self.terminal.try_clone().expect("a descriptor is free"));
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        // SAFETY: both are plain system calls, which a child may make between fork and exec.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        Killed(command.spawn().expect("minivmm starts"))
    }
}
