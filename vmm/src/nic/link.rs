//! The host's link of a NIC: what happens to it shows in the guest's.

use std::io;
use std::time::Duration;

use devices::virtio::net::config::ConfigSpace;
use net::{LinkChange, LinkEvent, LinkWatch, MacAddr};
use vmm_sys_util::timerfd::TimerFd;

use super::registry::{LinkSeen, WrongMac};
use super::upkeep::Upkeep;

/// How often a guest whose link has come back is asked to announce itself: its NIC may be somewhere
/// else in the network now, and the first announcement may be lost on a switch that still learns.
const ANNOUNCEMENTS: u32 = 3;
/// Until the first, for the guest to find its carrier.
const FIRST_ANNOUNCEMENT: Duration = Duration::from_millis(250);
const ANNOUNCEMENT_INTERVAL: Duration = Duration::from_secs(1);

/// A link that is watched.
#[derive(Debug)]
pub struct Link {
    /// Readable when there is news.
    pub watch: LinkWatch,
    /// Runs while there are announcements left to ask for.
    pub announce: TimerFd,
    announcements: u32,
    /// Its timer runs while a change is to be looked at.
    pub upkeep: Upkeep,
    seen: LinkSeen,
    /// Index and name, as the last event had them.
    last: (u32, String),
}

impl Link {
    /// The link that `watch` shows.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn new(watch: LinkWatch) -> io::Result<Self> {
        Ok(Self {
            watch,
            announce: TimerFd::new()?,
            announcements: 0,
            upkeep: Upkeep::new()?,
            // As the watch takes a link to be until it says otherwise.
            seen: LinkSeen {
                exists: true,
                up: true,
                carrier: true,
                wrong_mac: None,
                filters_multicast: false,
            },
            last: (0, String::new()),
        })
    }

    /// What was last seen of it.
    pub fn seen(&self) -> LinkSeen {
        self.seen
    }

    /// Takes in what is new, for the NIC `name` of `guest`.
    ///
    /// # Errors
    ///
    /// When there will be no more news.
    pub fn follow(&mut self, name: &str, guest: &ConfigSpace) -> io::Result<()> {
        while let Some(event) = self.watch.next()? {
            self.take_in(&event, name, guest).or_else(warn_of(name))?;
            self.last = (event.index, event.name);
        }
        Ok(())
    }

    /// An error is one of a timer.
    fn take_in(&mut self, event: &LinkEvent, name: &str, guest: &ConfigSpace) -> io::Result<()> {
        let link = &event.name;
        match event.change {
            LinkChange::Mac(mac) => self.upkeep.mac_is(mac, name, guest.mac(), link)?,
            LinkChange::AllMulticast(on) => self.upkeep.all_multicast_is(on)?,
            LinkChange::Refused(number) => {
                let error = io::Error::from_raw_os_error(number);
                self.upkeep.refused(name, link, &error);
                return Ok(());
            }
            LinkChange::Carrier(carrier) => self.seen.carrier = carrier,
            LinkChange::Admin(up) => self.seen.up = up,
            LinkChange::Mtu(mtu) => {
                log::info!(
                    "{name}: the MTU of {link} is now {mtu}: the guest's NIC has it too, but Linux \
                     looks at it only when its driver starts"
                );
                guest.set_mtu(u16::try_from(mtu).unwrap_or(u16::MAX));
            }
            LinkChange::Deleted => {
                self.seen.exists = false;
                log::warn!(
                    "{name}: {link} is gone, perhaps with the interface under it: the guest runs \
                     on without this NIC's link"
                );
            }
            _ => {}
        }
        self.compare(guest);
        let up = self.seen.exists && self.seen.up && self.seen.carrier;
        if guest.set_up(up) {
            let state = if up { "up" } else { "down" };
            log::info!("{name}: the link is {state}");
            self.announcements = if up { ANNOUNCEMENTS } else { 0 };
            self.set_timer()?;
        }
        Ok(())
    }

    /// Sees how the link differs from what the guest needs.
    fn compare(&mut self, guest: &ConfigSpace) {
        let (exists, guest) = (self.seen.exists, MacAddr::try_from(guest.mac()).ok());
        let wrong = self.upkeep.wrong_mac().zip(guest).filter(|_| exists);
        let wrong = wrong.map(|(link, guest)| WrongMac { link, guest });
        // The guest may have taken the link's too.
        self.seen.wrong_mac = wrong.filter(|wrong| wrong.link != wrong.guest);
        self.seen.filters_multicast = exists && self.upkeep.filters_multicast();
    }

    fn set_timer(&mut self) -> io::Result<()> {
        let set = match self.announcements {
            0 => self.announce.clear(),
            ANNOUNCEMENTS => self.announce.reset(FIRST_ANNOUNCEMENT, None),
            _ => self.announce.reset(ANNOUNCEMENT_INTERVAL, None),
        };
        Ok(set?)
    }

    /// Asks the guest to announce itself: its timer has run out.
    pub fn announce(&mut self, name: &str, guest: &ConfigSpace) {
        let _ = self.announce.wait();
        guest.ask_to_announce();
        self.announcements = self.announcements.saturating_sub(1);
        let _ = self.set_timer().or_else(warn_of(name));
    }

    /// Looks at changes that should not stay: the timer of the upkeep has run out.
    pub fn keep_up(&mut self, name: &str, guest: &ConfigSpace) {
        let (index, link) = &self.last;
        self.upkeep
            .look(name, guest.mac(), (*index, link), &mut self.watch);
        self.compare(guest);
    }
}

/// The NIC works without a timer.
fn warn_of(name: &str) -> impl Fn(io::Error) -> io::Result<()> {
    move |error| {
        log::warn!("{name}: cannot set a timer: {error}");
        Ok(())
    }
}
