//! A program that serves a device of the guest, in a process of its own.
//!
//! It ends with minivmm, whichever way that ends, and has a session of its own, so that the keys of a terminal that
//! end a guest reach minivmm alone. While the guest runs the control thread logs what it says, and its end.

use std::cell::RefCell;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::events::{DeviceEvent, EventSink};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, pidfd_open, setsid};

use crate::child::{Leash, Passed, close_on_exec};
use crate::limits;
use crate::printable::printable;
use crate::signals;

/// How much is kept of what a program said last.
const KEPT: usize = 4096;
/// How much of it is read at a time, so that one that says much holds nothing else up.
const AT_ONCE: usize = 4096;

// Event tokens.
const SAID: u32 = 0;
const ENDED: u32 = 1;

/// Why a program does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// It cannot be started.
    #[error("cannot start {0}")]
    Start(String, #[source] io::Error),
    /// It has ended.
    #[error("{name} has ended ({status}){}", quoted(.said))]
    Ended {
        /// What it is called.
        name: String,
        /// Its status.
        status: ExitStatus,
        /// What it said last.
        said: String,
    },
    /// It runs, but did not get ready. It is killed when dropped.
    #[error("{name} was not ready in {} s{}", .limit.as_secs(), quoted(.said))]
    Slow {
        /// What it is called.
        name: String,
        /// How long it had.
        limit: Duration,
        /// What it said last.
        said: String,
    },
}

/// What a program said, as the end of a sentence.
fn quoted(said: &str) -> String {
    let lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<_> = lines.collect();
    match lines.is_empty() {
        true => String::new(),
        false => format!(": {}", printable(&lines.join("; "))),
    }
}

/// Those that are to be dropped after the devices, for which they serve; the control thread follows them too.
pub type Services = Vec<Rc<RefCell<Service>>>;

/// A program that runs. Dropped, it is killed.
#[derive(Debug)]
pub struct Service {
    name: String,
    process: Child,
    /// Readable when it has ended.
    pidfd: OwnedFd,
    /// What it writes to stdout and stderr; non-blocking.
    output: PipeReader,
    said: Vec<u8>,
    /// The end of `said` that no line has been logged of.
    unlogged: usize,
    /// How long it may take to end by itself.
    grace: Duration,
    /// The tag of the share that it serves, and where its failure is reported.
    share: Option<(String, EventSink)>,
    /// The kernel kills it with minivmm.
    _leash: Arc<Leash>,
}

impl Service {
    /// Starts `command`, which finds the descriptors of `placed` under the numbers beside them, and no others but the
    /// standard ones.
    ///
    /// The kernel kills it when minivmm ends, whoever it has become and whatever it does then.
    ///
    /// # Errors
    ///
    /// See [`ServiceError::Start`].
    pub fn start(
        name: impl Into<String>,
        command: Command,
        placed: Vec<(RawFd, OwnedFd)>,
    ) -> Result<Self, ServiceError> {
        let name = name.into();
        Self::spawn(&name, command, placed).map_err(|error| ServiceError::Start(name, error))
    }

    fn spawn(name: &str, mut command: Command, placed: Vec<(RawFd, OwnedFd)>) -> io::Result<Self> {
        let (output, its) = io::pipe()?;
        rustix::io::ioctl_fionbio(&output, true)?;
        command.stdin(Stdio::null());
        command.stdout(its.try_clone()?).stderr(its);
        let (leash, passed) = (Arc::new(Leash::new()?), Passed::new(placed, Vec::new())?);
        let its_leash = Arc::clone(&leash);
        let enter = move || {
            setsid()?;
            close_on_exec();
            its_leash.take()?;
            passed.place()?;
            limits::restore()?;
            signals::restore()
        };
        // SAFETY: what runs between fork and exec makes system calls alone: it allocates nothing and takes no lock.
        unsafe { command.pre_exec(enter) };
        let mut process = command.spawn()?;
        let pidfd = pidfd_open(Pid::from_child(&process), PidfdFlags::empty());
        let pidfd = pidfd.inspect_err(|_| {
            let _ = process.kill();
            let _ = process.wait();
        });
        Ok(Self {
            name: name.to_owned(),
            pidfd: pidfd?,
            process,
            output,
            said: Vec::new(),
            unlogged: 0,
            grace: Duration::ZERO,
            share: None,
            _leash: leash,
        })
    }

