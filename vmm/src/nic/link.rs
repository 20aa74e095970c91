//! The host's link of a NIC: what happens to it shows in the guest's. What start-up has set for it is kept: that it takes
//! every multicast frame is set again, that it has another MAC address than the guest is reported.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::net::config::ConfigSpace;
use net::{LinkChange, LinkWatch, MacAddr};
use vmm_sys_util::timerfd::TimerFd;

use super::registry::{LinkSeen, WrongMac};

/// How often a guest whose link has come back is asked to announce itself: its NIC may be somewhere
/// else in the network now, and the first announcement may be lost on a switch that still learns.
const ANNOUNCEMENTS: u32 = 3;
/// Until the first, for the guest to find its carrier.
const FIRST_ANNOUNCEMENT: Duration = Duration::from_millis(250);
const ANNOUNCEMENT_INTERVAL: Duration = Duration::from_secs(1);

/// Until a change is looked at: the guest may have made it itself (`trust-mac=on`), and the device learns that a moment
/// later. The next one waits twice as long, and so on: two programs that do not agree about a link don't keep each other
/// busy.
const FIRST_LOOK: Duration = Duration::from_millis(500);
/// How often the time doubles: up to about a minute.
const DOUBLINGS: u32 = 7;

/// A link that is watched, on the control thread. That its timers can be set is taken for granted.
#[derive(Debug)]
pub struct Link {
    /// The NIC, in logs.
    nic: String,
    guest: Arc<ConfigSpace>,
    /// Readable when there is news.
    pub watch: LinkWatch,
    /// Runs while there are announcements left to ask for.
    pub announce: TimerFd,
    announcements: u32,
    /// Runs while there is a change to be looked at.
    pub upkeep: TimerFd,
    reactions: u32,
    seen: LinkSeen,
    /// As the last event had them.
    index: u32,
    name: String,
    /// Its last new MAC address, and the one that was warned of.
    mac: Option<MacAddr>,
    reported: Option<MacAddr>,
    /// The kernel has not let us have it take every multicast frame.
    is_refused: bool,
}

