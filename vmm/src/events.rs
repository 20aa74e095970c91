//! What happens to a guest, as it happens: for QMP's clients and other programs.
//!
//! Any thread [publishes](EventHub::publish), and never waits; each [`Subscription`] has a bounded
//! queue of its own, so that a slow reader loses its own events alone.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use net::MacAddr;
use serde_json::{Value, json};
use vmm_sys_util::eventfd::EventFd;

use crate::control::exit::Exit;

/// The most events that wait for one subscriber.
const MOST: usize = 1024;

/// Something that has happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Nothing of the guest runs.
    Stop,
    /// It runs again.
    Resume,
    /// Its power button was pressed.
    Powerdown,
    /// It was reset, and begins again.
    Reset {
        /// The guest has asked for it.
        guest: bool,
        /// Why, in QEMU's words (ShutdownCause).
        reason: &'static str,
    },
    /// Its kernel panicked.
    GuestPanicked,
    /// It ends, or asks for it where it is the guest.
    Shutdown {
        /// The guest has asked for it.
        guest: bool,
        /// Why, in QEMU's words (ShutdownCause).
        reason: &'static str,
    },
    /// The guest has shown an address of its that was not known, or no longer.
    Address {
        /// The name of the NIC.
        nic: String,
        /// The NIC's MAC address, if it has a proper one.
        mac: Option<MacAddr>,
        /// The address.
        address: IpAddr,
    },
    /// QEMU says so.
    Other {
        /// Its name in QMP.
        name: String,
        /// Null where it has none.
        data: Value,
    },
}

impl Event {
    /// What there is to publish of a guest's end.
    pub fn of_exit(exit: &Exit) -> Vec<Self> {
        let (guest, reason) = match exit {
            Exit::PowerOff => (true, "guest-shutdown"),
            Exit::Reboot => (true, "guest-reset"),
            Exit::Panic => (true, "guest-panic"),
            Exit::Quit => (false, "host-qmp-quit"),
            Exit::Terminal => (false, "host-ui"),
            Exit::Signal(_) => (false, "host-signal"),
            Exit::Crash(_) | Exit::InternalError | Exit::Failure(_) => (false, "host-error"),
        };
        let panicked = (*exit == Exit::Panic).then_some(Self::GuestPanicked);
        let shutdown = Self::Shutdown { guest, reason };
        panicked.into_iter().chain([shutdown]).collect()
    }

    /// Its name and data in QMP (docs/interop/qmp-spec and qapi/run-state.json of QEMU).
    pub fn qmp(&self) -> Option<(&str, Value)> {
        Some(match self {
            Self::Stop => ("STOP", Value::Null),
            Self::Resume => ("RESUME", Value::Null),
            Self::Powerdown => ("POWERDOWN", Value::Null),
            Self::Reset { guest, reason } => ("RESET", json!({"guest": guest, "reason": reason})),
            Self::GuestPanicked => ("GUEST_PANICKED", json!({"action": "shutdown"})),
            Self::Shutdown { guest, reason } => {
                ("SHUTDOWN", json!({"guest": guest, "reason": reason}))
            }
            Self::Address { nic, mac, address } => (
                "X_MINIVMM_ADDRESS",
                json!({"nic": nic, "mac": mac, "address": address}),
            ),
            Self::Other { name, data } => (name, data.clone()),
        })
    }
}

/// An event and its time.
#[derive(Clone, Debug)]
pub struct Stamped {
    /// When it was published.
    pub time: SystemTime,
    /// What has happened.
    pub event: Event,
}

/// Where a VM's events are published.
#[derive(Debug, Default)]
pub struct EventHub(Mutex<Vec<Arc<Subscription>>>);

impl EventHub {
    /// Gives an event to all who have subscribed.
    pub fn publish(&self, event: Event) {
        self.publish_stamped(Stamped {
            time: SystemTime::now(),
            event,
        });
    }

    /// Gives one that another monitor has published before.
    pub fn publish_stamped(&self, stamped: Stamped) {
        for subscription in lock(&self.0).iter() {
            subscription.push(stamped.clone());
        }
    }

    /// Has all further events kept for the caller.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn subscribe(&self) -> io::Result<Arc<Subscription>> {
        let subscription = Arc::new(Subscription {
            waiting: Mutex::default(),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        });
        lock(&self.0).push(Arc::clone(&subscription));
        Ok(subscription)
    }
}

/// The events that wait for one subscriber.
#[derive(Debug)]
pub struct Subscription {
    waiting: Mutex<Waiting>,
    event: EventFd,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<Stamped>,
    /// Events that found no room since the last that was taken.
    lost: u64,
}

impl Subscription {
    fn push(&self, stamped: Stamped) {
        let mut waiting = lock(&self.waiting);
        if waiting.events.len() < MOST {
            waiting.events.push_back(stamped);
        } else {
            waiting.lost += 1;
        }
        let _ = self.event.write(1);
    }

    /// Readable while events wait.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The events that wait, the oldest first, and how many found no room after them.
    pub fn take(&self) -> (VecDeque<Stamped>, u64) {
        let _ = self.event.read();
        let waiting = mem::take(&mut *lock(&self.waiting));
        (waiting.events, waiting.lost)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subscriber_that_takes_nothing_loses_its_own_events_alone() {
        let hub = EventHub::default();
        let (slow, quick) = (hub.subscribe().unwrap(), hub.subscribe().unwrap());
        for _ in 0..MOST + 3 {
            hub.publish(Event::Stop);
            assert_eq!(quick.take().0.len(), 1);
        }
        let (events, lost) = slow.take();
        assert_eq!((events.len(), lost), (MOST, 3));
        assert_eq!(slow.take().1, 0);
    }

    #[test]
    fn panic_is_published_before_the_shutdown() {
        let names = |exit: Exit| {
            let events = Event::of_exit(&exit);
            let name = |event: &Event| event.qmp().unwrap().0.to_owned();
            events.iter().map(name).collect::<Vec<_>>()
        };
        assert_eq!(names(Exit::Panic), ["GUEST_PANICKED", "SHUTDOWN"]);
        assert_eq!(names(Exit::PowerOff), ["SHUTDOWN"]);
    }
}
