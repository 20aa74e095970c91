//! What becomes known of a VM while it runs: by its events, by the boot connection of its guest, and by its end.
//!
//! A thread follows them and keeps the last of each, so that a guest that says a lot makes nothing grow.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use agent_protocol::boot::{FromInit, NicStatus, Part, ToInit, Uptime, Usage};
use agent_protocol::{Inbox, VERSION};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{RecvFlags, recv};
use rustix::process::{Signal, pidfd_send_signal};
use serde_json::Value;

use crate::printable::printable;

/// How much is read at once.
const PIECE: usize = 16 << 10;
/// The most bytes of a line of events.
const LONGEST_EVENT: usize = 1 << 20;
/// The most stages and warnings of a guest that are kept.
const MOST: usize = 64;
/// How long a guest may take to read a message.
const TO_READ: Duration = Duration::from_secs(5);

/// What is followed.
pub struct Followed {
    pub child: Child,
    /// Of that process.
    pub pidfd: Arc<OwnedFd>,
    pub events: io::PipeReader,
    /// The boot socket, on which the VM's process listens once it has started; none without it.
    pub boot: Option<UnixListener>,
}

/// What is known.
#[derive(Debug, Default)]
pub struct Known {
    /// The VM's name.
    pub name: Option<String>,
    /// When its vCPUs ran first.
    pub started: Option<Instant>,
    /// The MAC addresses of its NICs, and whether they are on a macvtap.
    pub nics: Vec<(bool, [u8; 6])>,
    /// The release of the kernel, when the guest's init says that it runs.
    pub kernel: Option<String>,
    /// The stages of the guest's boot.
    pub stages: Vec<(String, Uptime)>,
    /// What its init warns of.
    pub warnings: Vec<String>,
    /// Where it wants its archive unpacked.
    pub unpack: Option<Vec<u8>>,
    /// Whether that is done, or why it cannot be.
    pub unpacked: Option<Result<(), String>>,
    /// Its NICs, when it is ready.
    pub ready: Option<Vec<NicStatus>>,
    /// What its init cannot do.
    pub failed: Option<(Part, String)>,
    /// What it has used until its end.
    pub usage: Option<Usage>,
    /// A share is served no more, which has ended the VM.
    pub unserved: Option<String>,
    /// Why the boot connection is no more.
    pub lost: Option<&'static str>,
    /// When the init said something last.
    pub said: Option<Instant>,
    /// Someone has pressed the power button.
    pub is_power_off_wanted: bool,
    /// How the VM's process says that it has ended.
    pub exit: Option<VmExit>,
    /// Its end.
    pub ended: Option<ExitStatus>,
}

/// The event `exit` (docs/events.md).
#[derive(Clone, Debug, Default)]
pub struct VmExit {
    /// In one word.
    pub reason: String,
    /// For people.
    pub text: String,
}

/// What the thread and its reader share.
#[derive(Debug)]
pub struct Shared {
    known: Mutex<Known>,
    changed: Condvar,
    news: OwnedFd,
    /// The boot connection.
    boot: Mutex<Option<UnixStream>>,
}

impl Shared {
    /// Follows a VM on a thread of its own.
    ///
    /// # Errors
    ///
    /// When there can be no thread, or descriptor.
    pub fn follow(followed: Followed) -> io::Result<Arc<Self>> {
        let shared = Arc::new(Self {
            known: Mutex::default(),
            changed: Condvar::new(),
            news: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            boot: Mutex::default(),
        });
        let mut follower = Follower {
            shared: Arc::clone(&shared),
            followed,
            line: Vec::new(),
            guest: None,
        };
        ioctl_fionbio(&follower.followed.events, true)?;
        let builder = thread::Builder::new().name("vm".into());
        builder.spawn(move || follower.run())?;
        Ok(shared)
    }

    /// What is known now.
    pub fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when more is known since [`Shared::take_news`].
    pub fn news(&self) -> BorrowedFd<'_> {
        self.news.as_fd()
    }

    /// To be called before one looks.
    pub fn take_news(&self) {
        let _ = rustix::io::read(&self.news, &mut [0; 8]);
    }

    /// Waits until something is so, or `patience` is over; whether it is.
    pub fn wait_until(&self, patience: Duration, is_so: impl Fn(&Known) -> bool) -> bool {
        let waits = |known: &mut Known| !is_so(known);
        let waited = self
            .changed
            .wait_timeout_while(self.known(), patience, waits);
        let (known, _) = waited.unwrap_or_else(PoisonError::into_inner);
        is_so(&known)
    }

    /// Says something to the guest's init, if that is connected.
    pub fn send(&self, message: &ToInit) {
        let boot = self.boot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = &*boot
            && let Err(error) = agent_protocol::write(stream, message)
        {
            log::debug!("cannot write to the guest's init: {error}");
        }
    }

    /// Changes what is known.
    pub fn change(&self, change: impl FnOnce(&mut Known)) {
        change(&mut self.known());
        self.changed.notify_all();
        let _ = rustix::io::write(&self.news, &1u64.to_ne_bytes());
    }
}

