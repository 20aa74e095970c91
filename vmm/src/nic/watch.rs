//! Follows the macvtap of a NIC: what happens to the host's link shows in the guest's.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use devices::virtio::net::config::ConfigSpace;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use net::{LinkChange, LinkWatch, MacAddr};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::nic::registry::{LinkSeen, WrongMac};
use crate::nic::upkeep::Upkeep;

/// How often a guest whose link has come back is asked to announce itself: its NIC may be somewhere
/// else in the network now, and the first announcement may be lost on a switch that still learns.
const ANNOUNCEMENTS: u32 = 3;
/// Until the first, for the guest to find its carrier.
const FIRST_ANNOUNCEMENT: Duration = Duration::from_millis(250);
const ANNOUNCEMENT_INTERVAL: Duration = Duration::from_secs(1);

/// The watcher of one NIC, on the control thread.
#[derive(Debug)]
pub struct LinkFollower {
    /// The NIC, in logs.
    name: String,
    watch: LinkWatch,
    guest: Arc<ConfigSpace>,
    link: LinkSeen,
    /// Where others read it, and what wakes them.
    shown: Arc<FollowedLink>,
    changed: EventFd,
    /// Runs while there are announcements left to ask for.
    announce: TimerFd,
    announcements: u32,
    upkeep: Upkeep,
    /// Index and name of the link, as the last event had them.
    last: (u32, String),
}

/// What was last seen of a link, for those who tell of it.
#[derive(Debug)]
pub struct FollowedLink(Mutex<(LinkSeen, Option<u32>)>);

impl Default for FollowedLink {
    fn default() -> Self {
        // As the watch takes a link to be until it says otherwise.
        let link = LinkSeen {
            exists: true,
            up: true,
            carrier: true,
            wrong_mac: None,
            filters_multicast: false,
        };
        Self(Mutex::new((link, None)))
    }
}

impl FollowedLink {
    /// What was last seen.
    pub fn seen(&self) -> LinkSeen {
        self.lock().0
    }

    /// Its MTU, if that has changed.
    pub fn mtu(&self) -> Option<u32> {
        self.lock().1
    }

    fn lock(&self) -> MutexGuard<'_, (LinkSeen, Option<u32>)> {
        // It is as good as before: nobody leaves it half-written.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LinkFollower {
    /// Lets `guest` and `shown` follow what `watch` sees, and signals `changed` then.
    ///
    /// # Errors
    ///
    /// Fails when the process has no file descriptor left.
    pub fn new(
        name: String,
        watch: LinkWatch,
        guest: Arc<ConfigSpace>,
        shown: Arc<FollowedLink>,
        changed: EventFd,
    ) -> io::Result<Self> {
        Ok(Self {
            name,
            watch,
            guest,
            link: shown.seen(),
            shown,
            changed,
            announce: TimerFd::new()?,
            announcements: 0,
            upkeep: Upkeep::new()?,
            last: (0, String::new()),
        })
    }

    /// Takes in what is new; an error is one of a timer.
    fn follow(&mut self, change: LinkChange, link: &str) -> io::Result<()> {
        let name = &self.name;
        match change {
            LinkChange::Mac(mac) => self.upkeep.mac_is(mac, name, self.guest.mac(), link)?,
            LinkChange::AllMulticast(on) => self.upkeep.all_multicast_is(on)?,
            LinkChange::Refused(number) => {
                let error = io::Error::from_raw_os_error(number);
                self.upkeep.refused(name, link, &error);
                return Ok(());
            }
            LinkChange::Carrier(carrier) => self.link.carrier = carrier,
            LinkChange::Admin(up) => self.link.up = up,
            LinkChange::Mtu(mtu) => {
                log::info!(
                    "{name}: the MTU of {link} is now {mtu}; the guest is told, and Linux looks \
                     only when its driver starts"
                );
                self.guest.set_mtu(u16::try_from(mtu).unwrap_or(u16::MAX));
                self.shown.lock().1 = Some(mtu);
            }
            LinkChange::Deleted => {
                self.link.exists = false;
                log::warn!(
                    "{name}: {link} is gone, perhaps with the interface under it: the guest runs \
                     on without this NIC's link"
                );
            }
            _ => {}
        }
        self.show();
        let up = self.link.exists && self.link.up && self.link.carrier;
        if up != self.guest.is_up() {
            let state = if up { "up" } else { "down" };
            log::info!("{}: the link is {state}", self.name);
            self.guest.set_up(up);
            self.announcements = if up { ANNOUNCEMENTS } else { 0 };
            self.set_timer()?;
        }
        Ok(())
    }

    fn show(&mut self) {
        let wrong_mac = || {
            let link = self.upkeep.wrong_mac()?;
            let guest = MacAddr::try_from(self.guest.mac()).ok()?;
            // The guest may have taken that one too.
            (link != guest).then_some(WrongMac { link, guest })
        };
        self.link.wrong_mac = wrong_mac().filter(|_| self.link.exists);
        self.link.filters_multicast = self.link.exists && self.upkeep.filters_multicast();
        self.shown.lock().0 = self.link;
        // Only a counter at its end could refuse.
        let _ = self.changed.write(1);
    }

    fn set_timer(&mut self) -> io::Result<()> {
        let set = match self.announcements {
            0 => self.announce.clear(),
            ANNOUNCEMENTS => self.announce.reset(FIRST_ANNOUNCEMENT, None),
            _ => self.announce.reset(ANNOUNCEMENT_INTERVAL, None),
        };
        Ok(set?)
    }

    fn ask_to_announce(&mut self) -> io::Result<()> {
        let _ = self.announce.wait();
        self.guest.ask_to_announce();
        self.announcements = self.announcements.saturating_sub(1);
        self.set_timer()
    }

    fn warn_of_timer(&self, result: io::Result<()>) {
        if let Err(error) = result {
            log::warn!("{}: cannot set a timer: {error}", self.name);
        }
    }
}

impl MutEventSubscriber for LinkFollower {
    fn init(&mut self, ops: &mut EventOps) {
        let fd = self.watch.as_fd().as_raw_fd();
        for events in [
            Events::new_raw(fd, EventSet::IN),
            Events::new(&self.announce, EventSet::IN),
            Events::new(&self.upkeep.timer, EventSet::IN),
        ] {
            if let Err(error) = ops.add(events) {
                log::warn!("{}: cannot watch its link: {error}", self.name);
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.announce.as_raw_fd() {
            let result = self.ask_to_announce();
            return self.warn_of_timer(result);
        }
        if events.fd() == self.upkeep.timer.as_raw_fd() {
            let (index, link) = &self.last;
            let guest = self.guest.mac();
            self.upkeep
                .look(&self.name, guest, (*index, link), &mut self.watch);
            return self.show();
        }
        loop {
            match self.watch.next() {
                Ok(Some(event)) => {
                    let result = self.follow(event.change, &event.name);
                    self.warn_of_timer(result);
                    self.last = (event.index, event.name);
                }
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
