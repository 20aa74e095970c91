//! What happens to a guest, as it happens: for QMP's clients and other programs.
//!
//! Any thread [publishes](EventHub::publish), and never waits; each [`Subscription`] has a bounded
//! queue of its own, so that a slow reader loses its own events alone. [`writer`] has the lines of
//! `--events`.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use devices::events::{DeviceEvent, EventSink, IoError};
use net::MacAddr;
use serde_json::{Value, json};
use vmm_sys_util::eventfd::EventFd;

use crate::control::exit::{Exit, chain};

pub mod start;
pub mod writer;

use start::Started;

/// The most events that wait for one subscriber.
const MOST: usize = 1024;

/// Something that has happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Its vCPUs run for the first time.
    Started(Started),
    /// A device's driver is ready.
    DriverReady {
        /// The device.
        device: String,
    },
    /// A NIC's driver finds a link, or none any more.
    Link {
        /// The NIC.
        nic: String,
        /// There is one.
        up: bool,
    },
    /// A NIC's driver has changed which frames it takes, or its MAC address.
    RxFilterChanged {
        /// The NIC.
        nic: String,
    },
    /// The balloon's driver has made it larger or smaller.
    BalloonChange {
        /// The bytes of memory that the guest has besides it.
        actual: u64,
    },
    /// The host has failed a disk's request.
    BlockIoError {
        /// The disk.
        device: String,
        /// What has failed.
        error: IoError,
    },
    /// A share's server is gone, and the guest gets errors.
    ShareFailed {
        /// The device.
        device: String,
        /// What the guest mounts it by.
        tag: String,
        /// Why, for people.
        reason: String,
    },
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
    /// It has powered off.
    PowerOff,
    /// Its kernel panicked.
    GuestPanicked,
    /// It ends, or asks for it where it is the guest.
    Shutdown {
        /// The guest has asked for it.
        guest: bool,
        /// Why, in QEMU's words (ShutdownCause).
        reason: &'static str,
    },
    /// The monitor ends with this exit status.
    Ending {
        /// The status.
        status: u8,
        /// Why, for people.
        text: String,
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
    /// It has ended, and what was taken from the host has been given back.
    Exit {
        /// The exit status of the program.
        code: u8,
        /// Why, for programs.
        reason: &'static str,
        /// Why, for people.
        text: String,
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
        let first = match exit {
            Exit::Panic => Some(Self::GuestPanicked),
            Exit::PowerOff => Some(Self::PowerOff),
            _ => None,
        };
        let shutdown = Self::Shutdown { guest, reason };
        first.into_iter().chain([shutdown]).collect()
    }

    /// What the monitor that runs the guest natively says of itself then.
    pub fn ending(exit: &Exit) -> Self {
        Self::Ending {
            status: exit.code(),
            text: exit.to_string(),
        }
    }

    /// The end of a guest, or that it could not be started.
    pub fn of_end<E: std::error::Error>(end: &Result<Exit, E>) -> Self {
        let exit = match end {
            Ok(exit) => exit,
            Err(error) => &Exit::Failure(chain(error)),
        };
        Self::Exit {
            code: exit.code(),
            reason: exit.reason(),
            text: exit.to_string(),
        }
    }

    /// What a device of this name has reported.
    fn of_device(name: &str, event: DeviceEvent) -> Self {
        let name = name.to_owned();
        match event {
            DeviceEvent::DriverReady => Self::DriverReady { device: name },
            DeviceEvent::Link(up) => Self::Link { nic: name, up },
            DeviceEvent::RxFilterChanged => Self::RxFilterChanged { nic: name },
            DeviceEvent::IoError(error) => Self::BlockIoError {
                device: name,
                error,
            },
            DeviceEvent::ShareFailed { tag, reason } => Self::ShareFailed {
                device: name,
                tag,
                reason,
            },
        }
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
            Self::Ending { status, text } => {
                ("X_MINIVMM_EXIT", json!({"status": status, "text": text}))
            }
            Self::Address { nic, mac, address } => (
                "X_MINIVMM_ADDRESS",
                json!({"nic": nic, "mac": mac, "address": address}),
            ),
            Self::Other { name, data } => (name, data.clone()),
            Self::RxFilterChanged { nic } => {
                let data = json!({"name": nic, "path": format!("/machine/{nic}")});
                ("NIC_RX_FILTER_CHANGED", data)
            }
            Self::BalloonChange { actual } => ("BALLOON_CHANGE", json!({"actual": actual})),
            Self::BlockIoError { device, error } => {
                let data = json!({
                    "device": device,
                    "operation": operation(error),
                    "action": "report",
                    "nospace": error.no_space,
                    "reason": error.reason,
                });
                ("BLOCK_IO_ERROR", data)
            }
            Self::ShareFailed {
                device,
                tag,
                reason,
            } => (
                "X_MINIVMM_SHARE_FAILED",
                json!({"device": device, "tag": tag, "reason": reason}),
            ),
            Self::Started(_)
            | Self::DriverReady { .. }
            | Self::Link { .. }
            | Self::PowerOff
            | Self::Exit { .. } => return None,
        })
    }

    /// Its name and data in a line of `--events` (docs/events.md).
    pub fn line(&self) -> Option<(&'static str, Value)> {
        Some(match self {
            Self::Started(started) => ("started", json!(started)),
            Self::DriverReady { device } => ("driver-ready", json!({"device": device})),
            Self::Link { nic, up } => ("link", json!({"nic": nic, "up": up})),
            Self::Address { nic, mac, address } => {
                let data = json!({"nic": nic, "mac": mac, "address": address});
                ("address", data)
            }
            Self::BalloonChange { actual } => ("balloon", json!({"actual": actual})),
            Self::BlockIoError { device, error } => {
                let data = json!({
                    "device": device,
                    "operation": operation(error),
                    "no-space": error.no_space,
                    "reason": error.reason,
                });
                ("block-io-error", data)
            }
            Self::ShareFailed {
                device,
                tag,
                reason,
            } => {
                let data = json!({"device": device, "tag": tag, "reason": reason});
                ("share-failed", data)
            }
            Self::Stop => ("stop", json!({})),
            Self::Resume => ("resume", json!({})),
            Self::Powerdown => ("power-button", json!({})),
            Self::PowerOff => ("power-off", json!({})),
            Self::Reset { guest, reason } => ("reset", json!({"guest": guest, "reason": reason})),
            Self::GuestPanicked => ("panic", json!({})),
            Self::Exit { code, reason, text } => {
                let data = json!({"code": code, "reason": reason, "text": text});
                ("exit", data)
            }
            // A program that asks for the filter uses QMP; `exit` says more than QEMU's word.
            Self::Other { name, data } => return line_of_qemu(name, data),
            Self::RxFilterChanged { .. } | Self::Shutdown { .. } | Self::Ending { .. } => {
                return None;
            }
        })
    }
}

