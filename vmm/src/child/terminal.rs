//! The terminal of a program that runs as another user: root's stays root's.
//!
//! A process that has a terminal open can read what is typed there, and can itself type by TIOCSTI if it is its
//! controlling one: commands into root's shell. So a program whose user does not own the terminal gets one of its own (as by su -P, and
//! sudo's use_pty), and minivmm passes on what is typed and shown. One that has none of it on its standard descriptors
//! only loses it as its controlling terminal.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::unistd::geteuid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{getpid, getsid, setpgid, setsid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::termios::{
    OptionalActions, OutputModes, isatty, tcgetattr, tcgetsid, tcgetwinsize, tcsetattr, tcsetpgrp,
    tcsetwinsize,
};

use super::user::User;
use crate::tty::{RawTerminal, may_read, standard};

/// While the terminal is another job's, how often it is looked whether it is ours again: no signal says so.
const LOOK_AGAIN: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 300_000_000,
};
/// How long the last output may wait for the terminal.
const LAST_OUTPUT: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};
const CHUNK: usize = 4096;

/// What becomes of the terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Terminal {
    /// The program has it, if there is one.
    Keep,
    /// It is no longer the controlling one.
    Leave,
    /// It is replaced on these of the standard descriptors.
    Replace([bool; 3]),
}

impl Terminal {
    /// For a program of this user.
    pub fn of(user: Option<&User>) -> Self {
        let Some(user) = user.filter(|user| user.id() != geteuid().as_raw()) else {
            return Self::Keep;
        };
        let is_owned = |fd| rustix::fs::fstat(fd).is_ok_and(|status| status.st_uid == user.id());
        let foreign = standard().map(|fd| isatty(fd) && !is_owned(fd));
        if foreign.contains(&true) {
            return Self::Replace(foreign);
        }
        // This call answers for the controlling terminal alone.
        let has_own = standard().into_iter().any(|fd| tcgetsid(fd).is_ok());
        if has_own || controlling().is_err() {
            Self::Keep
        } else {
            Self::Leave
        }
    }

    /// Whether this process cannot do it to itself: the leader of a session can't leave its terminal alone.
    pub fn takes_a_child(self) -> bool {
        match self {
            Self::Keep => false,
            Self::Leave => getsid(None).is_ok_and(|session| session == getpid()),
            Self::Replace(_) => true,
        }
    }
}

fn controlling() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(c"/dev/tty", flags, Mode::empty())?)
}

/// Gives up the controlling terminal, if there is one. May run after a fork.
pub(super) fn leave() {
    if let Ok(terminal) = controlling() {
        // SAFETY: it takes no argument.
        unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCNOTTY) };
    }
}

/// A new terminal's side of the program, and where it is put.
#[derive(Debug)]
pub(super) struct NewTerminal {
    terminal: OwnedFd,
    replaced: [bool; 3],
}

impl NewTerminal {
    /// Makes this process, which is to be the parent of the program's, the leader of a session on it. Runs after a fork.
    pub fn open_session(&self) -> io::Result<()> {
        setsid()?;
        Ok(rustix::process::ioctl_tiocsctty(&self.terminal)?)
    }

    /// Makes this process the terminal's foreground job, and the terminal its own. Runs between fork and exec, with
    /// SIGTTOU blocked.
    pub fn take(&self) -> io::Result<()> {
        setpgid(None, None)?;
        tcsetpgrp(&self.terminal, getpid())?;
        let [stdin, stdout, stderr] = self.replaced;
        if stdin {
            dup2_stdin(&self.terminal)?;
        }
        if stdout {
            dup2_stdout(&self.terminal)?;
        }
        if stderr {
            dup2_stderr(&self.terminal)?;
        }
        Ok(())
    }
}

/// Passes on what is typed at minivmm's terminal, and what the program shows on its own.
#[derive(Debug)]
pub(super) struct Relay {
    /// minivmm's side of the program's terminal.
    program: OwnedFd,
    /// Keeps reading from being an error when no process has the program's side open.
    _terminal: OwnedFd,
    /// minivmm's terminal, if it is its stdin.
    keyboard: Option<OwnedFd>,
    /// minivmm's terminal.
    screen: OwnedFd,
    raw: Option<RawTerminal>,
    typed: Vec<u8>,
    shown: Vec<u8>,
}

