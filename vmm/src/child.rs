//! Another program that minivmm runs and waits for.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::iterator::Signals;

/// Waits for the program, and passes on those of `signals` that are in `forwarded`. Take `signals` before the program
/// is started, so that none is missed.
///
/// # Errors
///
/// When no thread can be started, or the program cannot be waited for.
pub fn wait(mut child: Child, mut signals: Signals, forwarded: &[i32]) -> io::Result<ExitStatus> {
    let (handle, forwarded) = (signals.handle(), forwarded.to_vec());
    let program = pid(&child);
    let forward = move || {
        for signal in signals.forever() {
            if let (true, Ok(signal)) = (forwarded.contains(&signal), Signal::try_from(signal)) {
                let _ = kill(program, signal);
            }
        }
    };
    let forwarder = thread::Builder::new()
        .name("signals".into())
        .spawn(forward)?;
    let status = child.wait();
    handle.close();
    let _ = forwarder.join();
    status
}

/// The program's process id.
pub fn pid(child: &Child) -> Pid {
    // The kernel's pids are positive ints.
    Pid::from_raw(child.id() as i32)
}

/// The exit status as a shell tells it: 128+N when signal N killed the program.
pub fn exit_code(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128 + signal as u8,
        (None, None) => 1,
    }
}
