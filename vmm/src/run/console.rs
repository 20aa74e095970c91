//! What the VM's process writes: the guest's console, and its own log.

use std::collections::VecDeque;
use std::io::{PipeReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{io, mem, thread};

use crate::printable::printable;

/// How much is kept of it.
const ROOM: usize = 64 << 10;
/// How much is read at once.
const PIECE: usize = 16 << 10;
/// A line without an end is shown when it has so many bytes.
const LONGEST_LINE: usize = 4096;
/// Enough for a loop around read(2) and a log line.
const STACK: usize = 128 << 10;

/// What is done with each line, besides keeping it.
pub type Show = fn(&str);

/// The newest of what comes by a pipe.
#[derive(Debug)]
pub struct Tail {
    kept: Mutex<Kept>,
    ended: Condvar,
}

#[derive(Debug)]
struct Kept {
    newest: VecDeque<u8>,
    /// When something came last.
    last: Instant,
    has_ended: bool,
}

impl Tail {
    /// Reads the pipe to its end, on a thread of its own.
    ///
    /// # Errors
    ///
    /// When there can be no thread.
    pub fn follow(pipe: PipeReader, name: &str, show: Option<Show>) -> io::Result<Arc<Self>> {
        let tail = Arc::new(Self {
            kept: Mutex::new(Kept {
                newest: VecDeque::new(),
                last: Instant::now(),
                has_ended: false,
            }),
            ended: Condvar::new(),
        });
        let builder = thread::Builder::new().name(name.into()).stack_size(STACK);
        let its = Arc::clone(&tail);
        builder.spawn(move || its.read(pipe, show))?;
        Ok(tail)
    }

    fn read(&self, mut pipe: PipeReader, show: Option<Show>) {
        let mut piece = vec![0; PIECE];
        let mut line = Vec::new();
        loop {
            let length = match pipe.read(&mut piece) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => break,
                Ok(length) => length,
            };
            self.kept().add(&piece[..length]);
            if let Some(show) = show {
                show_lines(&mut line, &piece[..length], show);
            }
        }
        if let (Some(show), false) = (show, line.is_empty()) {
            show(&text(&line));
        }
        self.kept().has_ended = true;
        self.ended.notify_all();
    }

    /// When something came last.
    pub fn last(&self) -> Instant {
        self.kept().last
    }

    /// The lines that are kept and not empty, fit for a terminal, once all has come, or after `patience`.
    pub fn lines(&self, patience: Duration) -> Vec<String> {
        let waits = |kept: &mut Kept| !kept.has_ended;
        let waited = self.ended.wait_timeout_while(self.kept(), patience, waits);
        let (mut kept, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let said = text(kept.newest.make_contiguous());
        let lines = said.lines().map(str::trim_end);
        let lines = lines.filter(|line| !line.is_empty());
        lines.map(|line| printable(line).into_owned()).collect()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn add(&mut self, bytes: &[u8]) {
        self.newest.extend(bytes);
        let surplus = self.newest.len().saturating_sub(ROOM);
        self.newest.drain(..surplus);
        self.last = Instant::now();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Shows the lines that `bytes` end; `line` is what there is of the one that follows.
fn show_lines(line: &mut Vec<u8>, bytes: &[u8], show: Show) {
    for byte in bytes {
        match byte {
            b'\n' => show(text(&mem::take(line)).trim_end_matches('\r')),
            _ if line.len() >= LONGEST_LINE => {
                show(&text(line));
                line.clear();
                line.push(*byte);
            }
            _ => line.push(*byte),
        }
    }
}

/// The guest's console, for `--console`.
pub fn show_console(line: &str) {
    // Nothing is to be done where stderr is closed.
    let _ = io::Write::write_all(
        &mut io::stderr(),
        format!("{}\n", printable(line)).as_bytes(),
    );
}

/// The log of the VM's process, which becomes a part of this one's.
pub fn show_log(line: &str) {
    let line = line.strip_prefix("minivmm: ").unwrap_or(line);
    match line.split_once(": ") {
        Some(("warn", text)) => log::warn!("{text}"),
        // The reason for which there is no guest is the report's to say.
        Some((_, text)) => log::debug!("the VM: {text}"),
        None => log::debug!("the VM: {line}"),
    }
}

/// The last error that the VM's process has logged.
pub fn last_error(lines: &[String]) -> Option<&str> {
    let error = |line: &&String| line.starts_with("minivmm: error: ");
    let line = lines.iter().rev().find(error)?;
    line.strip_prefix("minivmm: error: ")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn lines_are_fit_for_a_terminal() {
        let (reader, mut writer) = io::pipe().unwrap();
        let tail = Tail::follow(reader, "tail", None).unwrap();
        writer.write_all(b"a\r\n\r\nb\x1b[2J\r\n").unwrap();
        writer.write_all(b"\xffc").unwrap();
        drop(writer);
        assert_eq!(tail.lines(PATIENCE), ["a", "b\\u{1b}[2J", "\u{fffd}c"]);
    }

    #[test]
    fn no_more_than_the_newest_is_kept() {
        let (reader, mut writer) = io::pipe().unwrap();
        let tail = Tail::follow(reader, "tail", None).unwrap();
        for n in 0..20_000 {
            writeln!(writer, "line {n}").unwrap();
        }
        drop(writer);
        let lines = tail.lines(PATIENCE);
        assert_eq!(lines.last().map(String::as_str), Some("line 19999"));
        assert!(lines.len() < ROOM / 10, "{}", lines.len());
    }

    #[test]
    fn lines_are_shown_once_they_have_ended_or_grow_too_long() {
        let mut line = Vec::new();
        show_lines(&mut line, b"a\nb", |shown| assert_eq!(shown, "a"));
        assert_eq!(line, b"b");
        show_lines(&mut line, b"c\r\n", |shown| assert_eq!(shown, "bc"));
        show_lines(&mut line, &[b'x'; 3 * LONGEST_LINE], |shown| {
            assert_eq!(shown.len(), LONGEST_LINE);
        });
        assert!(line.len() <= LONGEST_LINE);
    }

    #[test]
    fn error_of_the_vm_is_found_behind_what_else_it_says() {
        let lines = ["minivmm: error: a: b", "minivmm: warn: c", "qemu: d"].map(str::to_owned);
        assert_eq!(last_error(&lines), Some("a: b"));
        assert_eq!(last_error(&lines[1..]), None);
    }
}
