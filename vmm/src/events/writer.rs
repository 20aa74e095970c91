//! `--events`: a line of JSON for each event, for other programs (docs/events.md).
//!
//! A thread of its own writes them, so that a FIFO that is not read, or a disk that is full, holds up
//! nothing else. Events that find no room are counted, and the next line that gets through says how
//! many there were.

use std::fs::File;
use std::io::{self, ErrorKind, PipeReader, PipeWriter, Write};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::UNIX_EPOCH;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use serde::Serialize;
use serde_json::Value;

use super::{EventHub, Stamped, Subscription};

/// What each line says of its form: keys and events are added without another number.
const VERSION: u32 = 1;
/// How long the last lines wait for a reader that takes nothing, and others before there is a warning.
const PATIENCE: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};
/// Enough for a line and a loop around write(2).
const STACK: usize = 128 << 10;

/// The thread that writes the lines. Dropping it waits until all have been written, as long as they
/// are read.
#[derive(Debug)]
pub struct EventWriter {
    /// Closed when there will be no more events.
    end: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl EventWriter {
    /// Writes all further events of `hub` to `file`, which is called `place`.
    ///
    /// # Errors
    ///
    /// Fails when there can be no other thread or descriptor.
    pub fn start(file: File, place: String, hub: &EventHub) -> io::Result<Self> {
        let (over, end) = io::pipe()?;
        let mut lines = Lines {
            file,
            place,
            events: hub.subscribe()?,
            over,
            lost: 0,
            is_broken: false,
            has_warned: false,
            given_up: false,
        };
        let thread = thread::Builder::new().name("events".into());
        let thread = thread.stack_size(STACK).spawn(move || lines.write_all())?;
        Ok(Self {
            end: Some(end),
            thread: Some(thread),
        })
    }
}

impl Drop for EventWriter {
    fn drop(&mut self) {
        self.end = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A line.
#[derive(Debug, Serialize)]
struct Line<'a> {
    v: u32,
    /// Seconds since 1970, with microseconds.
    time: f64,
    event: &'a str,
    #[serde(flatten)]
    data: Value,
    /// Events before this one that there was no room for.
    #[serde(skip_serializing_if = "Option::is_none")]
    lost: Option<u64>,
}

/// What the thread works on.
#[derive(Debug)]
struct Lines {
    file: File,
    place: String,
    events: Arc<Subscription>,
    /// Hung up once there will be no more events.
    over: PipeReader,
    /// Events that have no line, since the last line.
    lost: u64,
    /// The last line has no end.
    is_broken: bool,
    has_warned: bool,
    /// There are no more events, and those that are left are not read.
    given_up: bool,
}

impl Lines {
    fn write_all(&mut self) {
        loop {
            // What was published before the end is there once that shows.
            let is_over = self.wait_for_events();
            let (events, lost) = self.events.take();
            events.iter().for_each(|event| self.write(event));
            self.lost += lost;
            if is_over {
                break;
            }
        }
        if self.lost > 0 {
            log::warn!("{} events are not in {}", self.lost, self.place);
        }
    }

    /// Waits for events, and returns whether they are the last.
    fn wait_for_events(&self) -> bool {
        let mut fds = [
            PollFd::new(&self.over, PollFlags::IN),
            PollFd::new(&*self.events, PollFlags::IN),
        ];
        let _ = poll(&mut fds, None);
        !fds[0].revents().is_empty()
    }

    fn write(&mut self, stamped: &Stamped) {
        let Some((event, data)) = stamped.event.line() else {
            return;
        };
        let time = stamped.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let line = Line {
            v: VERSION,
            time: time.as_micros() as f64 / 1e6,
            event,
            data,
            lost: (self.lost > 0).then_some(self.lost),
        };
        let Ok(mut line) = serde_json::to_string(&line) else {
            return;
        };
        if self.is_broken {
            line.insert(0, '\n');
        }
        line.push('\n');
        match self.write_line(line.as_bytes()) {
            Ok(()) => self.lost = 0,
            Err(error) => {
                self.lost += 1;
                self.warn(&format!("they are lost: {error}"));
            }
        }
    }

