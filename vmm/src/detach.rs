//! A VM that outlives the command that starts it (`-d`).
//!
//! `main` forks before there is another thread. The command that was typed waits for a line of the VM's process, which
//! comes when the guest runs, and for its end, if that comes first. Until then the VM's process logs to the command's
//! stderr; then it gives that up, and the directory where it was started.

use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, PipeReader, PipeWriter, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, WaitOptions, chdir, setsid, waitpid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::child::close_but;
use crate::config::VmName;
use crate::log_writer;

/// Which process this is, after the fork.
#[derive(Debug)]
pub enum Side {
    /// The command that was typed.
    Command(Starting),
    /// The VM's.
    Vm,
}

/// How far this process is.
#[derive(Debug)]
enum State {
    /// It was not forked.
    Attached,
    /// The command waits for it.
    Starting(PipeWriter),
    /// It is on its own.
    Detached,
}

static STATE: Mutex<State> = Mutex::new(State::Attached);

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Forks. The VM's process has a session of its own, and no descriptor but those to `keep` and stderr.
///
/// # Errors
///
/// In either process, when the host refuses something.
///
/// # Safety
///
/// This process has one thread, and nothing in it owns a descriptor.
pub unsafe fn fork(keep: &[RawFd]) -> io::Result<Side> {
    let (reader, low) = io::pipe()?;
    // No number that the command line names may lead to the pipe.
    let above = keep.iter().copied().fold(2, RawFd::max).saturating_add(1);
    let writer = rustix::io::fcntl_dupfd_cloexec(&low, above)?;
    drop(low);
    // SAFETY: with one thread no lock is held by another, and the child may do what this process may.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(reader);
            // SAFETY: as for this function; the pipe is kept.
            unsafe { enter(keep, writer) }?;
            Ok(Side::Vm)
        }
        pid => Ok(Side::Command(Starting {
            pipe: reader,
            pid: Pid::from_raw(pid),
        })),
    }
}

/// # Safety
///
/// Nothing in this process owns a descriptor but `writer`.
unsafe fn enter(keep: &[RawFd], writer: OwnedFd) -> io::Result<()> {
    let keep = [keep, &[writer.as_raw_fd()]].concat();
    // SAFETY: as for this function.
    unsafe { close_but(&keep) }?;
    *state() = State::Starting(writer.into());
    setsid()?;
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    Ok(())
}

/// Whether this process is a VM's that was forked.
pub fn is_wanted() -> bool {
    !matches!(*state(), State::Attached)
}

/// Whether the command that has started it has ended with success.
pub fn is_done() -> bool {
    matches!(*state(), State::Detached)
}

/// The guest runs. What this process has of the command that has started it, which may end, is given up.
///
/// # Errors
///
/// When that command was killed: its user wants no VM.
pub fn started(name: Option<&VmName>) -> io::Result<()> {
    let mut state = state();
    let State::Starting(pipe) = &mut *state else {
        return Ok(());
    };
    log_writer::leave_stderr()?;
    chdir("/")?;
    let name = name.map_or("", VmName::as_str);
    pipe.write_all(format!("{name}\n").as_bytes())?;
    *state = State::Detached;
    Ok(())
}

/// Makes stderr a file that swallows all.
pub fn silence_stderr() -> io::Result<()> {
    Ok(dup2_stderr(
        OpenOptions::new().write(true).open("/dev/null")?,
    )?)
}

/// The command that waits for the VM's process.
#[derive(Debug)]
pub struct Starting {
    pipe: PipeReader,
    /// Never None.
    pid: Option<Pid>,
}

impl Starting {
    /// Waits until the guest runs and writes its name on stdout; or until the process has ended, which has said why.
    pub fn finish(self) -> ExitCode {
        let mut line = String::new();
        match BufReader::new(self.pipe).read_line(&mut line) {
            Ok(length) if length > 0 => {
                // Whoever wants no name has closed it.
                let _ = io::stdout().write_all(line.as_bytes());
                ExitCode::SUCCESS
            }
            _ => ExitCode::from(end_of(self.pid)),
        }
    }
}

/// The exit status of a process that has ended before its guest ran.
fn end_of(pid: Option<Pid>) -> u8 {
    let status = loop {
        match waitpid(pid, WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(Some((_, status))) => break status,
            Ok(None) | Err(_) => return 1,
        }
    };
    let (code, signal) = (status.exit_status(), status.terminating_signal());
    if let Some(signal) = signal {
        eprintln!(
            "minivmm: error: the VM's process was killed by signal {signal} while it started"
        );
    }
    match (code, signal) {
        // It has ended before it said that it runs.
        (Some(0), _) | (None, None) => 1,
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128 + signal as u8,
    }
}
