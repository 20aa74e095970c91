//! A program that only says something.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::process::{Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::{Program, Rest};

/// The most that is kept of what a program says.
pub const MOST: usize = 1 << 20;

impl Program {
    /// Runs a program that says little, with `input` on its stdin, to its end. It has `limit` for all, also when it has
    /// started others that go on and hold its stdout: they are killed when it has ended.
    ///
    /// # Errors
    ///
    /// When it does not run, or has not ended in time; then it is killed.
    pub fn output(mut self, input: &[u8], limit: Duration) -> io::Result<Output> {
        let deadline = Instant::now() + limit;
        self.rest = Rest::Kill;
        let command = self.command.stdin(Stdio::piped());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.spawn()?;
        if let Some(mut stdin) = child.guard.stdin.take() {
            // It need not read it.
            let _ = stdin.write_all(input);
        }
        let (stdout, stderr) = (child.guard.stdout.take(), child.guard.stderr.take());
        let mut pipes = [stdout.map(OwnedFd::from), stderr.map(OwnedFd::from)].map(Pipe::new);
        while read_some(&mut pipes, deadline)? {}
        // The other ends are closed, or time is over.
        loop {
            if let Some(status) = child.try_wait()? {
                let [stdout, stderr] = pipes.map(|pipe| pipe.bytes);
                return Ok(Output {
                    status,
                    stdout,
                    stderr,
                });
            }
            if Instant::now() >= deadline {
                child.kill()?;
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// What comes out of a pipe.
#[derive(Debug)]
struct Pipe {
    /// `None` at its end.
    end: Option<OwnedFd>,
    bytes: Vec<u8>,
}

impl Pipe {
    fn new(end: Option<OwnedFd>) -> Self {
        Self {
            end,
            bytes: Vec::new(),
        }
    }

    fn read(&mut self) {
        let mut chunk = [0; 4096];
        let count = self
            .end
            .as_ref()
            .map(|end| rustix::io::read(end, &mut chunk));
        match count {
            Some(Ok(count @ 1..)) => {
                let room = MOST.saturating_sub(self.bytes.len());
                self.bytes.extend(&chunk[..count.min(room)]);
            }
            Some(Err(Errno::INTR)) => {}
            _ => self.end = None,
        }
    }
}

/// Reads what comes before the deadline; `false` after it, and when all are at their ends.
fn read_some(pipes: &mut [Pipe], deadline: Instant) -> io::Result<bool> {
    let left = deadline.saturating_duration_since(Instant::now());
    let time = Timespec {
        tv_sec: left.as_secs() as i64,
        tv_nsec: left.subsec_nanos().into(),
    };
    let mut open: Vec<_> = pipes.iter_mut().filter(|pipe| pipe.end.is_some()).collect();
    let ends = open.iter().filter_map(|pipe| pipe.end.as_ref());
    let mut fds: Vec<_> = ends.map(|end| PollFd::new(end, PollFlags::IN)).collect();
    if fds.is_empty() || left.is_zero() {
        return Ok(false);
    }
    match poll(&mut fds, Some(&time)) {
        Ok(_) => {}
        Err(Errno::INTR) => return Ok(true),
        Err(error) => return Err(error.into()),
    }
    let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    for (pipe, _) in open.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
        pipe.read();
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn shell(script: &str) -> Program {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Program::new(command)
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn output_is_what_the_program_says_on_both() {
        let output = shell("cat; echo error >&2; exit 3")
            .output(b"input", LONG)
            .unwrap();
        assert_eq!(output.status.code(), Some(3));
        assert_eq!(
            (&output.stdout[..], &output.stderr[..]),
            (&b"input"[..], &b"error\n"[..])
        );
    }

    #[test]
    fn program_that_takes_too_long_is_killed() {
        for script in [
            "exec sleep 1000",
            "sleep 1000 | cat",
            "exec >&- 2>&-; sleep 1000",
            "yes",
        ] {
            let error = shell(script)
                .output(b"", Duration::from_millis(50))
                .unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{script}");
        }
    }

    #[test]
    fn helper_that_holds_stdout_is_not_waited_for() {
        let start = Instant::now();
        let output = shell("sleep 1000 & echo said").output(b"", LONG).unwrap();
        assert_eq!(output.stdout, b"said\n");
        assert!(start.elapsed() < LONG);
    }
}
