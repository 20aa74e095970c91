//! A wire of the bench's own: the lower link of the macvtaps here, its other end over there.

use std::cell::Cell;
use std::os::fd::OwnedFd;

use net::{Macvtap, MacvtapSpec};

use crate::harness::netns::Netns;

/// The veth pair `lower` and `wire`, each end in a namespace of its own.
#[derive(Debug)]
pub struct Wire {
    /// Where the macvtaps' lower link is.
    pub host: Netns,
    /// The other end.
    pub far: Netns,
    macvtaps: Cell<u8>,
}

/// A macvtap on the wire, for one run.
#[derive(Debug)]
pub struct Tap {
    macvtap: Macvtap,
    /// Its address.
    pub mac: [u8; 6],
}

impl Wire {
    /// Makes it. Nothing but the bench speaks on it.
    pub fn new() -> Self {
        let (host, far) = (Netns::new(), Netns::new());
        for netns in [&host, &far] {
            netns.enter(|| {
                // A kernel without IPv6 has no such setting.
                let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            });
        }
        host.veth("lower", &far, "wire");
        Self {
            host,
            far,
            macvtaps: Cell::new(0),
        }
    }

    /// Makes a macvtap as minivmm makes its own. It goes when dropped.
    pub fn macvtap(&self, queues: u16) -> Tap {
        let mac = self.next_mac();
        let mut spec = MacvtapSpec::new("lower".parse().expect("a link's name"));
        spec.mac = Some(text(mac).parse().expect("a MAC address"));
        spec.queues = queues.into();
        let macvtap = self.host.enter(|| Macvtap::open(&spec));
        Tap {
            macvtap: macvtap.unwrap_or_else(|why| panic!("no macvtap: {why:?}")),
            mac,
        }
    }

    /// An address that no macvtap here had lately.
    pub fn next_mac(&self) -> [u8; 6] {
        let number = self.macvtaps.get();
        self.macvtaps.set(number.wrapping_add(1));
        [0x02, 0, 0, 0, 0x0c, number]
    }

    /// How many frames have come to the far end.
    pub fn arrived(&self) -> u64 {
        self.far.counters("wire")[1]
    }
}

impl Tap {
    /// Its queues.
    pub fn queues(&self) -> &[OwnedFd] {
        self.macvtap.queues()
    }
}

/// An address as one writes it.
pub fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
