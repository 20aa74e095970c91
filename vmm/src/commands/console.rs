//! `minivmm console`: attaches to the console of a running VM, and leaves it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::stdio::{stdin, stdout};

use crate::cli::ConsoleArgs;
use crate::instance::{self, FindError, Record};
use crate::log_writer;
use crate::tty::RawTerminal;
use crate::tty::console::{Escape, wait};
use crate::tty::output;

const KEYS: &str = "\n\
Ctrl-A d       leave the console; the guest runs on\n\
Ctrl-A h       this help\n\
Ctrl-A Ctrl-A  send Ctrl-A to the guest\n";

/// How long a VM may take to start, and how often it is looked whether it has.
const STARTING: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// How much is read at once.
const CHUNK: usize = 16 << 10;
/// How many keys wait for a guest that reads none.
const MOST_KEYS: usize = 4096;

/// Why a console cannot be attached to.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// There is no such VM.
    #[error(transparent)]
    Find(#[from] FindError),
    /// It has no serial port.
    #[error(
        "{0} has no console: it runs with --console none, or with a QEMU command line of its own"
    )]
    None(String),
    /// Its socket does not take another client.
    #[error("the console of {0} has as many clients as it can have")]
    Full(String),
    /// Its socket cannot be used.
    #[error("cannot connect to the console of {0}")]
    Connect(String, #[source] io::Error),
    /// The terminal cannot be used.
    #[error("cannot set up the terminal")]
    Terminal(#[source] io::Error),
    /// Something else fails.
    #[error("cannot pass the console on")]
    PassOn(#[source] io::Error),
}

/// Passes the console on until the VM ends or the user leaves.
pub fn run(args: &ConsoleArgs) -> Result<u8, ConsoleError> {
    let record = instance::find(&args.name)?.record;
    let Some(socket) = connect(&record)? else {
        return Ok(0);
    };
    if args.dump {
        return dump(socket).map_err(ConsoleError::PassOn);
    }
    let terminal = RawTerminal::enter().map_err(ConsoleError::Terminal)?;
    if terminal.is_some() {
        let name = &args.name;
        log::info!("the console of {name}: Ctrl-A d leaves it, Ctrl-A h shows more keys");
    }
    let end = attach(Attached::new(socket, terminal.is_some()), &record)?;
    drop(terminal);
    match end {
        End::Left => log::info!("left the console; {} runs on", args.name),
        End::Connection => log::info!("{} has ended", args.name),
    }
    Ok(0)
}

/// Shows what the console has: once its client closes its side, the server sends that and ends.
fn dump(socket: UnixStream) -> io::Result<u8> {
    socket.shutdown(Shutdown::Write)?;
    let mut attached = Attached::new(socket, false);
    while attached.show()? == Shown::More {}
    Ok(0)
}

/// Passes the console on, and connects again where this program was too slow for the guest.
fn attach(mut attached: Attached, record: &Record) -> Result<End, ConsoleError> {
    let mut was_refused = false;
    loop {
        if let End::Left = attached.pass_on().map_err(ConsoleError::PassOn)? {
            return Ok(End::Left);
        }
        let Some(socket) = connect_again(record) else {
            return Ok(End::Connection);
        };
        if attached.has_shown {
            log::warn!("some of what the guest said is missing here: this program was too slow");
        } else if std::mem::replace(&mut was_refused, true) {
            return Err(ConsoleError::Full(record.name.to_string()));
        }
        attached.socket = socket;
    }
}

/// Connects to the console of a VM, which may only be starting; `None` where it has ended meanwhile.
pub fn connect(record: &Record) -> Result<Option<UnixStream>, ConsoleError> {
    let deadline = Instant::now() + STARTING;
    loop {
        let error = match UnixStream::connect(&record.console) {
            Ok(socket) => return Ok(Some(socket)),
            Err(_) if !is_running(record) => return Ok(None),
            Err(error) => error,
        };
        let name = record.name.to_string();
        // It makes this socket first.
        let has_started = record.qmp.iter().any(|path| path.exists());
        let is_late = has_started || Instant::now() >= deadline;
        match error.kind() {
            ErrorKind::NotFound if is_late => return Err(ConsoleError::None(name)),
            ErrorKind::NotFound => thread::sleep(LOOK_AGAIN),
            _ => return Err(ConsoleError::Connect(name, error)),
        }
    }
}

/// Connects once more after the connection's end: to a VM that runs on, for a client that was too slow.
pub fn connect_again(record: &Record) -> Option<UnixStream> {
    if !is_running(record) {
        return None;
    }
    // The console ends before its VM does.
    UnixStream::connect(&record.console).ok()
}

fn is_running(record: &Record) -> bool {
    let found = instance::find(&record.name);
    found.is_ok_and(|found| found.record.owner == record.owner)
}

/// What was shown.
#[derive(Debug, PartialEq, Eq)]
enum Shown {
    More,
    /// The connection has ended.
    All,
    /// The reader of stdout has seen enough.
    Enough,
}

/// Why nothing more is passed on.
#[derive(Debug)]
enum End {
    /// The user has left.
    Left,
    /// The console's connection has ended.
    Connection,
}

/// A connection to a console, stdin and stdout.
#[derive(Debug)]
struct Attached {
    socket: UnixStream,
    /// On a terminal.
    escape: Option<Escape>,
    reads_stdin: bool,
    /// Input on its way to the guest.
    input: Vec<u8>,
    has_left: bool,
    has_shown: bool,
    has_lost: bool,
}

impl Attached {
    fn new(socket: UnixStream, has_terminal: bool) -> Self {
        Self {
            socket,
            escape: has_terminal.then(Escape::default),
            reads_stdin: true,
            input: Vec::new(),
            has_left: false,
            has_shown: false,
            has_lost: false,
        }
    }

    /// Passes on what comes and goes until there is an end of it.
    fn pass_on(&mut self) -> io::Result<End> {
        self.socket.set_nonblocking(true)?;
        self.has_shown = false;
        loop {
            // Of a terminal all keys are read: the next may be for this program.
            let reads = self.reads_stdin && (self.escape.is_some() || self.input.is_empty());
            let when = |wanted, flags| if wanted { flags } else { PollFlags::empty() };
            let sends = when(!self.input.is_empty(), PollFlags::OUT);
            let mut fds = vec![PollFd::new(&self.socket, PollFlags::IN | sends)];
            let keyboard = stdin();
            fds.extend(reads.then(|| PollFd::new(&keyboard, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let is_ready = |fd: &PollFd| !fd.revents().is_empty();
            let has_keys = fds.get(1).is_some_and(is_ready);
            let has_news = is_ready(&fds[0]);
            if has_keys {
                self.read_stdin()?;
            }
            if has_news {
                self.send()?;
                match self.show()? {
                    Shown::More => {}
                    Shown::All => return Ok(End::Connection),
                    Shown::Enough => return Ok(End::Left),
                }
            }
            if self.has_left {
                return Ok(End::Left);
            }
        }
    }

    /// Shows what the guest has said.
    fn show(&mut self) -> io::Result<Shown> {
        let mut chunk = [0; CHUNK];
        match self.socket.read(&mut chunk) {
            Ok(0) => Ok(Shown::All),
            Ok(length) => {
                self.has_shown = true;
                write_all(&chunk[..length])
            }
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(Shown::More),
                // Some of the input was not read.
                ErrorKind::ConnectionReset => Ok(Shown::All),
                _ => Err(error),
            },
        }
    }

    fn read_stdin(&mut self) -> io::Result<()> {
        let mut keys = [0; 1024];
        let keys = match rustix::io::read(stdin(), &mut keys) {
            Ok(length) => &keys[..length],
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            // The terminal was hung up.
            Err(Errno::IO) => &[],
            Err(error) => return Err(error.into()),
        };
        let Some(escape) = &mut self.escape else {
            // Its end is not that of the console.
            self.reads_stdin = !keys.is_empty();
            self.input.extend(keys);
            return Ok(());
        };
        self.has_left |= keys.is_empty();
        let guests = escape.filter(keys, |key| match key {
            b'd' | b'D' => self.has_left = true,
            b'h' | b'H' | b'?' => log_writer::write(KEYS),
            _ => {}
        });
        if self.input.len() + guests.len() <= MOST_KEYS {
            self.input.extend(guests);
        } else if !std::mem::replace(&mut self.has_lost, true) {
            log::warn!("the guest does not read its console: what is typed now is lost");
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        if self.input.is_empty() {
            return Ok(());
        }
        match self.socket.write(&self.input) {
            Ok(length) => drop(self.input.drain(..length)),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => {}
                // What is left can still be read, and then the end.
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => self.input.clear(),
                _ => return Err(error),
            },
        }
        Ok(())
    }
}

/// Writes to stdout, which may be one that does not block.
fn write_all(mut bytes: &[u8]) -> io::Result<Shown> {
    output::note_end_of(bytes);
    while !bytes.is_empty() {
        match rustix::io::write(stdout(), bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(stdout(), PollFlags::OUT),
            Err(Errno::PIPE) => return Ok(Shown::Enough),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Shown::More)
}
