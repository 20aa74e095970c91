//! The streams of a command: this process's own, each passed on by a thread.
//!
//! The kernel's buffers are the flow control: a reader that stops stops the writer. An end passes too, in both directions: of stdin to
//! the command, of the command's output to whoever reads stdout, and of a reader to its writer.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::stdio::{dup2_stdin, dup2_stdout, stdin};
use rustix::termios::isatty;

use crate::tty::console::wait;

/// How much passes at once: more than a pipe holds.
const CHUNK: usize = 128 << 10;

/// Passes stdin on to its end, or until the command reads no more.
pub fn pass_input(mut to: &UnixStream) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let closed = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let keyboard = stdin();
        let mut fds = [
            PollFd::new(&keyboard, PollFlags::IN),
            PollFd::new(to, PollFlags::RDHUP),
        ];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        if fds[1].revents().intersects(closed) {
            close_input();
            return Ok(());
        }
        if fds[0].revents().is_empty() {
            continue;
        }
        let length = match rustix::io::read(stdin(), &mut chunk) {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => continue,
            // The terminal was hung up.
            Err(Errno::IO) if isatty(stdin()) => 0,
            Err(error) => {
                let _ = to.shutdown(Shutdown::Write);
                return Err(error.into());
            }
        };
        if length == 0 {
            let _ = to.shutdown(Shutdown::Write);
            return Ok(());
        }
        if to.write_all(&chunk[..length]).is_err() {
            close_input();
            return Ok(());
        }
    }
}

/// Passes output on to its end, or until it has no reader, which its writer then sees.
pub fn pass_output(mut from: &UnixStream, to: Output) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let length = match from.read(&mut chunk) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            // What has come before is written.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error),
        };
        if length == 0 {
            to.close();
            return Ok(());
        }
        if let Err(error) = write_all(to.descriptor(), &chunk[..length]) {
            let _ = from.shutdown(Shutdown::Both);
            return match error {
                Errno::PIPE => Ok(()),
                error => Err(error.into()),
            };
        }
    }
}

/// Where output goes.
#[derive(Clone, Copy, Debug)]
pub enum Output {
    /// To stdout.
    Stdout,
    /// To stderr.
    Stderr,
}

impl Output {
    fn descriptor(self) -> BorrowedFd<'static> {
        match self {
            Self::Stdout => rustix::stdio::stdout(),
            Self::Stderr => rustix::stdio::stderr(),
        }
    }

    /// Has its reader see the end. Stderr stays, for the log.
    fn close(self) {
        if let (Self::Stdout, Ok(null)) = (self, null()) {
            let _ = dup2_stdout(null);
        }
    }
}

/// Has whoever writes to stdin see that nothing reads it. A terminal stays, to be restored.
fn close_input() {
    if let (false, Ok(null)) = (isatty(stdin()), null()) {
        let _ = dup2_stdin(null);
    }
}

fn null() -> rustix::io::Result<rustix::fd::OwnedFd> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

/// Writes to a descriptor that may be one that does not block.
fn write_all(to: BorrowedFd<'static>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(to, PollFlags::OUT),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
