//! What devices report to the program that runs the guest, as it happens.
//!
//! A guest can cause any amount of it. So each kind is bounded where it is reported: by a
//! [`Throttle`], or once until who has seen it asks for the next.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::lock;

/// Something that happened to a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// Its driver is ready: DRIVER_OK.
    DriverReady,
    /// A NIC's driver finds a link, or none any more.
    Link(bool),
    /// A NIC's driver has changed which frames it takes, or its MAC address. Once, until the filter
    /// is asked for.
    RxFilterChanged,
    /// The host has failed a request of a disk's.
    IoError(IoError),
    /// A share's server is gone, and the guest gets errors from now on. Once.
    ShareFailed {
        /// The share's tag.
        tag: String,
        /// Why, for people.
        reason: String,
    },
}

/// A disk's request that the host has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoError {
    /// It would have changed what is on the disk, or made that durable.
    pub is_write: bool,
    /// There was no room on the host.
    pub no_space: bool,
    /// What failed and why, for people.
    pub reason: String,
}

/// Takes a device's events. It is called on the threads of vCPUs and devices, with locks held, and so
/// must not wait.
#[derive(Clone, Default)]
pub struct EventSink(Option<Arc<dyn Fn(DeviceEvent) + Send + Sync>>);

impl EventSink {
    /// Calls `sink` with each of them.
    pub fn new(sink: impl Fn(DeviceEvent) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(sink)))
    }

    /// Reports what has happened.
    pub fn report(&self, event: DeviceEvent) {
        if let Some(sink) = &self.0 {
            sink(event);
        }
    }
}

impl fmt::Debug for EventSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventSink").finish_non_exhaustive()
    }
}

/// Bounds what one device reports of one kind: so many at once, and one a second after that.
#[derive(Debug)]
pub struct Throttle(Mutex<Budget>);

#[derive(Debug)]
struct Budget {
    left: u32,
    since: Instant,
}

impl Throttle {
    /// As many as there are when drivers are tried out by hand.
    const BURST: u32 = 8;
    const INTERVAL: Duration = Duration::from_secs(1);

    /// Whether one more may pass at this time.
    pub fn may_pass(&self, now: Instant) -> bool {
        let budget = &mut *lock(&self.0);
        let passed = now.saturating_duration_since(budget.since);
        let earned = u32::try_from(passed.as_secs()).unwrap_or(u32::MAX);
        if budget.left.saturating_add(earned) >= Self::BURST {
            (budget.left, budget.since) = (Self::BURST, now);
        } else {
            budget.left += earned;
            budget.since += Self::INTERVAL * earned;
        }
        let may = budget.left > 0;
        budget.left = budget.left.saturating_sub(1);
        may
    }
}

impl Default for Throttle {
    fn default() -> Self {
        Self(Mutex::new(Budget {
            left: Self::BURST,
            since: Instant::now(),
        }))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A sink that keeps what is reported.
    pub fn record() -> (EventSink, Arc<Mutex<Vec<DeviceEvent>>>) {
        let events: Arc<Mutex<Vec<_>>> = Arc::default();
        let kept = Arc::clone(&events);
        (EventSink::new(move |event| lock(&kept).push(event)), events)
    }

    #[test]
    fn throttle_lets_a_burst_pass_and_then_one_a_second() {
        let throttle = Throttle::default();
        let start = Instant::now();
        let passed = |at: Duration, tries: u32| {
            let passed = (0..tries).filter(|_| throttle.may_pass(start + at));
            passed.count() as u32
        };
        assert_eq!(passed(Duration::ZERO, 100), Throttle::BURST);
        assert_eq!(passed(Duration::from_millis(900), 100), 0);
        assert_eq!(passed(Duration::from_millis(1100), 100), 1);
        assert_eq!(passed(Duration::from_millis(2900), 100), 1);
        assert_eq!(passed(Duration::from_millis(3100), 100), 1);
        assert_eq!(passed(Duration::from_secs(3600), 100), Throttle::BURST);
    }
}
