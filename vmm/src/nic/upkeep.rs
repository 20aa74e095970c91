//! What start-up has set for the macvtap of a NIC, and may be changed on the host while the guest runs: that it takes
//! every multicast frame, which is set again, and its MAC address, which is reported.

use std::io;
use std::time::Duration;

use net::{LinkWatch, MacAddr};
use vmm_sys_util::timerfd::TimerFd;

/// Until a change is looked at: the guest may have made it itself (`trust-mac=on`), and the device learns that a moment
/// later. The next one waits twice as long, and so on: two programs that do not agree about a link don't keep each other
/// busy.
const FIRST_LOOK: Duration = Duration::from_millis(500);
/// How often the time doubles: up to about a minute.
const DOUBLINGS: u32 = 7;

/// Keeps one link as its NIC needs it, on the control thread.
#[derive(Debug)]
pub struct Upkeep {
    /// Runs while there is a change to be looked at.
    pub timer: TimerFd,
    is_waiting: bool,
    reactions: u32,
    /// Its last new MAC address, and the one that was warned of.
    mac: Option<MacAddr>,
    reported: Option<MacAddr>,
    filters_multicast: bool,
    is_refused: bool,
}

impl Upkeep {
    /// # Errors
    ///
    /// Fails when the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            timer: TimerFd::new()?,
            is_waiting: false,
            reactions: 0,
            mac: None,
            reported: None,
            filters_multicast: false,
            is_refused: false,
        })
    }

    /// The link `link` has a new MAC address. `guest` is the one that the guest's driver finds.
    pub fn mac_is(
        &mut self,
        mac: MacAddr,
        nic: &str,
        guest: [u8; 6],
        link: &str,
    ) -> io::Result<()> {
        self.mac = Some(mac);
        if mac.octets() != guest {
            return self.wait();
        }
        self.look_at_mac(nic, guest, link);
        Ok(())
    }

    /// The link's MAC address, if that was warned of and is still none of the guest's.
    pub fn wrong_mac(&self) -> Option<MacAddr> {
        self.reported.and(self.mac)
    }

    /// Whether the link takes every multicast frame no longer.
    pub fn filters_multicast(&self) -> bool {
        self.filters_multicast
    }

    /// The link takes every multicast frame, or no longer.
    pub fn all_multicast_is(&mut self, on: bool) -> io::Result<()> {
        self.filters_multicast = !on;
        if on { Ok(()) } else { self.wait() }
    }

    /// The kernel has not let us change the link `link`.
    pub fn refused(&mut self, nic: &str, link: &str, error: &io::Error) {
        // Once: it will not do so next time either.
        self.is_refused = true;
        log::warn!(
            "{nic}: {link} filters multicast, so IPv6 neighbours may not find the guest, and minivmm may not change that \
             ({error}): `ip link set {link} allmulticast on`"
        );
    }

    fn wait(&mut self) -> io::Result<()> {
        if !self.is_waiting {
            let delay = FIRST_LOOK * 2_u32.pow(self.reactions.min(DOUBLINGS));
            self.timer.reset(delay, None)?;
            self.is_waiting = true;
        }
        Ok(())
    }

    /// The time is over. `guest` is the address that the guest's driver finds; `link` is the link's index and name.
    pub fn look(&mut self, nic: &str, guest: [u8; 6], link: (u32, &str), watch: &mut LinkWatch) {
        let _ = self.timer.wait();
        self.is_waiting = false;
        let (index, link) = link;
        self.look_at_mac(nic, guest, link);
        if !self.filters_multicast || self.is_refused {
            return;
        }
        self.reactions += 1;
        match watch.turn_all_multicast_on(index) {
            Ok(()) => log::warn!(
                "{nic}: {link} was set to filter multicast, which would hide the guest from IPv6 neighbours: it takes \
                 all of it again"
            ),
            Err(error) => self.refused(nic, link, &error),
        }
    }

    fn look_at_mac(&mut self, nic: &str, guest: [u8; 6], link: &str) {
        let Some(mac) = self.mac else { return };
        if mac.octets() == guest {
            if self.reported.take().is_some() {
                log::info!("{nic}: {link} has the guest's MAC address {mac} again");
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
            "{nic}: {link} was given the MAC address {mac}, but the guest has {guest}, so no frame reaches it any \
             more: `ip link set {link} address {guest}`"
        );
    }
}