/// Makes a terminal for a program of this user, like the one on those of the standard descriptors that are `replaced`.
pub(super) fn make(replaced: [bool; 3], user: &User) -> io::Result<(NewTerminal, Relay)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let program = openpt(flags)?;
    unlockpt(&program)?;
    let terminal = ioctl_tiocgptpeer(&program, flags)?;
    rustix::fs::fchown(&terminal, Some(rustix::fs::Uid::from_raw(user.id())), None)?;
    rustix::io::ioctl_fionbio(&program, true)?;
    let is_replaced = |number: &usize| replaced[*number];
    // Output goes where output was.
    let screen = [1, 2, 0].into_iter().find(is_replaced).unwrap_or_default();
    let screen = reopen(screen)?;
    if let Ok(settings) = tcgetattr(&screen) {
        tcsetattr(&terminal, OptionalActions::Now, &settings)?;
    }
    let relay = Relay {
        program,
        _terminal: terminal.try_clone()?,
        keyboard: replaced[0].then(|| reopen(0)).transpose()?,
        screen,
        raw: None,
        typed: Vec::new(),
        shown: Vec::new(),
    };
    relay.copy_size();
    Ok((NewTerminal { terminal, replaced }, relay))
}

/// Opens a terminal once more, non-blocking: with the descriptor as it is, others' would not block any more either.
fn reopen(number: usize) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{number}");
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

impl Relay {
    /// Goes on after this process had stopped.
    pub fn go_on(&self) {
        self.copy_size();
        if self.raw.is_some() && may_read() {
            self.pass_output_as_it_is();
        }
    }

    /// The program's terminal makes line ends of what it shows; a second time would be once too often.
    fn pass_output_as_it_is(&self) {
        if let Ok(mut settings) = tcgetattr(&self.screen) {
            settings.output_modes -= OutputModes::OPOST;
            let _ = tcsetattr(&self.screen, OptionalActions::Now, &settings);
        }
    }

    /// Has the program's terminal follow the size of minivmm's.
    pub fn copy_size(&self) {
        if let Ok(size) = tcgetwinsize(&self.screen) {
            let _ = tcsetwinsize(&self.program, size);
        }
    }

    /// Waits until there is something to pass on, and does it, or until `news` can be read.
    pub fn pass_on(&mut self, news: BorrowedFd<'_>) -> io::Result<()> {
        let is_ours = may_read();
        if !is_ours {
            self.raw = None;
        } else if self.raw.is_none() && self.keyboard.is_some() {
            // A terminal that has just been hung up has no settings.
            self.raw = RawTerminal::enter().unwrap_or(None);
            self.pass_output_as_it_is();
        }
        let reads_keys = is_ours && self.typed.is_empty();
        let keyboard = self.keyboard.as_ref().filter(|_| reads_keys);
        let when = |wanted: bool, flags| if wanted { flags } else { PollFlags::empty() };
        let mut fds = vec![
            PollFd::new(&news, PollFlags::IN),
            PollFd::new(
                &self.program,
                when(self.shown.is_empty(), PollFlags::IN)
                    | when(!self.typed.is_empty(), PollFlags::OUT),
            ),
        ];
        fds.extend(keyboard.map(|keyboard| PollFd::new(keyboard, PollFlags::IN)));
        if !self.shown.is_empty() {
            fds.push(PollFd::new(&self.screen, PollFlags::OUT));
        }
        let again = (!is_ours).then_some(&LOOK_AGAIN);
        match poll(&mut fds, again) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(keyboard) = keyboard
            && !read_some(keyboard.as_fd(), &mut self.typed)
        {
            // Hung up.
            self.keyboard = None;
        }
        write_some(self.program.as_fd(), &mut self.typed);
        self.show();
        Ok(())
    }

    /// Passes on what the program has shown; returns whether there was anything.
    fn show(&mut self) -> bool {
        if self.shown.is_empty() {
            read_some(self.program.as_fd(), &mut self.shown);
        }
        let any = !self.shown.is_empty();
        write_some(self.screen.as_fd(), &mut self.shown);
        any
    }

    /// Passes on the last of what the program has shown, and restores minivmm's terminal.
    pub fn finish(&mut self) {
        while self.show() {
            let mut screen = [PollFd::new(&self.screen, PollFlags::OUT)];
            if !self.shown.is_empty() && poll(&mut screen, Some(&LAST_OUTPUT)) != Ok(1) {
                break;
            }
        }
        self.raw = None;
    }
}

/// Reads what there is, without waiting; `false` at the end.
fn read_some(from: BorrowedFd<'_>, to: &mut Vec<u8>) -> bool {
    let mut chunk = [0; CHUNK];
    match rustix::io::read(from, &mut chunk) {
        Ok(0) => false,
        Ok(count) => {
            to.extend(&chunk[..count]);
            true
        }
        Err(error) => matches!(error, Errno::AGAIN | Errno::INTR),
    }
}

/// Writes what can be written without waiting. What a terminal that is gone would show is forgotten.
fn write_some(to: BorrowedFd<'_>, from: &mut Vec<u8>) {
    if from.is_empty() {
        return;
    }
    match rustix::io::write(to, from) {
        Ok(count) => drop(from.drain(..count)),
        Err(Errno::AGAIN | Errno::INTR) => {}
        Err(_) => from.clear(),
    }
}