    /// Dropped, it is killed only if it has not ended by itself for so long: it ends with its connection, and may have something
    /// left to do that came by it.
    pub fn set_grace(&mut self, grace: Duration) {
        self.grace = grace;
    }

    /// Should it fail while it is followed, the share with this tag is reported to have failed. The native device does so by
    /// itself.
    pub fn report_share(&mut self, tag: &str, events: EventSink) {
        self.share = Some((tag.to_owned(), events));
    }

    /// Waits for bytes in `ready`, a pipe or a socket, which the program has the other end of.
    ///
    /// # Errors
    ///
    /// The program ends, or takes longer than `limit`.
    pub fn wait_ready(
        &mut self,
        ready: BorrowedFd<'_>,
        limit: Duration,
    ) -> Result<(), ServiceError> {
        let deadline = Instant::now() + limit;
        // What has been closed would be ready for ever.
        let (mut waits, mut speaks) = (true, true);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = vec![PollFd::new(&self.pidfd, PollFlags::IN)];
            fds.extend(speaks.then(|| PollFd::new(&self.output, PollFlags::IN)));
            fds.extend(waits.then(|| PollFd::from_borrowed_fd(ready, PollFlags::IN)));
            let _ = poll(&mut fds, Some(&timespec(left)));
            let has_event = |fd: Option<&PollFd<'_>>| fd.is_some_and(|fd| !fd.revents().is_empty());
            let (has_ended, is_ready) = (has_event(fds.first()), waits && has_event(fds.last()));
            if is_ready && rustix::io::ioctl_fionread(ready).is_ok_and(|len| len > 0) {
                return Ok(());
            }
            // Closed without a word: its end follows.
            waits &= !is_ready;
            speaks &= !matches!(self.read(), Ok(0));
            if has_ended {
                return Err(self.has_ended());
            }
            if left.is_zero() {
                return Err(ServiceError::Slow {
                    name: self.name.clone(),
                    limit,
                    said: self.said(),
                });
            }
        }
    }

    /// The end of a program that is known to have ended.
    fn has_ended(&mut self) -> ServiceError {
        while matches!(self.read(), Ok(1..)) {}
        let (name, said) = (self.name.clone(), self.said());
        match self.process.wait() {
            Ok(status) => ServiceError::Ended { name, status, said },
            Err(error) => ServiceError::Start(name, error),
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Readable when it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// What it said last, as it was read.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&self.said).into_owned()
    }

    /// Reads a piece of what it says.
    fn read(&mut self) -> io::Result<usize> {
        let mut piece = [0; AT_ONCE];
        let len = self.output.read(&mut piece)?;
        self.said.extend_from_slice(&piece[..len]);
        self.unlogged += len;
        let surplus = self.said.len().saturating_sub(KEPT);
        self.said.drain(..surplus);
        self.unlogged = self.unlogged.min(KEPT);
        Ok(len)
    }

    /// Logs the lines that are whole, or with `all` the last one too.
    fn log(&mut self, all: bool) {
        let text = &self.said[self.said.len() - self.unlogged..];
        let newline = text.iter().rposition(|byte| *byte == b'\n');
        let end = match newline {
            _ if all || text.len() == KEPT => text.len(),
            Some(at) => at + 1,
            None => return,
        };
        for line in String::from_utf8_lossy(&text[..end]).lines() {
            log::debug!("{}: {line}", self.name);
        }
        self.unlogged -= end;
    }
}

