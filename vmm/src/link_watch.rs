//! Follows the macvtap of a network card: what happens to the host's link shows in the guest's.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use devices::virtio::net::config::ConfigSpace;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use net::{LinkChange, LinkWatch};

/// The watcher of one card, on the control thread.
#[derive(Debug)]
pub struct LinkFollower {
    /// The card, in logs.
    name: String,
    watch: LinkWatch,
    guest: Arc<ConfigSpace>,
    /// The macvtap exists, has been brought up, and has a carrier.
    exists: bool,
    admin: bool,
    carrier: bool,
}

impl LinkFollower {
    /// Lets `guest` follow what `watch` sees.
    pub fn new(name: String, watch: LinkWatch, guest: Arc<ConfigSpace>) -> Self {
        // As the watch takes a link to be until it says otherwise.
        Self {
            name,
            watch,
            guest,
            exists: true,
            admin: true,
            carrier: true,
        }
    }

    fn follow(&mut self, change: LinkChange, link: &str) {
        let name = &self.name;
        match change {
            LinkChange::Carrier(carrier) => self.carrier = carrier,
            LinkChange::Admin(up) => self.admin = up,
            LinkChange::Mtu(mtu) => {
                log::info!(
                    "{name}: the MTU of {link} is now {mtu}; the guest is told, and Linux looks \
                     only when its driver starts"
                );
                self.guest.set_mtu(u16::try_from(mtu).unwrap_or(u16::MAX));
            }
            LinkChange::Deleted => {
                self.exists = false;
                log::warn!(
                    "{name}: {link} is gone, perhaps with the interface under it: the guest runs \
                     on without this network card's link"
                );
            }
            _ => {}
        }
        let up = self.exists && self.admin && self.carrier;
        if up != self.guest.is_up() {
            log::info!("{name}: the link is {}", if up { "up" } else { "down" });
            self.guest.set_up(up);
        }
    }
}

impl MutEventSubscriber for LinkFollower {
    fn init(&mut self, ops: &mut EventOps) {
        let fd = self.watch.as_fd().as_raw_fd();
        if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
            log::warn!("{}: cannot watch its link: {error}", self.name);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        loop {
            match self.watch.next() {
                Ok(Some(event)) => self.follow(event.change, &event.name),
                Ok(None) => return,
                Err(error) => {
                    log::warn!("{}: its link is no longer watched: {error}", self.name);
                    let _ = ops.remove(Events::empty_raw(events.fd()));
                    return;
                }
            }
        }
    }
}
