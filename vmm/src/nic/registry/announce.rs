//! What keeps the records of this process up to date.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::net::observe::Observer;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::Claim;
use crate::nic::watch::FollowedLink;

/// A NIC of which there is news while it is used.
#[derive(Debug)]
pub struct RegisteredNic {
    /// Tells others.
    pub claim: Claim,
    /// Tells what its guest says.
    pub observer: Arc<Observer>,
    /// Tells what becomes of the macvtap, where that can be watched.
    pub link: Option<Arc<FollowedLink>>,
}

impl RegisteredNic {
    fn learn(&mut self) {
        self.claim.update(|nic| {
            nic.addresses = self.observer.addresses();
            nic.wrong_source_frames = self.observer.wrong_source();
            if let Some(link) = &self.link {
                nic.link = Some(link.seen());
                nic.tap.mtu = link.mtu().unwrap_or(nic.tap.mtu);
            }
        });
    }
}

/// Keeps the records up to date, on the control thread.
#[derive(Debug)]
pub struct Announcer {
    nics: Vec<RegisteredNic>,
    changed: EventFd,
    /// Runs while something has been learnt that the file does not say yet.
    delay: TimerFd,
}

impl Announcer {
    /// How long a change may wait for others: a guest can cause any number of them.
    const DELAY: Duration = Duration::from_millis(100);

    /// Tells of `nics` after `changed`, which the observers signal.
    ///
    /// # Errors
    ///
    /// Fails when the process has no file descriptor left.
    pub fn new(mut nics: Vec<RegisteredNic>, changed: EventFd) -> io::Result<Self> {
        nics.iter_mut().for_each(RegisteredNic::learn);
        Ok(Self {
            nics,
            changed,
            delay: TimerFd::new()?,
        })
    }
}

impl MutEventSubscriber for Announcer {
    fn init(&mut self, ops: &mut EventOps) {
        for events in [
            Events::new(&self.changed, EventSet::IN),
            Events::new(&self.delay, EventSet::IN),
        ] {
            if let Err(error) = ops.add(events) {
                log::warn!("the guest's addresses will not be told: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if events.fd() == self.changed.as_raw_fd() {
            let _ = self.changed.read();
            if !self.delay.is_armed().unwrap_or(false) {
                let _ = self.delay.reset(Self::DELAY, None);
            }
        } else {
            let _ = self.delay.wait();
            self.nics.iter_mut().for_each(RegisteredNic::learn);
        }
    }
}
