//! The output of the guest's serial console, gathered on its way to a file, pipe or terminal.
//!
//! A system call, and a reader that wakes up, for each byte would be most of what a message costs.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::stdio::stdout;
use vmm_sys_util::timerfd::TimerFd;

use super::console::wait;
use super::transcript::Transcript;
use crate::control::exit::ExitRequest;

/// The cursor stands behind guest output that has not ended its line.
static MID_LINE: AtomicBool = AtomicBool::new(false);

/// How long output waits for more at most: less than a person sees.
const DELAY: Duration = Duration::from_millis(5);
/// How much of it waits at most.
const MOST: usize = 1024;

/// True once for each time that guest output left the cursor in mid-line on stdout: a log line
/// on the same terminal has to begin with a line break then.
pub fn take_mid_line() -> bool {
    MID_LINE.swap(false, Ordering::Relaxed)
}

/// Guest output has gone to stdout.
pub fn note_end_of(shown: &[u8]) {
    MID_LINE.store(shown.last() != Some(&b'\n'), Ordering::Relaxed);
}

/// A descriptor of its own for stdout.
pub fn stdout_file() -> io::Result<File> {
    Ok(rustix::io::fcntl_dupfd_cloexec(stdout(), 3)?.into())
}

/// The serial port's output to a file, pipe or terminal, and to the readers of its transcript.
///
/// The port says when what it has written is to go out, and the vCPU that has caused it sends it
/// once it has left the port: a reader that holds it up does not hold up who needs the port. Where
/// the port does not say so within [`DELAY`], a timer expires, and the control thread kicks the
/// vCPUs: it never writes itself.
#[derive(Debug)]
pub struct Output {
    gathered: Mutex<Gathered>,
    /// Held while a reader is waited for.
    target: Mutex<Target>,
    transcript: Arc<Transcript>,
    /// The descriptor of the timer, for which the control thread need not wait for the lock.
    timer: RawFd,
    /// There is something to send. Set by those who hold the lock.
    is_waiting: AtomicBool,
    /// And it is to go out.
    is_due: AtomicBool,
    /// The timer runs, or has expired and the control thread has yet to see it.
    is_timed: AtomicBool,
    lost: Lost,
}

#[derive(Debug)]
struct Gathered {
    bytes: Vec<u8>,
    timer: TimerFd,
}

/// The serial port's share of an output.
#[derive(Debug)]
pub struct Port(Arc<Output>);

impl Output {
    /// Writes to `file`, which is called `place`, until `exit` is requested.
    pub fn new(file: File, place: String, exit: Arc<ExitRequest>) -> io::Result<Self> {
        let timer = TimerFd::new()?;
        Ok(Self {
            timer: timer.as_raw_fd(),
            gathered: Mutex::new(Gathered {
                bytes: Vec::with_capacity(MOST),
                timer,
            }),
            target: Mutex::new(Target {
                file,
                exit,
                given_up: false,
                room: Vec::with_capacity(MOST),
            }),
            transcript: Arc::new(Transcript::new()?),
            is_waiting: AtomicBool::new(false),
            is_due: AtomicBool::new(false),
            is_timed: AtomicBool::new(false),
            lost: Lost::new(place),
        })
    }

    /// What the port writes to.
    pub fn port(self: &Arc<Self>) -> Port {
        Port(Arc::clone(self))
    }

    /// What has gone out, or was to.
    pub fn transcript(&self) -> &Arc<Transcript> {
        &self.transcript
    }

    /// What could not be written.
    pub fn lost(&self) -> &Lost {
        &self.lost
    }

    /// Writes out what was gathered, if it is to go out.
    pub fn send_if_due(&self) {
        if self.is_due.load(Ordering::SeqCst) {
            self.send();
        }
    }

    /// Writes out all that was gathered.
    pub fn send(&self) {
        if self.is_waiting.load(Ordering::SeqCst) {
            let mut target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
            self.send_to(&mut target);
        }
    }

