//! The input of the guest's serial console, and the monitor's own keys.

use std::io;
use std::mem;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::stdio::stdin;

use crate::control::exit::{Exit, ExitRequest};
use crate::{log_writer, tty};

/// How long a thread waits before it looks again whether it is still wanted.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long input waits that has no room.
const PAUSE: Duration = Duration::from_millis(10);

const KEYS: &str = "\n\
Ctrl-A x       end the guest at once\n\
Ctrl-A h       this help\n\
Ctrl-A Ctrl-A  send Ctrl-A to the guest\n";

/// Passes stdin on to the guest by `push`, which takes what there is room for, from a thread of its
/// own: reading blocks, and not all that stdin may be can be polled. The thread is never joined and
/// holds nothing that needs giving back.
///
/// `keys` turns Ctrl-A into the monitor's prefix.
pub fn spawn_input(
    push: impl FnMut(&[u8]) -> usize + Send + 'static,
    exit: Arc<ExitRequest>,
    keys: bool,
) -> io::Result<()> {
    let mut input = Input {
        push,
        exit,
        escape: keys.then(Escape::default),
        has_lost: false,
    };
    thread::Builder::new()
        .name("console".into())
        .spawn(move || input.read())?;
    Ok(())
}

/// The way from stdin to the guest.
struct Input<P> {
    push: P,
    exit: Arc<ExitRequest>,
    /// On a terminal.
    escape: Option<Escape>,
    /// The user knows that keys are lost.
    has_lost: bool,
}

impl<P: FnMut(&[u8]) -> usize> Input<P> {
    fn read(&mut self) {
        // Reading as a job in the background fails then; else it would stop all threads.
        let stops: SigSet = [Signal::SIGTTIN, Signal::SIGTTOU].into_iter().collect();
        let _ = stops.thread_block();
        // The terminal may have become ours since the guest's builder looked, or be so any moment:
        // a read that succeeds then would leave it as it is.
        await_foreground();
        let mut refused = false;
        let mut buffer = [0; 256];
        loop {
            match rustix::io::read(stdin(), &mut buffer) {
                // End of file: the guest gets no more input, and runs on.
                Ok(0) => return,
                Ok(length) => {
                    refused = false;
                    self.pass_on(&buffer[..length]);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => wait(stdin(), PollFlags::IN),
                // In the background, or it was until just now.
                Err(Errno::IO) if tty::is_in_background() || !mem::replace(&mut refused, true) => {
                    await_foreground();
                }
                Err(error) => return log::debug!("the console's input ended: {error}"),
            }
        }
    }

    /// Acts on the monitor's keys and passes on the guest's. Of a terminal all are read, also when
    /// the guest reads none: the next may be for the monitor.
    fn pass_on(&mut self, input: &[u8]) {
        let Some(escape) = &mut self.escape else {
            return self.push_all(input);
        };
        let keys = escape.filter(input, |key| match key {
            b'x' | b'X' => self.exit.request(Exit::Terminal),
            b'h' | b'H' | b'?' => log_writer::write(KEYS),
            _ => {}
        });
        if (self.push)(&keys) < keys.len() && !mem::replace(&mut self.has_lost, true) {
            log::warn!("the guest does not read its console: what is typed now is lost");
        }
    }

    /// Passes `input` on as the guest reads it, which for what has room at once takes longer than
    /// [`PAUSE`].
    fn push_all(&mut self, mut input: &[u8]) {
        loop {
            input = &input[(self.push)(input)..];
            if input.is_empty() {
                return;
            }
            thread::sleep(PAUSE);
        }
    }
}

/// Waits until this job has the terminal, which no signal announces to a running job.
fn await_foreground() {
    while tty::is_in_background() {
        thread::sleep(PATIENCE);
    }
    if let Err(error) = tty::take() {
        log::warn!("cannot set up the terminal: {error}");
    }
}

/// Waits until the descriptor is ready, for [`PATIENCE`] at most.
pub(crate) fn wait(fd: impl AsFd, flags: PollFlags) {
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    let _ = poll(&mut [PollFd::new(&fd, flags)], Some(&timeout));
}

/// The terminal's keys that are the monitor's.
#[derive(Debug, Default)]
pub(crate) struct Escape {
    /// The last key was Ctrl-A.
    armed: bool,
}

impl Escape {
    const CTRL_A: u8 = 0x01;

    /// Returns the guest's keys, and gives each that follows a Ctrl-A to `act`.
    pub(crate) fn filter(&mut self, input: &[u8], mut act: impl FnMut(u8)) -> Vec<u8> {
        let mut guest = Vec::with_capacity(input.len());
        for &key in input {
            match (std::mem::take(&mut self.armed), key) {
                (false, Self::CTRL_A) => self.armed = true,
                (false, _) | (true, Self::CTRL_A) => guest.push(key),
                (true, _) => act(key),
            }
        }
        guest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(escape: &mut Escape, input: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let mut ours = Vec::new();
        let guests = escape.filter(input, |key| ours.push(key));
        (guests, ours)
    }

    #[test]
    fn key_after_the_prefix_is_ours_even_when_split() {
        let mut escape = Escape::default();
        assert_eq!(filter(&mut escape, b"ls\x01"), (b"ls".into(), vec![]));
        assert_eq!(filter(&mut escape, b"xy"), (b"y".into(), b"x".into()));
    }

    #[test]
    fn escape_twice_sends_one_ctrl_a() {
        let keys = filter(&mut Escape::default(), b"a\x01\x01b\x01zx");
        assert_eq!(keys, (b"a\x01bx".into(), b"z".into()));
    }
}