/// The thread.
struct Follower {
    shared: Arc<Shared>,
    followed: Followed,
    /// The beginning of an event's line.
    line: Vec<u8>,
    guest: Option<(UnixStream, Inbox)>,
}

impl Follower {
    fn run(&mut self) {
        let mut has_events = true;
        loop {
            let [event, guest, end] = match self.wait(has_events) {
                Ok(ready) => ready,
                Err(error) => {
                    log::warn!("cannot follow the VM: {error}");
                    break;
                }
            };
            if event {
                has_events = self.read_events();
            }
            match guest {
                true if self.guest.is_some() => self.read_guest(),
                true => self.accept(),
                false => {}
            }
            if end {
                break;
            }
        }
        // All that it has written is there.
        if has_events {
            self.read_events();
        }
        self.read_guest();
        let ended = self.followed.child.wait().unwrap_or_default();
        self.shared.change(|known| known.ended = Some(ended));
    }

    /// Waits for events, the guest and the end; which of them there is.
    fn wait(&self, has_events: bool) -> io::Result<[bool; 3]> {
        let is_started = self.shared.known().started.is_some();
        let guest = match &self.guest {
            Some((stream, _)) => Some(stream.as_fd()),
            None => {
                let boot = self.followed.boot.as_ref();
                boot.filter(|_| is_started).map(AsFd::as_fd)
            }
        };
        let mut fds = vec![PollFd::new(&self.followed.pidfd, PollFlags::IN)];
        if has_events {
            fds.push(PollFd::new(&self.followed.events, PollFlags::IN));
        }
        fds.extend(guest.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let is_ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        let at_guest = 1 + usize::from(has_events);
        Ok([
            has_events && is_ready(1),
            guest.is_some() && is_ready(at_guest),
            is_ready(0),
        ])
    }

    /// Reads the events that there are; whether there may be others.
    fn read_events(&mut self) -> bool {
        let mut piece = vec![0; PIECE];
        loop {
            let length = match self.followed.events.read(&mut piece) {
                Ok(0) => return false,
                Ok(length) => length,
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            };
            for byte in &piece[..length] {
                match byte {
                    b'\n' => {
                        if let Ok(event) = serde_json::from_slice(&self.line) {
                            self.event(&event);
                        }
                        self.line.clear();
                    }
                    _ if self.line.len() < LONGEST_EVENT => self.line.push(*byte),
                    _ => {}
                }
            }
        }
    }

    fn event(&mut self, event: &Value) {
        let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
        match event["event"].as_str() {
            Some("started") => self.shared.change(|known| {
                known.name = event["name"].as_str().map(str::to_owned);
                known.started = Some(Instant::now());
                let nics = event["nics"].as_array().into_iter().flatten();
                known.nics = nics.filter_map(nic).collect();
            }),
            Some("power-button") => {
                self.shared.change(|known| known.is_power_off_wanted = true);
                self.shared.send(&ToInit::PowerOff);
            }
            // What the guest makes of that says nothing of its command, and in QEMU it waits for ever.
            Some("share-failed") => {
                let why = format!("the share {} has failed: {}", text("tag"), text("reason"));
                self.shared.change(|known| {
                    known.unserved.get_or_insert(why);
                });
                end_at_once(&self.followed.pidfd);
            }
            Some("exit") => self.shared.change(|known| {
                known.exit = Some(VmExit {
                    reason: text("reason"),
                    text: text("text"),
                });
            }),
            _ => {}
        }
    }

    /// Takes the guest's one connection.
    fn accept(&mut self) {
        let Some(listener) = self.followed.boot.take() else {
            return;
        };
        let accepted = listener.accept().and_then(|(stream, _)| {
            stream.set_write_timeout(Some(TO_READ))?;
            let copy = stream.try_clone()?;
            Ok((stream, copy))
        });
        match accepted {
            Ok((stream, copy)) => {
                let mut boot = self
                    .shared
                    .boot
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                *boot = Some(copy);
                self.guest = Some((stream, Inbox::default()));
            }
            Err(error) => {
                log::warn!("cannot accept the guest's connection: {error}");
                self.lose("the guest's connection cannot be accepted");
            }
        }
    }

    /// Reads what the guest's init says, as much as there is up to a piece.
    fn read_guest(&mut self) {
        let Some((stream, inbox)) = &mut self.guest else {
            return;
        };
        let mut piece = vec![0; PIECE];
        let length = match recv(&*stream, &mut piece[..], RecvFlags::DONTWAIT) {
            Ok((length, _)) => length,
            Err(Errno::AGAIN | Errno::INTR) => return,
            Err(_) => 0,
        };
        if length == 0 {
            return self.lose("the guest's init has closed its connection");
        }
        inbox.add(&piece[..length]);
        loop {
            let Some((_, inbox)) = &mut self.guest else {
                return;
            };
            match inbox.take() {
                Ok(Some(message)) => self.message(message),
                Ok(None) => return,
                Err(_) => return self.lose("what the guest's init says has another form"),
            }
        }
    }

    fn message(&mut self, message: FromInit) {
        let version = match &message {
            FromInit::Hello { version, .. } => *version,
            _ => VERSION,
        };
        if version != VERSION {
            return self.lose("the guest's init is of another version of minivmm");
        }
        let has_ended = matches!(message, FromInit::Ended(_));
        self.shared.change(|known| {
            known.said = Some(Instant::now());
            known.take(message);
        });
        // The guest powers off as soon as its connection is closed.
        if has_ended {
            self.close();
        }
    }

    fn close(&mut self) {
        self.guest = None;
        *self
            .shared
            .boot
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn lose(&mut self, why: &'static str) {
        self.close();
        self.shared.change(|known| {
            known.lost.get_or_insert(why);
        });
    }
}

impl Known {
    /// Takes what the guest's init says, of which no one knows whether it is true.
    fn take(&mut self, message: FromInit) {
        match message {
            FromInit::Hello { kernel, at, .. } => {
                self.kernel
                    .get_or_insert_with(|| printable(&kernel).into_owned());
                add(&mut self.stages, ("connected".into(), at));
            }
            FromInit::Stage { name, at } => {
                add(&mut self.stages, (printable(&name).into_owned(), at));
            }
            FromInit::Warning(text) => {
                log::warn!("the guest: {text}");
                self.warn(printable(&text).into_owned());
            }
            FromInit::Ready { nics, at } => {
                add(&mut self.stages, ("ready".into(), at));
                self.ready.get_or_insert(nics);
            }
            FromInit::Failed { part, text } => {
                let text = printable(&text).into_owned();
                self.failed.get_or_insert((part, text));
            }
            FromInit::Unpack { path } => {
                self.unpack.get_or_insert(path);
            }
            FromInit::Ended(usage) => self.usage = Some(usage),
        }
    }
}

impl Known {
    /// Adds to what the user should know.
    pub fn warn(&mut self, warning: String) {
        add(&mut self.warnings, warning);
    }
}

/// Ends the VM of this process by its own means: the first signal presses the power button, the second ends it.
pub fn end_at_once(pidfd: &OwnedFd) {
    for signal in [Signal::TERM, Signal::INT] {
        let _ = pidfd_send_signal(pidfd, signal);
    }
}

/// Adds to what is kept, unless there is too much of it.
fn add<T>(kept: &mut Vec<T>, new: T) {
    if kept.len() < MOST {
        kept.push(new);
    }
}

/// A NIC of the event `started`.
fn nic(nic: &Value) -> Option<(bool, [u8; 6])> {
    let bytes = nic["mac"].as_str()?.split(':');
    let bytes = bytes.map(|byte| u8::from_str_radix(byte, 16).ok());
    let mac: Vec<u8> = bytes.collect::<Option<_>>()?;
    Some((nic["tap"].is_string(), mac.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_that_says_a_lot_makes_nothing_grow() {
        let mut known = Known::default();
        for n in 0..10_000 {
            let name = format!("\x1b{n}");
            known.take(FromInit::Stage { name, at: n });
            known.take(FromInit::Failed {
                part: Part::Root,
                text: n.to_string(),
            });
        }
        assert_eq!(known.stages.len(), MOST);
        assert_eq!(known.stages[1].0, "\\u{1b}1");
        // The first counts.
        assert_eq!(known.failed, Some((Part::Root, "0".into())));
    }

    #[test]
    fn nics_of_an_event_differ_by_their_macvtap() {
        let read = |text: &str| nic(&serde_json::from_str(text).unwrap());
        let mac = [0x52, 0x54, 0, 1, 2, 3];
        let tap = r#"{"nic":"net0","mac":"52:54:00:01:02:03","tap":"macvtap0"}"#;
        assert_eq!(read(tap), Some((true, mac)));
        assert_eq!(read(r#"{"mac":"52:54:00:01:02:03"}"#), Some((false, mac)));
        assert_eq!(read(r#"{"mac":"x"}"#), None);
    }
}
