//! A running minivmm: its console, its log, its end.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::PATIENCE;
use super::process::Killed;

/// The minivmm under test: `$MINIVMM_BIN` (set in the lab), else the one that cargo built for this
/// test.
pub fn binary() -> PathBuf {
    let built = option_env!("CARGO_BIN_EXE_minivmm").map(OsString::from);
    match std::env::var_os("MINIVMM_BIN").or(built) {
        Some(path) => path.into(),
        None => {
            panic!("MINIVMM_BIN does not say where minivmm is; make demo and make bench set it")
        }
    }
}

/// Whether this process runs in the lab.
pub fn in_lab() -> bool {
    std::env::var_os("MINIVMM_IN_LAB").is_some()
}

/// Copies a program that is to be run, by another process: one that this process has had open for
/// writing is busy as long as any child that was forked meanwhile has not called exec (ETXTBSY).
pub fn copy_program(from: impl AsRef<OsStr>, to: impl AsRef<OsStr>) {
    let status = Command::new("cp").arg(from).arg(to).status();
    assert!(status.expect("cp starts").success());
}

/// A minivmm with pipes for its console and its log; killed when dropped.
#[derive(Debug)]
pub struct Vm {
    child: Killed,
    stdin: Option<ChildStdin>,
    console: Stream,
    log: Stream,
    /// Where in the console the next [`Vm::wait_for`] begins to look.
    seen: usize,
    commands: u32,
}

/// How a command in the guest ended.
#[derive(Debug)]
pub struct Output {
    /// The shell's `$?`.
    pub status: i32,
    /// What the command wrote, stdout and stderr together, without carriage returns.
    pub text: String,
}

impl Vm {
    /// Starts minivmm with these arguments in the calling thread's namespaces.
    ///
    /// To start it in a network namespace, call this from a thread that has entered it.
    pub fn start<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Self {
        let mut command = Command::new(binary());
        command.args(args).stdin(Stdio::piped());
        Self::spawn(command)
    }

    /// Starts a prepared command, whose stdin is the caller's choice, with its console and log
    /// captured.
    pub fn spawn(mut command: Command) -> Self {
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = Killed(child.unwrap_or_else(|e| panic!("cannot start {command:?}: {e}")));
        Self {
            stdin: child.stdin.take(),
            console: Stream::new(child.stdout.take().expect("stdout is piped")),
            log: Stream::new(child.stderr.take().expect("stderr is piped")),
            child,
            seen: 0,
            commands: 0,
        }
    }

    /// The process id of minivmm.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything the guest has written on its console, without carriage returns.
    pub fn console(&self) -> String {
        self.console.text()
    }

    /// Everything minivmm has written on stderr.
    pub fn log(&self) -> String {
        self.log.text()
    }

    /// Waits until the console shows `text` after what earlier calls have consumed; returns all up
    /// to its end.
    ///
    /// Panics, with console and log, when it does not come in time or minivmm closes the console
    /// first.
    pub fn wait_for(&mut self, text: &str) -> String {
        match self.console.wait(self.seen, text) {
            Some(found) => {
                self.seen += found.len();
                found
            }
            None if self.has_ended() => panic!(
                "minivmm ended before {text:?} came: {}\n{}",
                self.log().lines().next_back().unwrap_or_default(),
                self.transcript()
            ),
            None => panic!(
                "no {text:?} on the console within {PATIENCE:?}\n{}",
                self.transcript()
            ),
        }
    }

    /// Waits until minivmm's log shows `text` anywhere; panics when it does not come in time.
    pub fn wait_for_log(&self, text: &str) {
        if self.log.wait(0, text).is_none() {
            panic!(
                "no {text:?} in the log within {PATIENCE:?}\n{}",
                self.transcript()
            );
        }
    }

    /// Whether minivmm has closed the console, as it does at its end.
    pub fn has_ended(&self) -> bool {
        self.console.state().ended
    }

    /// Writes to the guest's console.
    pub fn send(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("the console's input is open");
        if let Err(e) = stdin
            .write_all(text.as_bytes())
            .and_then(|()| stdin.flush())
        {
            panic!("cannot write to the console: {e}\n{}", self.transcript());
        }
    }

