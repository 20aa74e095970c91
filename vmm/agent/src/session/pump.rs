//! One direction of a stream.

use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

/// How much is held at once: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// What a pump is connected to. None of them blocks.
#[derive(Clone, Debug)]
pub enum End {
    /// The host.
    Host(Arc<UnixStream>),
    /// The command, by a pipe.
    Pipe(Arc<OwnedFd>),
    /// The command, by its terminal.
    Terminal(Arc<OwnedFd>),
}

impl AsFd for End {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Self::Host(stream) => stream.as_fd(),
            Self::Pipe(fd) | Self::Terminal(fd) => fd.as_fd(),
        }
    }
}

/// Takes bytes from one end to the other, with what it has taken in between. It reads nothing as long as it has some: so a reader
/// that stops stops the writer.
#[derive(Debug)]
pub struct Pump {
    from: Option<End>,
    to: Option<End>,
    buffer: Vec<u8>,
    /// What of the buffer is still to be written.
    held: Range<usize>,
    /// How much is still read, and only as long as there is some; without an end by default.
    left: Option<usize>,
}

impl Pump {
    /// Takes bytes from `from`, after those that have come from there already, to `to`.
    pub fn new(from: End, to: End, first: Vec<u8>) -> Self {
        Self {
            from: Some(from),
            to: Some(to),
            held: 0..first.len(),
            buffer: first,
            left: None,
        }
    }

    /// Whether it has ended.
    pub fn is_done(&self) -> bool {
        self.to.is_none()
    }

    /// Has it end when what is there now has passed. What comes later, from others, does not.
    pub fn finish(&mut self) {
        self.left = Some(match &self.from {
            Some(End::Pipe(pipe)) => {
                // A pipe of which the kernel does not say it is read until it is empty, but not for ever.
                let held = rustix::io::ioctl_fionread(pipe.as_fd());
                held.map_or(MOST, |held| usize::try_from(held).unwrap_or(MOST))
            }
            _ => MOST,
        });
        self.pass();
    }

    /// Ends it at once. Both ends see that, if they have no other one.
    pub fn close(&mut self) {
        self.from = None;
        self.to = None;
        self.held = 0..0;
        self.buffer = Vec::new();
    }

    /// What is read now.
    fn source(&self) -> Option<&End> {
        self.from.as_ref().filter(|_| self.held.is_empty())
    }

    /// Adds what it waits for.
    pub fn watch<'a>(&'a self, list: &mut Vec<PollFd<'a>>) {
        if let Some(to) = &self.to {
            // Without any flag it is still said when the other side has gone.
            let flags = match self.held.is_empty() {
                true => PollFlags::empty(),
                false => PollFlags::OUT,
            };
            list.push(PollFd::new(to, flags));
        }
        if let Some(from) = self.source() {
            list.push(PollFd::new(from, PollFlags::IN));
        }
    }

    /// Does what can be done. `ready` has what came of the descriptors of [`Self::watch`].
    pub fn turn(&mut self, ready: &mut impl Iterator<Item = PollFlags>) {
        let mut next = |is_watched: bool| is_watched.then(|| ready.next()).flatten();
        let to = next(self.to.is_some()).unwrap_or(PollFlags::empty());
        let from = next(self.source().is_some()).unwrap_or(PollFlags::empty());
        if to.intersects(PollFlags::HUP | PollFlags::ERR) {
            self.close();
        } else if !(to | from).is_empty() {
            self.pass();
        }
    }

    /// Passes on what it holds, and then what is there: once, for the others' sake, or all of it when it is to end.
    fn pass(&mut self) {
        self.write();
        while self.source().is_some() {
            let has_come = self.read();
            self.write();
            if self.left.is_none() || !has_come {
                return;
            }
        }
    }

    /// Whether something has come, be it the end.
    fn read(&mut self) -> bool {
        let Some(from) = &self.from else {
            return false;
        };
        self.buffer.resize(CHUNK, 0);
        let most = self.left.map_or(CHUNK, |left| left.min(CHUNK));
        let length = match rustix::io::read(from, &mut self.buffer[..most]) {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) if self.left.is_none() => return false,
            // A terminal that its last program has closed has EIO.
            Err(_) => 0,
        };
        self.held = 0..length;
        if let Some(left) = &mut self.left {
            *left -= length;
        }
        if length == 0 || self.left == Some(0) {
            if let (End::Host(_), Some(End::Terminal(_))) = (from, &self.to) {
                self.buffer[length] = END_OF_INPUT;
                self.held.end += 1;
            }
            self.from = None;
        }
        true
    }

    fn write(&mut self) {
        let Some(to) = &self.to else {
            return;
        };
        if !self.held.is_empty() {
            match rustix::io::write(to, &self.buffer[self.held.clone()]) {
                Ok(length) => self.held.start += length,
                Err(Errno::AGAIN | Errno::INTR) => return,
                // Its reader has gone, and what reads here goes too: so the writer sees it.
                Err(_) => return self.close(),
            }
        }
        if self.held.is_empty() && self.from.is_none() {
            if let End::Host(stream) = to {
                let _ = stream.shutdown(Shutdown::Write);
            }
            self.close();
        }
    }
}

