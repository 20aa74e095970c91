//! Another program that minivmm runs and waits for.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::{WaitId, WaitIdOptions, waitid};
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
    let ended = await_end(&child);
    handle.close();
    let _ = forwarder.join();
    ended.and_then(|()| child.wait())
}

/// Waits for the program's end and does not reap it: until that is done its pid is nobody else's, and may be signalled.
fn await_end(child: &Child) -> io::Result<()> {
    let end = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    loop {
        match waitid(WaitId::Pid(rustix::process::Pid::from_child(child)), end) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result.map(drop)?),
        }
    }
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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn program_that_has_ended_keeps_its_pid_until_no_signal_is_passed_on() {
        let mut child = Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
        await_end(&child).unwrap();
        // Signal 0 only asks whether the pid is there.
        kill(pid(&child), None).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(7));
        assert!(kill(pid(&child), None).is_err());
    }

    #[test]
    fn program_ends_with_its_status_and_signals_reach_it() {
        let signals = Signals::new([libc::SIGUSR2]).unwrap();
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "trap 'exit 9' USR2; kill -USR2 $PPID; while :; do sleep 0.1; done",
        ]);
        let status = wait(command.spawn().unwrap(), signals, &[libc::SIGUSR2]).unwrap();
        assert_eq!(exit_code(status), 9);
    }
}
