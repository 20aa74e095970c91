//! The terminal on stdin: raw while the guest runs, and restored on every way out.
//!
//! The ways out: the guest's end (drop), a panic (its hook), and a signal that kills (a handler restores
//! the terminal and lets the signal do its work). SIGTSTP stops with the terminal restored,
//! and SIGCONT takes it again. Only SIGKILL and SIGSTOP leave no time for that.

use std::io;
use std::os::fd::BorrowedFd;
use std::panic;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::stdio::{stderr, stdin, stdout};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};

pub mod console;
pub mod output;
pub mod server;
mod signals;
pub mod transcript;

/// The terminal's settings before it became raw, and since. Signal handlers read them, so they
/// stay: a process has one terminal.
static SETTINGS: OnceLock<Settings> = OnceLock::new();
/// What is written to the terminal is to be raw too.
static OUTPUT_TOO: AtomicBool = AtomicBool::new(false);
/// The terminal is to be raw.
static WANTED: AtomicBool = AtomicBool::new(false);

/// The flags of the standard descriptors, where a child may change them.
static FLAGS: OnceLock<[Option<OFlags>; 3]> = OnceLock::new();

struct Settings {
    cooked: Termios,
    raw: Termios,
}

/// Holds the terminal in raw mode, so that every key reaches the guest.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes stdin's terminal raw, or has it made so once this job is in its foreground. `None` when
    /// stdin is no terminal. From then on every signal that kills, and is neither caught nor ignored
    /// yet, restores it first.
    ///
    /// # Errors
    ///
    /// Fails when the terminal's settings cannot be read or set, or signals cannot be caught.
    pub fn enter() -> io::Result<Option<Self>> {
        Self::enter_also_output(false)
    }

    /// The same for what comes from another terminal, which has made its line ends already. The log's lines do not begin at
    /// the left margin then.
    ///
    /// # Errors
    ///
    /// As for [`Self::enter`].
    pub(crate) fn enter_between() -> io::Result<Option<Self>> {
        Self::enter_also_output(true)
    }

    fn enter_also_output(output_too: bool) -> io::Result<Option<Self>> {
        OUTPUT_TOO.store(output_too, Ordering::SeqCst);
        if !isatty(stdin()) {
            return Ok(None);
        }
        signals::catch_fatal()?;
        signals::catch_stop()?;
        WANTED.store(true, Ordering::SeqCst);
        let entered = Self(());
        take()?;
        Ok(Some(entered))
    }
}

/// Makes the terminal raw, if it is to be and is ours. A job that is brought to the foreground while it runs need get no
/// SIGCONT, which would do it.
pub fn take() -> io::Result<()> {
    if settings()?.is_some() {
        take_again();
    }
    Ok(())
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// The terminal and the flags of the standard descriptors as they were before another program had
/// them: QEMU makes them raw and non-blocking, and restores them only when it ends by itself. Dropping
/// it restores them, and so does a signal that kills.
#[derive(Debug)]
pub struct Saved(());

impl Saved {
    /// Saves them as they are now.
    pub fn save() -> Self {
        FLAGS.get_or_init(|| standard().map(|fd| fcntl_getfl(fd).ok()));
        if let Ok(cooked) = tcgetattr(stdin()) {
            SETTINGS.get_or_init(|| Settings::of(cooked));
            if let Err(error) = signals::catch_fatal() {
                log::debug!("cannot catch the signals that kill: {error}");
            }
        }
        Self(())
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        cook();
    }
}

/// The terminal's settings, as they were at the first call; `None` when stdin is no terminal of ours.
fn settings() -> io::Result<Option<&'static Settings>> {
    if !isatty(stdin()) || !may_read() {
        return Ok(None);
    }
    let cooked = tcgetattr(stdin())?;
    Ok(Some(SETTINGS.get_or_init(|| Settings::of(cooked))))
}

/// stdin, stdout and stderr.
pub(crate) fn standard() -> [BorrowedFd<'static>; 3] {
    [stdin(), stdout(), stderr()]
}

impl Settings {
    fn of(cooked: Termios) -> Self {
        let mut raw = cooked.clone();
        raw.make_raw();
        if !OUTPUT_TOO.load(Ordering::SeqCst) {
            // Output stays as it was: the log's lines have to begin at the left margin.
            raw.output_modes = cooked.output_modes;
        }
        Self { cooked, raw }
    }
}

/// Whether stdin may be read: a terminal stops a job that is not in its foreground for that.
pub fn may_read() -> bool {
    let foreground = || tcgetpgrp(stdin()).is_ok_and(|group| group == rustix::process::getpgrp());
    !isatty(stdin()) || foreground()
}

/// Whether stdin is this process's terminal, which another job has now.
pub fn is_in_background() -> bool {
    let other = || tcgetpgrp(stdin()).is_ok_and(|group| group != rustix::process::getpgrp());
    isatty(stdin()) && other()
}

/// Restores the terminal before a panic's message, which would be hard to read otherwise, also
/// when the panic ends the program.
pub fn restore_on_panic() {
    let default_hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        restore_terminal();
        default_hook(info);
    }));
}

/// Restores the terminal, if it ever became raw.
fn restore_terminal() {
    WANTED.store(false, Ordering::SeqCst);
    cook();
}

// What follows runs in signal handlers too: atomics and single system calls, no lock, no memory.

/// Sets the terminal to what it was. Not by whether it is raw: another thread may be just about to.
fn cook() {
    for (fd, flags) in standard()
        .into_iter()
        .zip(FLAGS.get().into_iter().flatten())
    {
        if let Some(flags) = flags {
            let _ = fcntl_setfl(fd, *flags);
        }
    }
    if let (Some(settings), true) = (SETTINGS.get(), may_read()) {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &settings.cooked);
    }
}

/// Makes the terminal raw again, after another program had it.
fn take_again() {
    let Some(settings) = SETTINGS.get() else {
        return;
    };
    if WANTED.load(Ordering::SeqCst) && may_read() {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &settings.raw);
        // Restored meanwhile, by another thread.
        if !WANTED.load(Ordering::SeqCst) {
            cook();
        }
    }
}
