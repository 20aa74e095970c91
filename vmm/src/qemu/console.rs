//! The console of a guest of `--kernel`: QEMU's serial port is a socket, whose other end minivmm has, so that the
//! terminal's keys and `minivmm console` are those of a native guest.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use event_manager::EventSet;
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use crate::config::ConsoleTarget;
use crate::control::exit::ExitRequest;
use crate::files::{empty, open_for_writing};
use crate::qmp::socket::Listener;
use crate::tty::RawTerminal;
use crate::tty::console::spawn_input;
use crate::tty::output::{Output, stdout_file};
use crate::tty::server::{Input, Server};

/// As much is read at once.
const CHUNK: usize = 4096;
/// How long the last of the output waits for a reader that takes nothing of it.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The console, before QEMU runs.
#[derive(Debug)]
pub(super) struct Console {
    socket: UnixStream,
    file: File,
    target: ConsoleTarget,
    listener: Option<Listener>,
}

impl Console {
    /// The console and QEMU's end of it; `None` for a guest without a serial port. Other programs find it by
    /// `listener`.
    pub fn open(
        target: &ConsoleTarget,
        listener: Option<Listener>,
    ) -> io::Result<Option<(Self, OwnedFd)>> {
        let file = match target {
            ConsoleTarget::None => return Ok(None),
            ConsoleTarget::Stdio => stdout_file()?,
            ConsoleTarget::File(path) => open_for_writing(path)?,
        };
        let (socket, theirs) = UnixStream::pair()?;
        let console = Self {
            socket,
            file,
            target: target.clone(),
            listener,
        };
        Ok(Some((console, theirs.into())))
    }

    /// Passes the console on from here on.
    pub fn start(self) -> io::Result<Running> {
        if self.target != ConsoleTarget::Stdio {
            empty(&self.file)?;
        }
        let exit = Arc::new(ExitRequest::new()?);
        let output = Output::new(self.file, self.target.place(), Arc::clone(&exit))?;
        let output = Arc::new(output);
        let (sender, done) = mpsc::channel();
        let (from_qemu, shown) = (self.socket.try_clone()?, Arc::clone(&output));
        let show = move || {
            show(&from_qemu, &shown);
            let _ = sender.send(());
        };
        thread::Builder::new().name("output".into()).spawn(show)?;
        let mut terminal = None;
        if self.target == ConsoleTarget::Stdio {
            terminal = RawTerminal::enter()?;
            let mut to_qemu = ToQemu(self.socket.try_clone()?);
            let push = move |keys: &[u8]| to_qemu.push(keys);
            spawn_input(push, Arc::clone(&exit), terminal.is_some())?;
        }
        let input = Box::new(ToQemu(self.socket.try_clone()?));
        let serve = |listener| Server::new(listener, Arc::clone(output.transcript()), input);
        let server = self.listener.map(serve);
        Ok(Running {
            socket: self.socket,
            server: server.map(|server| Rc::new(RefCell::new(server))),
            output,
            exit,
            done,
            _terminal: terminal,
        })
    }
}

/// Copies what the guest says until QEMU's end.
fn show(mut socket: &UnixStream, output: &Arc<Output>) {
    let mut port = output.port();
    let mut chunk = [0; CHUNK];
    loop {
        match socket.read(&mut chunk) {
            Ok(0) => return,
            Ok(length) => {
                // What could not be written is counted there.
                let _ = port.write_all(&chunk[..length]);
                output.send();
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// The way to QEMU's serial port, whose other end may be read by a thread that waits.
#[derive(Debug)]
struct ToQemu(UnixStream);

impl Input for ToQemu {
    fn push(&mut self, bytes: &[u8]) -> usize {
        match send(&self.0, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => sent,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            // QEMU has gone.
            Err(_) => bytes.len(),
        }
    }

    fn room(&self) -> (RawFd, EventSet) {
        (self.0.as_raw_fd(), EventSet::OUT)
    }
}

/// The console while QEMU runs.
#[derive(Debug)]
pub(super) struct Running {
    socket: UnixStream,
    /// For the event loop.
    pub server: Option<Rc<RefCell<Server>>>,
    output: Arc<Output>,
    /// Where the terminal's key ends the guest.
    pub exit: Arc<ExitRequest>,
    /// The output has been shown to its end.
    done: Receiver<()>,
    _terminal: Option<RawTerminal>,
}

impl Running {
    /// Shows the last of the output once QEMU has ended, and leaves the terminal as it was.
    pub fn finish(self) {
        // A helper of QEMU's may still hold the other end. What has come can be read nevertheless.
        let _ = self.socket.shutdown(Shutdown::Both);
        let mut shown = None;
        while self.done.recv_timeout(LAST_WORDS) == Err(RecvTimeoutError::Timeout) {
            let end = self.output.transcript().end();
            if shown.replace(end) == Some(end) {
                log::warn!("the last of the console is lost: its reader does not take it");
                break;
            }
        }
        if let Some(server) = self.server.and_then(Rc::into_inner) {
            server.into_inner().finish();
        }
        self.output.lost().log();
    }
}