/// The line of an event of QEMU's, where this has the same.
fn line_of_qemu(name: &str, data: &Value) -> Option<(&'static str, Value)> {
    Some(match name {
        "STOP" => ("stop", json!({})),
        "RESUME" => ("resume", json!({})),
        "POWERDOWN" => ("power-button", json!({})),
        "RESET" => ("reset", data.clone()),
        "GUEST_PANICKED" => ("panic", json!({})),
        "SHUTDOWN" if data["reason"] == "guest-shutdown" => ("power-off", json!({})),
        "BALLOON_CHANGE" => ("balloon", data.clone()),
        "BLOCK_IO_ERROR" => {
            let data = json!({
                "device": data["device"],
                "operation": data["operation"],
                "no-space": data["nospace"],
                "reason": data["reason"],
            });
            ("block-io-error", data)
        }
        _ => return None,
    })
}

/// The operation of a request, as QEMU has it.
fn operation(error: &IoError) -> &'static str {
    if error.is_write { "write" } else { "read" }
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

    /// Publishes what the device of this name reports.
    pub fn sink(self: &Arc<Self>, device: &str) -> EventSink {
        let (hub, device) = (Arc::clone(self), device.to_owned());
        EventSink::new(move |event| hub.publish(Event::of_device(&device, event)))
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

impl AsFd for Subscription {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open as long as this lives, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
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
            let name = |event: &Event| Some(event.qmp()?.0.to_owned());
            events.iter().filter_map(name).collect::<Vec<_>>()
        };
        assert_eq!(names(Exit::Panic), ["GUEST_PANICKED", "SHUTDOWN"]);
        assert_eq!(names(Exit::PowerOff), ["SHUTDOWN"]);
    }
}
