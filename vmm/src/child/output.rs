//! A program that only says something.

use std::io::{self, Read, Write};
use std::process::{Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

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
        let stdout = read_all(child.guard.stdout.take())?;
        let stderr = read_all(child.guard.stderr.take())?;
        let left = || deadline.saturating_duration_since(Instant::now());
        let timed_out = |_| io::Error::from(io::ErrorKind::TimedOut);
        let (stdout, stderr) = (stdout.recv_timeout(left()), stderr.recv_timeout(left()));
        // With both closed it ends, or has to be killed as it is when this returns.
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(Output {
                    status,
                    stdout: stdout.map_err(timed_out)?,
                    stderr: stderr.map_err(timed_out)?,
                });
            }
            if left().is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Reads a pipe to its end, on a thread of its own, and keeps [`MOST`] bytes.
fn read_all(pipe: Option<impl Read + Send + 'static>) -> io::Result<Receiver<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel();
    let read = move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.by_ref().take(MOST as u64).read_to_end(&mut bytes);
            let _ = io::copy(&mut pipe, &mut io::sink());
        }
        let _ = sender.send(bytes);
    };
    thread::Builder::new().spawn(read)?;
    Ok(receiver)
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