impl Link {
    /// The link that `watch` shows, of the NIC `nic` whose driver finds `guest`.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn new(watch: LinkWatch, nic: String, guest: Arc<ConfigSpace>) -> io::Result<Self> {
        Ok(Self {
            nic,
            guest,
            watch,
            announce: TimerFd::new()?,
            announcements: 0,
            upkeep: TimerFd::new()?,
            reactions: 0,
            // As the watch takes a link to be until it says otherwise.
            seen: LinkSeen {
                exists: true,
                up: true,
                carrier: true,
                wrong_mac: None,
                filters_multicast: false,
            },
            index: 0,
            name: String::new(),
            mac: None,
            reported: None,
            is_refused: false,
        })
    }

    /// What was last seen of it.
    pub fn seen(&self) -> LinkSeen {
        self.seen
    }

    /// Takes in what is new.
    ///
    /// # Errors
    ///
    /// When there will be no more news.
    pub fn follow(&mut self) -> io::Result<()> {
        while let Some(event) = self.watch.next()? {
            (self.index, self.name) = (event.index, event.name);
            self.take_in(event.change);
        }
        Ok(())
    }

    fn take_in(&mut self, change: LinkChange) {
        let (nic, name) = (&self.nic, &self.name);
        match change {
            LinkChange::Mac(mac) => {
                self.mac = Some(mac);
                match mac.octets() == self.guest.mac() {
                    true => self.look_at_mac(),
                    false => self.look_later(),
                }
            }
            LinkChange::AllMulticast(on) => {
                self.seen.filters_multicast = !on;
                if !on {
                    self.look_later();
                }
            }
            LinkChange::Refused(number) => self.refused(&io::Error::from_raw_os_error(number)),
            LinkChange::Carrier(carrier) => self.seen.carrier = carrier,
            LinkChange::Admin(up) => self.seen.up = up,
            LinkChange::Mtu(mtu) => {
                log::info!(
                    "{nic}: the MTU of {name} is now {mtu}: the guest's NIC has it too, but Linux \
                     looks at it only when its driver starts"
                );
                self.guest.set_mtu(u16::try_from(mtu).unwrap_or(u16::MAX));
            }
            LinkChange::Deleted => {
                self.seen.exists = false;
                log::warn!(
                    "{nic}: {name} is gone, perhaps with the interface under it: the guest runs on \
                     without this NIC's link"
                );
            }
            _ => {}
        }
        self.compare();
        let up = self.seen.exists && self.seen.up && self.seen.carrier;
        if self.guest.set_carrier(up) {
            let state = if up { "up" } else { "down" };
            log::info!("{}: the link is {state}", self.nic);
            self.announcements = if up { ANNOUNCEMENTS } else { 0 };
            self.set_announce_timer();
        }
    }

    /// Sees how the link differs from what the guest needs.
    fn compare(&mut self) {
        let guest = MacAddr::try_from(self.guest.mac()).ok();
        let wrong = self.reported.and(self.mac).zip(guest);
        let wrong = wrong.map(|(link, guest)| WrongMac { link, guest });
        // The guest may have taken the link's too.
        let is_wrong = |wrong: &WrongMac| self.seen.exists && wrong.link != wrong.guest;
        self.seen.wrong_mac = wrong.filter(is_wrong);
        self.seen.filters_multicast &= self.seen.exists;
    }

    fn set_announce_timer(&mut self) {
        let _ = match self.announcements {
            0 => self.announce.clear(),
            ANNOUNCEMENTS => self.announce.reset(FIRST_ANNOUNCEMENT, None),
            _ => self.announce.reset(ANNOUNCEMENT_INTERVAL, None),
        };
    }

    /// Asks the guest to announce itself: its timer has run out.
    pub fn announce(&mut self) {
        self.guest.ask_to_announce();
        self.announcements = self.announcements.saturating_sub(1);
        self.set_announce_timer();
    }

    fn look_later(&mut self) {
        if !self.upkeep.is_armed().unwrap_or(false) {
            let delay = FIRST_LOOK * 2_u32.pow(self.reactions.min(DOUBLINGS));
            let _ = self.upkeep.reset(delay, None);
        }
    }

    /// Looks at changes that should not stay: the timer of the upkeep has run out.
    pub fn keep_up(&mut self) {
        // Reading it would block if it was set again meanwhile.
        let _ = self.upkeep.clear();
        self.look_at_mac();
        self.compare();
        if !self.seen.filters_multicast || self.is_refused {
            return;
        }
        self.reactions += 1;
        match self.watch.turn_all_multicast_on(self.index) {
            Ok(()) => log::warn!(
                "{}: {} was set to filter multicast, which would hide the guest from IPv6 neighbours: it takes all of \
                 it again",
                self.nic,
                self.name
            ),
            Err(error) => self.refused(&error),
        }
    }

    fn look_at_mac(&mut self) {
        let (nic, name, guest) = (&self.nic, &self.name, self.guest.mac());
        let Some(mac) = self.mac else { return };
        if mac.octets() == guest {
            if self.reported.take().is_some() {
                log::info!("{nic}: {name} has the guest's MAC address {mac} again");
            }
            return;
        }
        if self.reported.replace(mac) == Some(mac) {
            return;
        }
        self.reactions += 1;
        let guest =
            MacAddr::try_from(guest).map_or("another one".to_owned(), |mac| mac.to_string());
        log::warn!(
            "{nic}: {name} was given the MAC address {mac}, but the guest has {guest}, so no frame reaches it any more: \
             `ip link set {name} address {guest}`"
        );
    }

    /// The kernel has not let us change the link.
    fn refused(&mut self, error: &io::Error) {
        // Once: it will not do so next time either.
        self.is_refused = true;
        let (nic, name) = (&self.nic, &self.name);
        log::warn!(
            "{nic}: {name} filters multicast, so IPv6 neighbours may not find the guest, and minivmm may not change that \
             ({error}): `ip link set {name} allmulticast on`"
        );
    }
}
