//! The signal state that this process was started with, and the one that it works with.
//!
//! A process inherits which signals are blocked and which are ignored, and keeps both over exec.
//! minivmm blocks none and needs SIGCHLD to wait for other programs. A signal that is ignored at
//! the start stays so: nohup and shells without job control mean it.

use std::ffi::c_int;
use std::io;
use std::ptr;
use std::sync::OnceLock;

use libc::sigaction;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal};

/// The signals that ask a program to end.
pub const ENDING: [c_int; 4] = [libc::SIGTERM, libc::SIGHUP, libc::SIGINT, libc::SIGQUIT];

/// What [`settle`] has found.
static INHERITED: OnceLock<Inherited> = OnceLock::new();

#[derive(Debug)]
struct Inherited {
    blocked: SigSet,
    /// Writing beyond RLIMIT_FSIZE killed.
    is_limit_deadly: bool,
}

/// Unblocks all signals, and has a write beyond RLIMIT_FSIZE fail with EFBIG (as one to a pipe
/// without a reader fails with EPIPE: Rust's runtime ignores SIGPIPE). Once, at the start of
/// `main`, before there are other threads, which inherit the mask.
pub fn settle() -> io::Result<()> {
    // SAFETY: the default action runs no code of this process; no thread waits for children yet.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
    // SAFETY: an ignored signal runs no code of this process.
    let before = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }?;
    let blocked = SigSet::empty().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    let _ = INHERITED.set(Inherited {
        blocked,
        is_limit_deadly: before == SigHandler::SigDfl,
    });
    Ok(())
}

/// Gives a program what this process was started with, between fork and exec (it is
/// async-signal-safe). SIGCHLD stays at its default, which POSIX leaves to whoever calls exec: few
/// programs expect anything else. Exec itself ends the handlers, and the standard library has set
/// SIGPIPE to its default by then.
pub fn restore() -> io::Result<()> {
    let Some(inherited) = INHERITED.get() else {
        return Ok(());
    };
    if inherited.is_limit_deadly {
        // SAFETY: the default action runs no code of this process.
        unsafe { signal(Signal::SIGXFSZ, SigHandler::SigDfl) }?;
    }
    Ok(inherited.blocked.thread_set_mask()?)
}

/// Those of `signals` that may be handled: that are not ignored.
pub fn not_ignored(signals: &[c_int]) -> Vec<c_int> {
    let is_ignored =
        |signal: c_int| action_of(signal).is_ok_and(|action| action.sa_sigaction == libc::SIG_IGN);
    signals
        .iter()
        .copied()
        .filter(|n| !is_ignored(*n))
        .collect()
}

/// What a signal does now.
pub(crate) fn action_of(signal: c_int) -> io::Result<sigaction> {
    let mut action = default_action();
    // SAFETY: no new action is given, and the old one goes into a place that is ours.
    match unsafe { sigaction(signal, ptr::null(), &mut action) } {
        0 => Ok(action),
        _ => Err(io::Error::last_os_error()),
    }
}

/// SIG_DFL without a flag or a mask.
pub(crate) fn default_action() -> sigaction {
    // SAFETY: a sigaction holds numbers, a nullable function and bits, for all of which zeros are
    // valid.
    unsafe { std::mem::zeroed() }
}
