//! The log, and its way to stderr, which never holds up the thread that logs.
//!
//! Who reads stderr may sleep, and a full pipe or a stopped terminal would then keep the control thread in a log line,
//! where it can no longer end the guest. So lines wait, up to a bound, for a thread that writes them; those that find no
//! room are counted, and the log says how many there were.

use std::io::{self, IsTerminal, Write};
use std::mem;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use env_logger::{Env, Target, WriteStyle};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use rustix::event::PollFlags;
use rustix::stdio::stderr;

use crate::detach;
use crate::printable::printable;
use crate::tty::{console, output};

mod kept;

use kept::Kept;
pub use kept::older;

/// How many bytes may wait.
const ROOM: usize = 1 << 20;
/// How much is written at once: a reader is not asleep as long as it takes so much.
const PIECE: usize = 4096;
/// How long the end of the program waits for a reader that takes nothing.
const PATIENCE: Duration = Duration::from_secs(1);
/// Enough for a loop around write(2).
const STACK: usize = 64 << 10;

/// The lines on their way to stderr.
static LINES: Lines = Lines::new();

/// Where the lines are kept besides.
static KEPT: Mutex<Option<Kept>> = Mutex::new(None);

/// Logs to stderr from now on: `verbosity` counts -v, and -q backwards. To be held until the end of `main`.
///
/// On a terminal that also shows the guest's console, the log begins on a line of its own.
pub fn start(verbosity: i16) -> Flush {
    let level = match verbosity {
        ..=-3 => "off",
        -2 => "error",
        -1 => "warn",
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    start_thread();
    // virtio-queue logs what a guest can cause at will, and rtnetlink its messages.
    let default = format!("{level},virtio_queue=off,netlink_proto=off,netlink_packet_route=off");
    env_logger::Builder::from_env(Env::default().default_filter_or(default))
        .target(Target::Pipe(Box::new(ToLines)))
        .write_style(write_style())
        .format(|line, record| {
            let style = line.default_level_style(record.level());
            let level = record.level().as_str().to_lowercase();
            let text = record.args().to_string();
            let text = printable(&text);
            writeln!(line, "minivmm: {style}{level}{style:#}: {text}")
        })
        .init();
    Flush(())
}

/// Colours where env_logger would have them for stderr itself.
fn write_style() -> WriteStyle {
    let is_set = |name, value: &str| std::env::var_os(name).is_some_and(|found| found == value);
    let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if is_set("RUST_LOG_STYLE", "always") {
        WriteStyle::Always
    } else if is_set("RUST_LOG_STYLE", "never") || no_colour || is_set("TERM", "dumb") {
        WriteStyle::Never
    } else if io::stderr().is_terminal() {
        WriteStyle::Always
    } else {
        WriteStyle::Never
    }
}

/// Where no thread can be had, lines are written by those that log.
fn start_thread() {
    // Signals are for threads that know when they have to wait. A terminal may stop a job in the background that
    // writes, though (`stty tostop`).
    let mut held = SigSet::all();
    held.remove(Signal::SIGTTOU);
    let before = held.thread_swap_mask(SigmaskHow::SIG_SETMASK);
    let share_terminal = io::stdout().is_terminal() && io::stderr().is_terminal();
    let builder = thread::Builder::new().name("log".into()).stack_size(STACK);
    let started = builder.spawn(move || {
        LINES.write_to(
            Stderr,
            || share_terminal && output::take_mid_line(),
            keep_lines,
        );
    });
    LINES.lock().has_writer = started.is_ok();
    if let Ok(before) = before {
        let _ = before.thread_set_mask();
    }
}

/// Keeps further lines in this file too.
///
/// # Errors
///
/// When it cannot be made.
pub fn keep(path: &Path) -> io::Result<()> {
    *kept() = Some(Kept::new(path)?);
    Ok(())
}

/// Keeps them there alone, once those that wait have been written.
///
/// # Errors
///
/// When stderr cannot be replaced.
pub fn leave_stderr() -> io::Result<()> {
    flush();
    match &mut *kept() {
        Some(kept) => kept.replace_stderr(),
        None => detach::silence_stderr(),
    }
}

fn kept() -> MutexGuard<'static, Option<Kept>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns whether the lines are to go nowhere else.
fn keep_lines(lines: &[u8]) -> bool {
    kept().as_mut().is_some_and(|kept| kept.write(lines))
}

/// Writes what is no log line, but has to come between them: in one piece, to stderr.
pub fn write(text: &str) {
    LINES.push(text.as_bytes());
}

/// Waits until all has been written, as long as there is a reader: before this process becomes another program.
pub fn flush() {
    LINES.flush();
}

/// Dropping it waits until the log has been written.
#[derive(Debug)]
pub struct Flush(());

impl Drop for Flush {
    fn drop(&mut self) {
        flush();
    }
}

/// What env_logger writes to, a line at once.
struct ToLines;

impl Write for ToLines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        LINES.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// stderr without the lock of the standard library's, which a panic needs.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::retry_on_intr(|| {
            rustix::io::write(stderr(), bytes)
        })?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lines between those who log and the thread that writes.
struct Lines {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    waiting: Vec<u8>,
    /// Lines that found no room since the last batch.
    lost: u64,
    has_writer: bool,
    /// The thread has a batch in hand.
    is_writing: bool,
    /// How many pieces have been written.
    written: u64,
}

