//! Follows QEMU to its end, in the event loop of one thread: its monitor, signals, and the clients of the QMP sockets.
//!
//! A guest of `--kernel` ends in the same ways as in the native monitor, and with the same status ([`Guest`]). A QEMU
//! whose machine is that of ARGS gets the signals passed on, and ends by itself.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitStatus;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use serde_json::Value;
use signal_hook::consts::{SIGCHLD, SIGWINCH};

use super::guest::Guest;
use super::monitor::Monitor;
use crate::child::{Arrivals, Child};
use crate::control::exit::{Exit, ExitRequest};
use crate::events::{Event, EventHub, Stamped};

// Event tokens.
const MONITOR: u32 = 0;
const SIGNAL: u32 = 1;
const KEY: u32 = 2;
/// The most pieces of what QEMU says at once: the signals come between them.
const PIECES: usize = 16;

/// QEMU, as it is followed.
pub(super) struct Control {
    qemu: Child,
    monitor: Rc<RefCell<Monitor>>,
    signals: Arrivals,
    /// That of `--kernel`.
    guest: Option<Guest>,
    /// Where a key of the terminal's ends that.
    keys: Option<Arc<ExitRequest>>,
    events: Arc<EventHub>,
    /// What is done once QEMU has said what the guest does.
    started: Option<Begun>,
}

/// Done once; QEMU is killed if it fails.
pub(super) type Begun = Box<dyn FnOnce() -> io::Result<()>>;

impl Control {
    /// Of a QEMU that runs. Take `signals` before it is started, so that none is missed.
    pub fn new(
        qemu: Child,
        monitor: Rc<RefCell<Monitor>>,
        signals: Arrivals,
        guest: Option<Guest>,
        keys: Option<Arc<ExitRequest>>,
        events: Arc<EventHub>,
    ) -> Self {
        Self {
            qemu,
            monitor,
            signals,
            guest,
            keys,
            events,
            started: None,
        }
    }

    /// Has `started` done once the guest is there.
    pub fn when_started(mut self, started: Begun) -> Self {
        self.started = Some(started);
        self
    }

    /// Follows QEMU to its end, and lets `others` have their events meanwhile. Without an [`Exit`] QEMU has ended of itself: its
    /// status then counts.
    pub fn run(
        self,
        others: Vec<Box<dyn MutEventSubscriber>>,
    ) -> io::Result<(Option<Exit>, ExitStatus)> {
        let failed = |error| io::Error::other(format!("{error}"));
        let mut watched = self.monitor.borrow().interest();
        let control = Rc::new(RefCell::new(self));
        let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new().map_err(failed)?;
        let id = events.add_subscriber(Box::new(Rc::clone(&control)));
        for other in others {
            events.add_subscriber(other);
        }
        let status = loop {
            let timeout = control.borrow().timeout();
            match events.run_with_timeout(timeout) {
                Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EINTR => {}
                result => drop(result.map_err(failed)?),
            }
            let mut control = control.borrow_mut();
            if let Some(status) = control.end()? {
                break status;
            }
            let mut ops = events.event_ops(id).map_err(failed)?;
            control.watch(&mut watched, &mut ops).map_err(failed)?;
        };
        let mut control = control.borrow_mut();
        control.listen_to_the_end();
        // Its clients get the last results and events.
        drop(events);
        Ok((control.guest.take().and_then(Guest::exit), status))
    }

    /// How long nothing else is done, in milliseconds; rounded up, so that it is over then.
    fn timeout(&self) -> i32 {
        let deadline = self.guest.as_ref().and_then(|guest| guest.deadline);
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        left.map_or(-1, |left| {
            i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
        })
    }

    /// Whether QEMU has ended, or has to.
    fn end(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.monitor.borrow().has_begun()
            && let Some(started) = self.started.take()
        {
            started()?;
        }
        if let Some(guest) = &mut self.guest {
            if guest.deadline.is_some_and(|at| at <= Instant::now()) {
                guest.be_late();
            }
            if guest.is_gone() {
                return self.qemu.kill().map(Some);
            }
        }
        self.qemu.try_wait()
    }

    /// Has the monitor watched for what it is waited for now: clients' commands have come since.
    fn watch(
        &self,
        watched: &mut Option<EventSet>,
        ops: &mut EventOps,
    ) -> event_manager::Result<()> {
        let monitor = self.monitor.borrow();
        let wanted = monitor.interest();
        if wanted == *watched {
            return Ok(());
        }
        *watched = wanted;
        let set = wanted.unwrap_or(EventSet::empty());
        let events = Events::with_data(monitor.socket(), MONITOR, set);
        match wanted {
            Some(_) => ops.modify(events),
            None => ops.remove(events),
        }
    }

    /// Acts on what QEMU says.
    fn listen(&mut self) {
        for _ in 0..PIECES {
            let Some(messages) = self.monitor.borrow_mut().receive() else {
                return;
            };
            for message in messages {
                let is_public = match &mut self.guest {
                    Some(guest) => guest.message(&message),
                    None => true,
                };
                if let (true, Some(event)) = (is_public, event(message)) {
                    self.events.publish_stamped(event);
                }
            }
        }
    }

    /// QEMU has ended, and what it has said before may still be there.
    fn listen_to_the_end(&mut self) {
        self.listen();
        self.monitor.borrow_mut().close();
    }

    fn take_signals(&mut self) {
        for signal in self.signals.take() {
            match (signal, &mut self.guest) {
                // QEMU's end, or a stop of it.
                (SIGCHLD | SIGWINCH, _) => {}
                (_, Some(guest)) => guest.signal(signal),
                (_, None) => self.qemu.signal(signal),
            }
        }
    }
}

/// An event of QEMU's, with its time.
fn event(mut message: Value) -> Option<Stamped> {
    let name = message["event"].as_str()?.to_owned();
    let part = |key: &str| message["timestamp"][key].as_u64();
    // Where the host has no time, QEMU says -1.
    let since = Duration::from_secs(part("seconds").unwrap_or_default())
        + Duration::from_micros(part("microseconds").unwrap_or_default());
    let data = message["data"].take();
    Some(Stamped {
        time: UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH),
        event: Event::Other { name, data },
    })
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        let monitor = self.monitor.borrow();
        let interest = monitor.interest().unwrap_or(EventSet::empty());
        let mut all = vec![
            (monitor.socket().as_raw_fd(), MONITOR, interest),
            (self.signals.as_fd().as_raw_fd(), SIGNAL, EventSet::IN),
        ];
        let keys = self.keys.iter();
        all.extend(keys.map(|exit| (exit.event().as_raw_fd(), KEY, EventSet::IN)));
        for (fd, token, interest) in all {
            if let Err(error) = ops.add(Events::with_data_raw(fd, token, interest)) {
                log::warn!("cannot follow QEMU: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            MONITOR => {
                self.monitor.borrow_mut().send();
                self.listen();
            }
            SIGNAL => self.take_signals(),
            _ => {
                if let Some(keys) = &self.keys {
                    let _ = keys.event().read();
                }
                if let Some(guest) = &mut self.guest {
                    guest.end_from_terminal();
                }
            }
        }
    }
}