impl MutEventSubscriber for Service {
    fn init(&mut self, ops: &mut EventOps) {
        for (fd, token) in [(self.output.as_fd(), SAID), (self.pidfd.as_fd(), ENDED)] {
            let events = Events::with_data_raw(fd.as_raw_fd(), token, EventSet::IN);
            if let Err(error) = ops.add(events) {
                log::warn!("cannot follow {}: {error}", self.name);
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            SAID => match self.read() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Closed, whether it has ended or not.
                Ok(0) | Err(_) => {
                    let _ = ops.remove(events);
                }
                Ok(_) => self.log(false),
            },
            _ => {
                let _ = ops.remove(events);
                let end = self.has_ended();
                self.log(true);
                match &end {
                    // The machine has closed its connection, and ends.
                    ServiceError::Ended { status, .. } if status.success() => log::debug!("{end}"),
                    _ => {
                        log::error!("{end}");
                        if let Some((tag, events)) = self.share.take() {
                            let reason = end.to_string();
                            events.report(DeviceEvent::ShareFailed { tag, reason });
                        }
                    }
                }
            }
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs() as i64,
        tv_nsec: duration.subsec_nanos().into(),
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let mut ended = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let _ = retry_on_intr(|| poll(&mut ended, Some(&timespec(self.grace))));
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// A shell that runs `script`, with a socket as its descriptor 5, and the other end.
    fn shell(script: &str) -> (Service, UnixStream) {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let (ours, its) = UnixStream::pair().unwrap();
        let service = Service::start("a shell", command, vec![(5, its.into())]).unwrap();
        (service, ours)
    }

    /// What a program said that ends by itself.
    fn last_words(service: &mut Service, ours: &UnixStream) -> String {
        match service.wait_ready(ours.as_fd(), LONG).unwrap_err() {
            ServiceError::Ended { said, .. } => said,
            error => panic!("{error}"),
        }
    }

    #[test]
    fn program_is_ready_when_it_says_so() {
        // More than a pipe holds before that.
        let (mut service, ours) = shell("seq 20000; echo >&5; exec sleep 1000");
        service.wait_ready(ours.as_fd(), LONG).unwrap();
    }

    #[test]
    fn program_that_ends_at_its_start_is_quoted() {
        // Which is more than a pipe holds.
        for ready in ["", "exec 5>&-;"] {
            let script = format!("{ready} seq 20000; echo 'no such port' >&2; exit 3");
            let (mut service, ours) = shell(&script);
            let error = service.wait_ready(ours.as_fd(), LONG).unwrap_err();
            let text = error.to_string();
            let begin = "a shell has ended (exit status: 3): ";
            assert!(text.starts_with(begin), "{text}");
            assert!(text.ends_with("; 19999; 20000; no such port"), "{text}");
            assert!(text.len() < 2 * KEPT + 100, "{text}");
        }
    }

    #[test]
    fn program_that_does_not_get_ready_is_killed_when_dropped() {
        let (mut service, ours) = shell("exec sleep 1000");
        let limit = Duration::from_millis(50);
        let error = service.wait_ready(ours.as_fd(), limit).unwrap_err();
        assert!(matches!(error, ServiceError::Slow { .. }), "{error}");
        drop(service);
        // Its end of the socket went with it.
        assert_eq!((&ours).read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn program_with_a_grace_ends_by_itself() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        // It ends with its connection, some time later.
        let script = format!(
            "echo >&5; read end <&5; sleep 0.2; echo done > {:?}",
            file.path()
        );
        let (mut service, ours) = shell(&script);
        service.wait_ready(ours.as_fd(), LONG).unwrap();
        service.set_grace(LONG);
        drop(ours);
        drop(service);
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "done\n");
        let (mut service, _ours) = shell("exec sleep 1000");
        service.set_grace(Duration::from_millis(50));
        drop(service);
    }

    #[test]
    fn program_has_a_session_of_its_own() {
        let (mut service, ours) = shell("ps -o sid= -p $$; echo $$");
        let said = last_words(&mut service, &ours);
        let mut said = said.split_whitespace();
        let session = said.next().unwrap();
        assert_eq!(said.next(), Some(session));
    }

    #[test]
    fn program_has_the_descriptors_that_are_meant() {
        let mut command = Command::new("ls");
        command.arg("/proc/self/fd");
        let (ours, its) = UnixStream::pair().unwrap();
        let mut service = Service::start("ls", command, vec![(5, its.into())]).unwrap();
        let said = last_words(&mut service, &ours);
        // 3 is the directory.
        let said: Vec<_> = said.split_whitespace().collect();
        assert_eq!(said, ["0", "1", "2", "3", "5"]);
    }

    #[test]
    fn program_that_cannot_be_started_is_named() {
        let error = Service::start("passt", Command::new("/nonexistent"), Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "cannot start passt");
    }
}