/// The most that is read of what is to end: more than the kernel holds of a terminal.
const MOST: usize = 256 << 10;

/// VEOF of a terminal in its first mode: it has no other end of its input.
const END_OF_INPUT: u8 = 4;

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use rustix::event::{Timespec, poll};

    use super::*;

    fn pair() -> (UnixStream, End) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (ours, End::Host(Arc::new(theirs)))
    }

    /// Turns as long as there is something to do at once.
    fn run(pump: &mut Pump) {
        loop {
            let mut list = Vec::new();
            pump.watch(&mut list);
            if list.is_empty() || poll(&mut list, Some(&Timespec::default())).unwrap() == 0 {
                return;
            }
            let ready: Vec<_> = list.iter().map(PollFd::revents).collect();
            pump.turn(&mut ready.into_iter());
        }
    }

    #[test]
    fn end_of_the_source_is_that_of_the_sink_after_all_bytes() {
        let ((mut source, from), (mut sink, to)) = (pair(), pair());
        let mut pump = Pump::new(from, to, b"first".to_vec());
        source.write_all(b" second").unwrap();
        source.shutdown(Shutdown::Write).unwrap();
        // What is there from the start waits for a turn by its sink.
        run(&mut pump);
        assert!(pump.is_done());
        let mut all = String::new();
        sink.read_to_string(&mut all).unwrap();
        assert_eq!(all, "first second");
    }

    #[test]
    fn reader_that_stops_stops_the_writer_and_costs_no_turns() {
        let ((mut source, from), (mut sink, to)) = (pair(), pair());
        let mut pump = Pump::new(from, to, Vec::new());
        source.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while let Ok(length) = source.write(&[7; 4096]) {
            sent += length;
            run(&mut pump);
        }
        assert!(pump.buffer.len() <= CHUNK && !pump.held.is_empty());
        drop(source);
        let mut all = Vec::new();
        sink.set_nonblocking(true).unwrap();
        while !pump.is_done() {
            let _ = sink.read_to_end(&mut all);
            run(&mut pump);
        }
        let _ = sink.read_to_end(&mut all);
        assert_eq!(all.len(), sent);
    }

    #[test]
    fn reader_that_goes_is_seen_by_the_writer_also_when_nothing_is_written() {
        let ((mut source, from), (sink, to)) = (pair(), pair());
        let mut pump = Pump::new(from, to, Vec::new());
        run(&mut pump);
        drop(sink);
        run(&mut pump);
        assert!(pump.is_done());
        assert_eq!(source.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn last_bytes_pass_and_later_ones_of_others_do_not() {
        let ((reader, mut writer), (mut sink, to)) = (std::io::pipe().unwrap(), pair());
        let mut pump = Pump::new(End::Pipe(Arc::new(reader.into())), to, Vec::new());
        writer.write_all(b"its own").unwrap();
        pump.finish();
        assert!(pump.is_done());
        assert!(writer.write_all(b"of others").is_err());
        let mut all = String::new();
        sink.read_to_string(&mut all).unwrap();
        assert_eq!(all, "its own");
    }

    #[test]
    fn source_that_is_empty_ends_at_once_when_it_is_finished() {
        let ((_source, from), (mut sink, to)) = (pair(), pair());
        let mut pump = Pump::new(from, to, Vec::new());
        pump.finish();
        assert!(pump.is_done());
        assert_eq!(sink.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn last_bytes_wait_for_a_slow_reader() {
        let ((reader, mut writer), (mut sink, to)) = (std::io::pipe().unwrap(), pair());
        let End::Host(host) = &to else {
            unreachable!();
        };
        while (&**host).write(&[7; 4096]).is_ok() {}
        let mut pump = Pump::new(End::Pipe(Arc::new(reader.into())), to.clone(), Vec::new());
        writer.write_all(b"its own").unwrap();
        pump.finish();
        assert!(!pump.is_done());
        let mut all = Vec::new();
        sink.set_nonblocking(true).unwrap();
        while !pump.is_done() {
            let _ = sink.read_to_end(&mut all);
            run(&mut pump);
        }
        let _ = sink.read_to_end(&mut all);
        assert!(all.ends_with(b"\x07its own"));
    }
}