    fn write_line(&mut self, mut line: &[u8]) -> io::Result<()> {
        while !line.is_empty() {
            if self.given_up {
                return Err(ErrorKind::TimedOut.into());
            }
            self.wait_for_room()?;
            match self.file.write(line) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => {
                    line = &line[written..];
                    self.is_broken = !line.is_empty();
                }
                // The descriptor is shared with a program that has made it non-blocking.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits until the file can be written, but not for long once there are no more events.
    fn wait_for_room(&mut self) -> io::Result<()> {
        loop {
            let mut fds = vec![PollFd::new(&self.file, PollFlags::OUT)];
            let is_over = self.is_over();
            if !is_over {
                fds.push(PollFd::new(&self.over, PollFlags::IN));
            }
            let patience = (is_over || !self.has_warned).then_some(&PATIENCE);
            let count = retry_on_intr(|| poll(&mut fds, patience))?;
            match fds[0].revents().is_empty() {
                false => return Ok(()),
                true if is_over => {
                    self.given_up = true;
                    return Err(ErrorKind::TimedOut.into());
                }
                true if count == 0 => self.warn("they wait to be read"),
                true => {}
            }
        }
    }

    fn is_over(&self) -> bool {
        let mut fds = [PollFd::new(&self.over, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Once: a program may have ended for good that was to read them.
    fn warn(&mut self, what: &str) {
        if !std::mem::replace(&mut self.has_warned, true) {
            log::warn!("events for {}: {what}", self.place);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{BufRead, BufReader};
    use std::os::fd::OwnedFd;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::events::Event;

    fn lines(text: &str) -> Vec<Value> {
        let lines = text.lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn each_event_is_a_line_with_version_time_and_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let hub = EventHub::default();
        let writer = EventWriter::start(file.reopen().unwrap(), "a file".into(), &hub).unwrap();
        hub.publish(Event::Stop);
        hub.publish(Event::Link {
            nic: "net0".into(),
            up: false,
        });
        drop(writer);
        let text = fs::read_to_string(file.path()).unwrap();
        assert!(text.starts_with("{\"v\":1,\"time\":"), "{text}");
        let lines = lines(&text);
        assert_eq!(lines.len(), 2, "{text}");
        assert_eq!(lines[0]["event"], "stop");
        assert_eq!(lines[1]["event"], "link");
        assert_eq!(
            (&lines[1]["nic"], &lines[1]["up"]),
            (&"net0".into(), &false.into())
        );
        assert!(lines[1]["time"].as_f64() >= lines[0]["time"].as_f64());
        assert_eq!(lines[1].as_object().unwrap().len(), 5);
    }

    #[test]
    fn reader_that_was_late_learns_how_many_events_it_has_missed() {
        let (reader, pipe) = io::pipe().unwrap();
        let hub = EventHub::default();
        let pipe = File::from(OwnedFd::from(pipe));
        let writer = EventWriter::start(pipe, "a pipe".into(), &hub).unwrap();
        // More than pipe and queue hold.
        let mut published = 10_000;
        for _ in 0..published {
            hub.publish(Event::Stop);
        }
        let seen = AtomicU64::new(0);
        let lost = thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut all_lost = 0;
                for line in BufReader::new(reader).lines() {
                    let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
                    let lost = line["lost"].as_u64().unwrap_or(0);
                    all_lost += lost;
                    seen.fetch_add(1 + lost, Ordering::SeqCst);
                }
                all_lost
            });
            // Those that are missing are in the line of the next one for which there is room.
            while seen.load(Ordering::SeqCst) < published {
                hub.publish(Event::Resume);
                published += 1;
                thread::sleep(Duration::from_millis(10));
            }
            drop(writer);
            reader.join().unwrap()
        });
        assert!(lost > 0);
        assert_eq!(seen.into_inner(), published);
    }

    #[test]
    fn pipe_that_is_not_read_holds_up_the_end_for_a_moment_alone() {
        let (reader, pipe) = io::pipe().unwrap();
        let hub = EventHub::default();
        let pipe = File::from(OwnedFd::from(pipe));
        let writer = EventWriter::start(pipe, "a pipe".into(), &hub).unwrap();
        for _ in 0..10_000 {
            hub.publish(Event::Stop);
        }
        drop(writer);
        drop(reader);
    }

    #[test]
    fn file_that_cannot_be_written_ends_nothing() {
        let hub = EventHub::default();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let writer = EventWriter::start(full, "/dev/full".into(), &hub).unwrap();
        hub.publish(Event::Stop);
        hub.publish(Event::Resume);
        drop(writer);
    }
}