    /// Closes the input of the console.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Runs a shell command in a guest that shows our init's prompt; panics unless it succeeds.
    pub fn run(&mut self, command: &str) -> String {
        let output = self.try_run(command);
        if output.status != 0 {
            panic!(
                "{command:?} ended with {}\n{}\n{}",
                output.status,
                output.text,
                self.transcript()
            );
        }
        output.text
    }

    /// Runs a shell command in the guest; returns how it ended.
    pub fn try_run(&mut self, command: &str) -> Output {
        let id = self.start_command(command);
        self.finish_command(id)
    }

    /// Starts a shell command in the guest; [`Vm::finish_command`] waits for its end.
    pub fn start_command(&mut self, command: &str) -> u32 {
        self.commands += 1;
        let id = self.commands;
        self.send(&format!("{id} {command}\n"));
        id
    }

    /// Waits for the end of a command.
    pub fn finish_command(&mut self, id: u32) -> Output {
        self.wait_for(&format!("GUEST begin {id}\n"));
        let end = format!("GUEST end {id} ");
        let text = self.wait_for(&end);
        let status = self.wait_for("\n");
        Output {
            status: status
                .trim()
                .parse()
                .unwrap_or_else(|e| panic!("exit status {status:?}: {e}")),
            text: text[..text.len() - end.len()].to_owned(),
        }
    }

    /// Sends a signal to minivmm.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal)
            .unwrap_or_else(|e| panic!("cannot signal minivmm: {e}\n{}", self.transcript()));
    }

    /// Waits for minivmm's end; panics with console and log when it does not come in time.
    pub fn wait_exit(&mut self) -> ExitStatus {
        self.wait_exit_within(PATIENCE)
    }

    /// The same, for an end that is to be quick.
    pub fn wait_exit_within(&mut self, timeout: Duration) -> ExitStatus {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait().expect("minivmm is our child") {
                self.console.finish();
                self.log.finish();
                return status;
            }
            if Instant::now() > deadline {
                panic!(
                    "minivmm still runs after {timeout:?}\n{}",
                    self.transcript()
                );
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Console and log, for a failed test's message.
    pub fn transcript(&self) -> String {
        format!(
            "---- console\n{}\n---- log\n{}\n----",
            self.console().trim_end(),
            self.log().trim_end()
        )
    }
}

/// A pipe, read on a thread of its own so that the writer never blocks.
#[derive(Debug)]
struct Stream {
    shared: Arc<(Mutex<State>, Condvar)>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

impl Stream {
    fn new(mut pipe: impl Read + Send + 'static) -> Self {
        let state = State {
            bytes: Vec::new(),
            ended: false,
        };
        let shared = Arc::new((Mutex::new(state), Condvar::new()));
        let writer = Arc::clone(&shared);
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let count = pipe.read(&mut buffer).unwrap_or(0);
                let mut state = writer.0.lock().expect("no holder panics");
                state
                    .bytes
                    .extend(buffer[..count].iter().filter(|byte| **byte != b'\r'));
                state.ended = count == 0;
                writer.1.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        Self {
            shared,
            reader: Some(reader),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.shared.0.lock().expect("no holder panics")
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.state().bytes).into_owned()
    }

    /// The text from byte `from` to the end of the first `needle`, as soon as there is one.
    fn wait(&self, from: usize, needle: &str) -> Option<String> {
        let find = |state: &State| {
            let rest = state.bytes.get(from..)?;
            let start = rest
                .windows(needle.len())
                .position(|window| window == needle.as_bytes())?;
            Some(rest[..start + needle.len()].to_vec())
        };
        let (state, _) = self
            .shared
            .1
            .wait_timeout_while(self.state(), PATIENCE, |state| {
                !state.ended && find(state).is_none()
            })
            .expect("no holder panics");
        // Replacing invalid bytes would change the length that callers count by.
        find(&state).map(|bytes| {
            bytes
                .iter()
                .map(|&byte| if byte.is_ascii() { byte as char } else { '?' })
                .collect()
        })
    }

    /// Waits for the pipe's end, so that nothing written before is missed.
    fn finish(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader does not panic");
        }
    }
}
