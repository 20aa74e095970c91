//! The balloon of a machine, and what the control thread does for it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::balloon::{Balloon, BalloonHandle};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::timerfd::TimerFd;

use crate::config::HeldBack;
use crate::events::{Event, EventHub};
use crate::machine::{Machine, MachineError};

/// How long the next change of its size waits: a guest can cause any number of them. As long as in QEMU.
const INTERVAL: Duration = Duration::from_secs(1);

// Event tokens.
const CHANGED: u32 = 0;
const INTERVAL_OVER: u32 = 1;

/// Puts a balloon into the machine that holds so much back, and returns what it is controlled by.
///
/// # Errors
///
/// See [`MachineError`].
pub fn add(machine: &mut Machine, held_back: HeldBack) -> Result<BalloonHandle, MachineError> {
    let events = machine.event_sink("balloon");
    let balloon = Balloon::new("balloon", held_back.bytes(), events);
    let balloon = balloon.map_err(MachineError::Device)?;
    let handle = balloon.handle();
    machine.add_virtio(balloon)?;
    Ok(handle)
}

/// Publishes how large the balloon is, when that changes.
#[derive(Debug)]
pub struct Follower {
    balloon: BalloonHandle,
    /// Bytes of memory that the guest has with the balloon empty.
    memory: u64,
    events: Arc<EventHub>,
    published: u64,
    /// Runs while no change is looked at.
    interval: TimerFd,
}

impl Follower {
    /// Publishes what happens to the balloon of a guest with so many bytes of memory.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn new(balloon: BalloonHandle, memory: u64, events: Arc<EventHub>) -> io::Result<Self> {
        Ok(Self {
            published: balloon.actual(),
            balloon,
            memory,
            events,
            interval: TimerFd::new()?,
        })
    }

    /// Publishes what is held back, if that has changed; says whether it has.
    fn publish(&mut self, held_back: u64) -> bool {
        let is_change = held_back != self.published;
        if is_change {
            self.published = held_back;
            let actual = self.memory.saturating_sub(held_back);
            self.events.publish(Event::BalloonChange { actual });
        }
        is_change
    }

    fn look_later(&mut self) {
        if let Err(error) = self.interval.reset(INTERVAL, None) {
            log::warn!("changes of the balloon are no longer published: {error}");
        }
    }
}

impl MutEventSubscriber for Follower {
    fn init(&mut self, ops: &mut EventOps) {
        let changed = Events::with_data(self.balloon.changed(), CHANGED, EventSet::IN);
        let interval = Events::with_data(&self.interval, INTERVAL_OVER, EventSet::IN);
        for events in [changed, interval] {
            if let Err(error) = ops.add(events) {
                log::warn!("cannot follow the balloon: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            CHANGED => {
                // It does not show again before `watch`.
                let _ = self.balloon.changed().read();
                self.publish(self.balloon.actual());
                self.look_later();
            }
            INTERVAL_OVER => {
                // Reading it would block if it was set again meanwhile.
                let _ = self.interval.clear();
                if self.publish(self.balloon.actual()) {
                    self.look_later();
                } else {
                    let held_back = self.balloon.watch();
                    self.publish(held_back);
                }
            }
            _ => {}
        }
    }
}
