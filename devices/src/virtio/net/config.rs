//! The configuration space of the NIC: what the driver reads of it, and who changes it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};

use super::backend::Backend;
use crate::events::{DeviceEvent, EventSink};
use crate::virtio::{Interrupt, read_at};

/// What a driver reads of a network device (`struct virtio_net_config`, virtio 1.2, 5.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The MAC address that the guest has to use.
    pub mac: [u8; 6],
    /// The largest IP packet that the link carries, in bytes.
    pub mtu: u16,
}

/// The configuration space, which begins with a link. It owns the NIC's MAC address, link state and
/// MTU. The control thread changes it as the host's interface changes, the control queue as the
/// driver commands.
#[derive(Debug)]
pub struct ConfigSpace {
    /// The address that the NIC has after a reset.
    own_mac: [u8; 6],
    /// The one that it has now, as the low 48 bits: the queues read it for each frame. It changes
    /// with the lock held.
    mac: AtomicU64,
    state: Mutex<State>,
    events: EventSink,
}

#[derive(Debug)]
struct State {
    mtu: u16,
    pairs: u16,
    /// The host's interface has a link.
    carrier: bool,
    /// An operator has not taken the guest's link down.
    allowed: bool,
    announce: bool,
    generation: u32,
    driver: Option<Driver>,
    /// Something has changed while there was no driver to be notified.
    missed: bool,
}

/// What the driver has made of the configuration space, or been asked by it. Link and MTU are the
/// host's.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ConfigState {
    pub mac: [u8; 6],
    announce: bool,
    generation: u32,
}

/// The driver, while there is one.
#[derive(Debug)]
struct Driver {
    interrupt: Arc<dyn Interrupt>,
    /// It took GUEST_ANNOUNCE.
    announces: bool,
}

impl ConfigSpace {
    /// The space of a NIC with `pairs` queue pairs, whose link's changes are reported to `events`.
    pub fn new(config: NetConfig, pairs: u16, events: EventSink) -> Self {
        Self {
            own_mac: config.mac,
            mac: AtomicU64::new(number(config.mac)),
            state: Mutex::new(State {
                mtu: config.mtu,
                pairs,
                carrier: true,
                allowed: true,
                announce: false,
                generation: 0,
                driver: None,
                missed: false,
            }),
            events,
        }
    }

    /// The host's interface has a link, or none. True if that changes the guest's, which then has
    /// been notified.
    pub fn set_carrier(&self, on: bool) -> bool {
        self.change_link(|state| state.carrier = on)
    }

    /// An operator takes the guest's link down, or lets it be what the host's is. True if that changes
    /// the guest's.
    pub fn set_operator_link(&self, up: bool) -> bool {
        self.change_link(|state| state.allowed = up)
    }

    /// Whether the driver finds a link: the host's interface has one, and no operator has taken the
    /// guest's down.
    pub fn is_up(&self) -> bool {
        self.lock().is_up()
    }

    fn change_link(&self, change: impl FnOnce(&mut State)) -> bool {
        let mut state = self.lock();
        let was_up = state.is_up();
        change(&mut state);
        let is_up = state.is_up();
        if is_up != was_up {
            state.announce = false;
            state.changed();
            self.events.report(DeviceEvent::Link(is_up));
        }
        is_up != was_up
    }

    /// Asks the driver to announce itself to the network, if it can and there is a link. Not at
    /// once when the link comes up: Linux looks at this first, and would announce itself into a
    /// carrier that is still off.
    pub fn ask_to_announce(&self) {
        let mut state = self.lock();
        if state.is_up() && state.driver.as_ref().is_some_and(|driver| driver.announces) {
            state.announce = true;
            state.changed();
        }
    }

    /// Sets a new MTU. Drivers of today read it only when they start.
    pub fn set_mtu(&self, mtu: u16) {
        let mut state = self.lock();
        if state.mtu != mtu {
            state.mtu = mtu;
            state.changed();
        }
    }

    /// The MTU as the driver finds it.
    pub fn mtu(&self) -> u16 {
        self.lock().mtu
    }

    /// The MAC address as the driver finds it.
    pub fn mac(&self) -> [u8; 6] {
        let [mac @ .., _, _] = self.mac.load(Ordering::Relaxed).to_le_bytes();
        mac
    }

    /// Changes the MAC address of `tap`, then the NIC's, which stays if the tap's does. The driver
    /// has asked for it, and needs no notification.
    pub(super) fn set_mac(&self, mac: [u8; 6], tap: &impl Backend) -> io::Result<()> {
        if mac != self.mac() {
            tap.set_mac(mac)?;
            let mut state = self.lock();
            self.mac.store(number(mac), Ordering::Relaxed);
            state.generation = state.generation.wrapping_add(1);
        }
        Ok(())
    }

    /// Changes both back to the address that the NIC began with.
    pub(super) fn reset_mac(&self, tap: &impl Backend) -> io::Result<()> {
        self.set_mac(self.own_mac, tap)
    }

    /// The driver has announced itself.
    pub(super) fn announced(&self) {
        self.lock().announce = false;
    }

    /// From now on a driver is notified of changes, and of those before it if it was there then.
    pub(super) fn attach(&self, interrupt: Arc<dyn Interrupt>, announces: bool, resumed: bool) {
        let mut state = self.lock();
        if std::mem::take(&mut state.missed) && resumed {
            interrupt.config();
        }
        state.driver = Some(Driver {
            interrupt,
            announces,
        });
    }

    /// Until the driver is attached again, it is not notified.
    pub(super) fn pause(&self) {
        self.lock().driver = None;
    }

    pub(super) fn save(&self) -> ConfigState {
        let state = self.lock();
        ConfigState {
            mac: self.mac(),
            announce: state.announce,
            generation: state.generation,
        }
    }

    pub(super) fn restore(&self, saved: &ConfigState, tap: &impl Backend) -> io::Result<()> {
        self.set_mac(saved.mac, tap)?;
        let mut state = self.lock();
        state.announce = saved.announce;
        state.generation = saved.generation;
        // Link and MTU may be others here.
        state.missed = true;
        Ok(())
    }

    /// The driver is gone.
    pub(super) fn detach(&self) {
        let mut state = self.lock();
        state.driver = None;
        state.announce = false;
    }

    /// The driver reads.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        let state = self.lock();
        read_at(&state.to_bytes(self.mac()), offset, data);
    }

    /// Changes whenever what can be read has.
    pub(super) fn generation(&self) -> u32 {
        self.lock().generation
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_up(&self) -> bool {
        self.carrier && self.allowed
    }

    fn changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        match &self.driver {
            Some(driver) => driver.interrupt.config(),
            None => self.missed = true,
        }
    }

    /// mac, status, max_virtqueue_pairs, mtu.
    fn to_bytes(&self, mac: [u8; 6]) -> [u8; 12] {
        let mut status = 0;
        if self.is_up() {
            status |= VIRTIO_NET_S_LINK_UP as u16;
        }
        if self.announce {
            status |= VIRTIO_NET_S_ANNOUNCE as u16;
        }
        let mut bytes = [0; 12];
        bytes[..6].copy_from_slice(&mac);
        bytes[6..8].copy_from_slice(&status.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.pairs.to_le_bytes());
        bytes[10..].copy_from_slice(&self.mtu.to_le_bytes());
        bytes
    }
}

fn number([a, b, c, d, e, f]: [u8; 6]) -> u64 {
    u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
}
