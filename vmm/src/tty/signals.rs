//! What signals do while the terminal is raw.
//!
//! The handlers run on whatever thread the kernel picks, with all signals blocked: so SIGTTOU
//! cannot stop them in the middle, and none comes inside another on one thread.

use std::io;
use std::ptr;
use std::sync::OnceLock;

use libc::{c_int, c_void, sigaction, siginfo_t};

use crate::signals::{ENDING, action_of, default_action};

/// The signals that kill where they are neither caught nor ignored (signal(7)), besides those that
/// ask for an end.
const FATAL: [c_int; 16] = [
    libc::SIGABRT,
    libc::SIGALRM,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGIO,
    libc::SIGPROF,
    libc::SIGPWR,
    libc::SIGSEGV,
    libc::SIGSTKFLT,
    libc::SIGSYS,
    libc::SIGTRAP,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGVTALRM,
    libc::SIGXCPU,
];

/// The signals that Rust's runtime catches to report a stack overflow.
const FAULTS: [c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// What happened to [`FAULTS`] before.
static BEFORE: OnceLock<[sigaction; 2]> = OnceLock::new();

type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);

/// Restores the terminal at each signal that kills.
pub(super) fn catch_fatal() -> io::Result<()> {
    if BEFORE.get().is_none() {
        let before = [action_of(FAULTS[0])?, action_of(FAULTS[1])?];
        let _ = BEFORE.set(before);
    }
    // The first of these kicks vCPUs.
    let real_time = libc::SIGRTMIN() + 1..=libc::SIGRTMAX();
    for signal in FATAL.into_iter().chain(ENDING).chain(real_time) {
        handle(signal, die)?;
    }
    Ok(())
}

/// Restores the terminal while the process is stopped.
pub(super) fn catch_stop() -> io::Result<()> {
    handle(libc::SIGTSTP, stop)?;
    handle(libc::SIGCONT, go_on)
}

/// Restores the terminal, then lets the signal do what it would have done.
extern "C" fn die(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    super::restore_terminal();
    // SAFETY: handlers with SA_SIGINFO get one, which is theirs until they return.
    let by_the_processor = unsafe { (*info).si_code } > 0;
    let fault = FAULTS.iter().position(|fault| *fault == signal);
    let before = fault
        .filter(|_| by_the_processor)
        .and_then(|n| Some(BEFORE.get()?[n]));
    let _ = set_action(signal, &before.unwrap_or_else(default_action));
    if before.is_none() {
        // It waits until this handler returns. A fault needs none: it happens again.
        raise(signal);
    }
}

/// Stops the process as SIGTSTP does, with the terminal restored meanwhile.
extern "C" fn stop(signal: c_int, _info: *mut siginfo_t, _context: *mut c_void) {
    super::cook();
    let _ = set_action(signal, &default_action());
    raise(signal);
    unblock(signal);
    // Continued; or not stopped at all, which the kernel does not do where no shell would notice.
    let _ = set_action(signal, &action_to(stop));
    super::take_again();
}

/// Takes the terminal again, if it is ours.
extern "C" fn go_on(_signal: c_int, _info: *mut siginfo_t, _context: *mut c_void) {
    super::take_again();
}

/// Has `signal` handled, unless it is ignored, as whoever started us wanted it, or caught: the event
/// loop has those that ask for an end, and a program that uses the library may have others.
fn handle(signal: c_int, handler: Handler) -> io::Result<()> {
    match action_of(signal)?.sa_sigaction {
        libc::SIG_DFL => set_action(signal, &action_to(handler)),
        libc::SIG_IGN => Ok(()),
        _ if FAULTS.contains(&signal) => set_action(signal, &action_to(handler)),
        _ => Ok(()),
    }
}

fn action_to(handler: Handler) -> sigaction {
    let mut action = default_action();
    action.sa_sigaction = handler as *const () as usize;
    // On the stack that Rust's runtime keeps for one that overflowed.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: it fills a signal set that is ours.
    unsafe { libc::sigfillset(&mut action.sa_mask) };
    action
}

fn set_action(signal: c_int, action: &sigaction) -> io::Result<()> {
    // SAFETY: the action is the default, the runtime's own, or one of the handlers here, which call
    // nothing that a handler must not.
    match unsafe { sigaction(signal, action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends a signal to the calling thread.
fn raise(signal: c_int) {
    // SAFETY: plain numbers.
    unsafe { libc::raise(signal) };
}

/// Lets a signal through to the calling thread.
fn unblock(signal: c_int) {
    let mut set = default_action().sa_mask;
    // SAFETY: a signal set that is ours.
    unsafe { libc::sigaddset(&mut set, signal) };
    // SAFETY: as above; the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, ptr::null_mut()) };
}