impl State {
    fn is_done(&self) -> bool {
        self.waiting.is_empty() && !self.is_writing
    }
}

impl Lines {
    const fn new() -> Self {
        Self {
            state: Mutex::new(State {
                waiting: Vec::new(),
                lost: 0,
                has_writer: false,
                is_writing: false,
                written: 0,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut state = self.lock();
        if !state.has_writer {
            drop(state);
            if !keep_lines(line) {
                let _ = write_pieces(&mut Stderr, line, || ());
            }
        } else if state.waiting.len() + line.len() > ROOM {
            state.lost += 1;
        } else {
            state.waiting.extend(line);
            self.changed.notify_all();
        }
    }

    /// Writes all lines, for ever, but those that `keep` takes alone. `is_mid_line` says whether they need a line break
    /// before them.
    fn write_to(
        &self,
        mut out: impl Write,
        is_mid_line: impl Fn() -> bool,
        keep: impl Fn(&[u8]) -> bool,
    ) {
        let mut batch = Vec::new();
        loop {
            self.take(&mut batch);
            let is_done = keep(&batch);
            if is_mid_line() {
                batch.insert(0, b'\n');
            }
            let progress = || {
                self.lock().written += 1;
                self.changed.notify_all();
            };
            // A stderr that is closed, or full for good, has no log.
            if !is_done {
                let _ = write_pieces(&mut out, &batch, progress);
            }
            batch.clear();
            self.lock().is_writing = false;
            self.changed.notify_all();
        }
    }

    /// Waits for lines, and moves them into an empty `batch`.
    fn take(&self, batch: &mut Vec<u8>) {
        let is_empty = |state: &mut State| state.waiting.is_empty();
        let mut state = self
            .changed
            .wait_while(self.lock(), is_empty)
            .unwrap_or_else(PoisonError::into_inner);
        mem::swap(&mut state.waiting, batch);
        state.is_writing = true;
        let lost = mem::take(&mut state.lost);
        drop(state);
        if lost > 0 {
            let text = "lines of the log are lost here, since stderr was not read";
            batch.extend(format!("minivmm: warn: {lost} {text}\n").bytes());
        }
    }

    fn flush(&self) {
        let mut state = self.lock();
        while !state.is_done() {
            let before = state.written;
            let same = |state: &mut State| !state.is_done() && state.written == before;
            let waited = self.changed.wait_timeout_while(state, PATIENCE, same);
            let (next, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() {
                return;
            }
            state = next;
        }
    }
}

/// Writes all of `bytes`, and calls `progress` after each piece.
fn write_pieces(out: &mut impl Write, mut bytes: &[u8], progress: impl Fn()) -> io::Result<()> {
    while !bytes.is_empty() {
        match out.write(&bytes[..bytes.len().min(PIECE)]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                bytes = &bytes[written..];
                progress();
            }
            // Another process has made the pipe or terminal that we share non-blocking.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                console::wait(stderr(), PollFlags::OUT);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Instant;

    use super::*;

    /// Lines that a thread writes to a pipe.
    fn lines() -> (&'static Lines, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let lines: &'static Lines = Box::leak(Box::new(Lines::new()));
        lines.lock().has_writer = true;
        thread::spawn(|| lines.write_to(writer, || false, |_| false));
        (lines, reader)
    }

    #[test]
    fn log_without_a_reader_blocks_no_thread_and_counts_what_is_lost() {
        let (lines, mut reader) = lines();
        let line = [b"x".repeat(1023), b"\n".to_vec()].concat();
        // What fits into the pipe and what waits, twice.
        let pushed = 2 * (ROOM + (64 << 10)) / line.len();
        for _ in 0..pushed {
            lines.push(&line);
        }
        let start = Instant::now();
        lines.flush();
        assert!(start.elapsed() >= PATIENCE);

        let reader = thread::spawn(move || {
            let (mut text, mut buffer) = (Vec::new(), [0; PIECE]);
            while !text.ends_with(b"last\n") {
                let length = reader.read(&mut buffer).unwrap();
                text.extend(&buffer[..length]);
            }
            String::from_utf8(text).unwrap()
        });
        lines.flush();
        lines.push(b"last\n");
        let text = reader.join().unwrap();
        let whole = text.lines().filter(|line| line.len() == 1023).count();
        let lost: Vec<_> = text.lines().filter(|line| line.len() != 1023).collect();
        let warning = format!(
            "minivmm: warn: {} lines of the log are lost",
            pushed - whole
        );
        assert!(whole < pushed && lost[0].starts_with(&warning), "{lost:?}");
        assert_eq!(lost[1..], ["last"]);
    }

    #[test]
    fn log_is_written_whole_before_the_end() {
        let (lines, mut reader) = lines();
        let line = b"x\n".repeat(100_000);
        lines.push(&line);
        let slow = thread::spawn(move || {
            let (mut text, mut buffer) = (0, [0; 8 << 10]);
            while text < 150_000 {
                text += reader.read(&mut buffer).unwrap();
            }
            (text, reader)
        });
        lines.flush();
        let (mut text, mut reader) = slow.join().unwrap();
        // All has been written: what is left is in the pipe.
        let mut rest = vec![0; line.len() - text];
        reader.read_exact(&mut rest).unwrap();
        text += rest.len();
        assert_eq!(text, line.len());
        assert!(lines.lock().is_done());
    }
}