    /// The same for a vCPU that leaves the guest, or was kicked. Another that is at it may have to
    /// wait for a reader, and this one need not.
    pub fn send_unless_busy(&self) {
        if !self.is_waiting.load(Ordering::SeqCst) {
            return;
        }
        match self.target.try_lock() {
            Ok(mut target) => self.send_to(&mut target),
            Err(TryLockError::Poisoned(poisoned)) => self.send_to(&mut poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {}
        }
    }

    /// Whether something still waits now that the timer has expired.
    pub fn is_late(&self) -> bool {
        self.is_timed.store(false, Ordering::SeqCst);
        self.is_waiting.load(Ordering::SeqCst)
    }

    fn gather(&self, bytes: &[u8]) {
        let gathered = &mut *self.lock();
        gathered.bytes.extend_from_slice(bytes);
        self.is_waiting.store(true, Ordering::SeqCst);
        let is_timed =
            self.is_timed.swap(true, Ordering::SeqCst) || gathered.timer.reset(DELAY, None).is_ok();
        if !is_timed || gathered.bytes.len() >= MOST {
            self.is_due.store(true, Ordering::SeqCst);
        }
    }

    fn flush(&self) {
        if self.is_waiting.load(Ordering::SeqCst) {
            self.is_due.store(true, Ordering::SeqCst);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Gathered> {
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send_to(&self, target: &mut Target) {
        let mut gathered = self.lock();
        self.is_due.store(false, Ordering::SeqCst);
        self.is_waiting.store(false, Ordering::SeqCst);
        let room = mem::take(&mut target.room);
        let bytes = mem::replace(&mut gathered.bytes, room);
        drop(gathered);
        self.transcript.push(&bytes);
        if let Err((left, error)) = target.write(&bytes) {
            self.lost.count(left, &error);
        }
        target.room = bytes;
        target.room.clear();
    }
}

/// The timer, whose expiry is an edge, and not read.
impl AsRawFd for Output {
    fn as_raw_fd(&self) -> RawFd {
        self.timer
    }
}

impl Write for Port {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.gather(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush();
        Ok(())
    }
}

/// A file, pipe or terminal.
///
/// Whoever does not read it may hold the guest up, but not the monitor: once the guest is to end,
/// a blocked write (which the vCPU's kick interrupts) gives up, and those after it do so at once.
#[derive(Debug)]
struct Target {
    file: File,
    exit: Arc<ExitRequest>,
    given_up: bool,
    /// Where the next output is gathered, while this one is written.
    room: Vec<u8>,
}

impl Target {
    /// Writes all of it, or says how much is left and why. It is not an error to give up.
    fn write(&mut self, mut bytes: &[u8]) -> Result<(), (usize, io::Error)> {
        while !bytes.is_empty() && !self.given_up {
            match self.file.write(bytes) {
                Ok(0) => return Err((bytes.len(), ErrorKind::WriteZero.into())),
                Ok(written) => {
                    let (done, left) = bytes.split_at(written);
                    note_end_of(done);
                    bytes = left;
                }
                Err(_) if self.exit.reason().is_some() => self.given_up = true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Another process has made the pipe or terminal that we share non-blocking.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    wait(&self.file, PollFlags::OUT);
                }
                Err(error) => return Err((bytes.len(), error)),
            }
        }
        Ok(())
    }
}

/// The bytes that could not be written.
#[derive(Debug)]
pub struct Lost {
    /// Where to.
    place: String,
    bytes: AtomicU64,
}

impl Lost {
    fn new(place: String) -> Self {
        let bytes = AtomicU64::new(0);
        Self { place, bytes }
    }

    /// Says so once: a guest can write for ever.
    fn count(&self, bytes: usize, error: &io::Error) {
        if self.bytes.fetch_add(bytes as u64, Ordering::Relaxed) == 0 {
            let place = &self.place;
            log::warn!(
                "cannot write the console to {place}, so what the guest writes is lost: {error}"
            );
        }
    }

    /// Says how much was lost, if anything was: at the guest's end.
    pub fn log(&self) {
        let bytes = self.bytes.load(Ordering::Relaxed);
        if bytes > 0 {
            log::warn!("{bytes} bytes of the console are lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::thread;

    use super::*;
    use crate::control::exit::Exit;

    /// An output to a pipe, and the pipe's other end, which does not block.
    fn output() -> (Arc<Output>, io::PipeReader, Arc<ExitRequest>) {
        let exit = Arc::new(ExitRequest::new().unwrap());
        let (reader, writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        let file = std::os::fd::OwnedFd::from(writer).into();
        let output = Output::new(file, "a pipe".into(), Arc::clone(&exit)).unwrap();
        (Arc::new(output), reader, exit)
    }

    fn read(mut reader: &io::PipeReader) -> Vec<u8> {
        let mut bytes = vec![0; 2 * MOST];
        let length = reader.read(&mut bytes).unwrap_or(0);
        bytes.truncate(length);
        bytes
    }

    #[test]
    fn output_waits_until_it_is_to_go_out() {
        let (output, reader, _exit) = output();
        let mut port = output.port();
        port.write_all(b"pro").unwrap();
        port.write_all(b"mpt").unwrap();
        output.send_if_due();
        assert_eq!(read(&reader), b"");
        port.flush().unwrap();
        output.send_if_due();
        assert_eq!(read(&reader), b"prompt");
        assert!(!output.is_late());
    }

    #[test]
    fn output_that_is_not_flushed_is_late_once_the_timer_expires() {
        let (output, reader, _exit) = output();
        output.port().write_all(b"x").unwrap();
        while !wait_for_timer(&output) {}
        assert!(output.is_late());
        output.send_unless_busy();
        assert_eq!(read(&reader), b"x");
        assert!(!output.is_late());
        // And the timer runs anew.
        output.port().write_all(b"y").unwrap();
        while !wait_for_timer(&output) {}
        assert!(output.is_late());
    }

    fn wait_for_timer(output: &Output) -> bool {
        output.lock().timer.wait().is_ok()
    }

    #[test]
    fn vcpu_that_waits_for_a_reader_holds_up_neither_the_port_nor_the_control_thread() {
        let (output, _reader, _exit) = output();
        let _writes = output.target.lock().unwrap();
        let mut port = output.port();
        port.write_all(b"x").unwrap();
        port.flush().unwrap();
        output.send_unless_busy();
        assert!(output.as_raw_fd() >= 0);
        assert!(output.is_late());
    }

    #[test]
    fn output_without_an_end_goes_out_in_pieces() {
        let (output, reader, _exit) = output();
        let mut port = output.port();
        for _ in 0..MOST {
            port.write_all(b"x").unwrap();
            output.send_if_due();
        }
        assert_eq!(read(&reader), [b'x'; MOST]);
        assert!(output.lock().bytes.is_empty());
        let mut said = [0; 2 * MOST];
        assert_eq!(output.transcript().read(0, &mut said), Some(MOST));
    }

    #[test]
    fn output_to_a_full_pipe_gives_up_once_the_guest_ends() {
        let (output, reader, exit) = output();
        let mut port = output.port();
        rustix::io::ioctl_fionbio(&output.target.lock().unwrap().file, true).unwrap();
        let blocked = thread::spawn(move || {
            while !port.0.target.lock().unwrap().given_up {
                port.write_all(&[b'x'; MOST]).unwrap();
                port.0.send_if_due();
            }
        });
        exit.request(Exit::PowerOff);
        blocked.join().unwrap();
        assert!(!read(&reader).is_empty());
        assert_eq!(output.lost().bytes.load(Ordering::Relaxed), 0);
    }
}
