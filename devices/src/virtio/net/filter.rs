//! Which received frames the driver takes: what it has negotiated, and what it said by the control
//! queue's RX, MAC, VLAN and offload commands (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3 and 5.1.6.5.6).
//!
//! The host delivers what is sent to the NIC's MAC address, to all, and to any group. A guest on a
//! busy network is woken less when what it has not asked for is dropped before it takes a buffer.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::config::ConfigSpace;
use super::features::{Features, Offloads};
use super::rx_filter::RxFilterInfo;
use crate::events::{DeviceEvent, EventSink};
use crate::lock;

/// A MAC address.
pub(super) type Mac = [u8; 6];

/// The most addresses of a kind that are filtered; with more, all of that kind pass.
const MAX_ADDRESSES: usize = 64;
const BROADCAST: Mac = [0xff; 6];
/// VLAN ids have 12 bits (IEEE 802.1Q); the others of a tag are priority and eligibility.
const VLAN_ID: u16 = 0xfff;

/// What the driver takes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// Everything.
    pub promiscuous: bool,
    /// All groups.
    pub all_multicast: bool,
    /// What may be left to the driver in a frame.
    pub offloads: Offloads,
    /// How many queue pairs take frames, from the first on.
    pub pairs: u16,
    /// The driver has sent its table.
    pub(super) has_table: bool,
    /// The other addresses that the driver listed; `None` for any.
    pub(super) unicast: Option<BTreeSet<Mac>>,
    /// The groups that the driver listed; `None` for any.
    pub(super) multicast: Option<BTreeSet<Mac>>,
    /// The VLANs that the driver listed; `None` for any.
    pub(super) vlans: Option<BTreeSet<u16>>,
}

impl Rules {
    /// What a driver that took these features gets before its first command. One with CTRL_VLAN
    /// gets no tagged frame before it has named a VLAN.
    pub fn new(features: Features) -> Self {
        let with_vlans = features.contains(Features::CTRL_VLAN);
        Self {
            offloads: features.offloads(),
            pairs: 1,
            vlans: with_vlans.then(BTreeSet::new),
            ..Self::default()
        }
    }

    /// The driver sends its table: addresses besides the NIC's own, and groups.
    pub fn set_table(&mut self, unicast: &[Mac], multicast: &[Mac]) {
        let table =
            |macs: &[Mac]| (macs.len() <= MAX_ADDRESSES).then(|| macs.iter().copied().collect());
        self.has_table = true;
        self.unicast = table(unicast);
        self.multicast = table(multicast);
    }

    /// The driver adds a VLAN, or takes one away. False when there is no such VLAN.
    pub fn set_vlan(&mut self, id: u16, wanted: bool) -> bool {
        let Some(vlans) = self.vlans.as_mut().filter(|_| id <= VLAN_ID) else {
            return false;
        };
        if wanted {
            vlans.insert(id);
        } else {
            vlans.remove(&id);
        }
        true
    }

    /// Whether there is a frame that the driver does not want.
    pub fn may_drop(&self) -> bool {
        let listed = self.vlans.is_some() || self.unicast.is_some() || self.multicast.is_some();
        listed && !self.promiscuous
    }

    /// Whether the driver of a NIC with the address `own` wants a frame to `to` with this VLAN tag.
    pub fn pass(&self, own: Mac, to: Mac, tag: Option<u16>) -> bool {
        if self.promiscuous {
            return true;
        }
        // A tag with the id 0 has a priority and no VLAN.
        let vlan = tag.map(|tag| tag & VLAN_ID).filter(|&id| id != 0);
        if let (Some(vlans), Some(id)) = (&self.vlans, vlan)
            && !vlans.contains(&id)
        {
            return false;
        }
        let listed =
            |table: &Option<BTreeSet<Mac>>| table.as_ref().is_none_or(|table| table.contains(&to));
        let is_multicast = to[0] & 1 != 0;
        to == BROADCAST
            || is_multicast && (self.all_multicast || listed(&self.multicast))
            || !is_multicast && (to == own || listed(&self.unicast))
    }
}

/// The rules as the control queue sets them and the receive queues read them. A receive queue keeps
/// a copy, and takes a new one only when there is one.
#[derive(Debug)]
pub struct Filter {
    /// Has the NIC's MAC address.
    config: Arc<ConfigSpace>,
    changes: AtomicU32,
    rules: Mutex<Rules>,
    events: EventSink,
    /// A change has been reported, and the filter has not been asked for since.
    is_reported: AtomicBool,
}

impl Filter {
    /// Lets everything pass to the NIC whose configuration space this is. Changes are reported to
    /// `events`.
    pub fn new(config: Arc<ConfigSpace>, events: EventSink) -> Self {
        Self {
            config,
            changes: AtomicU32::new(0),
            rules: Mutex::default(),
            events,
            is_reported: AtomicBool::new(false),
        }
    }

    /// The NIC's own address.
    pub fn own(&self) -> Mac {
        self.config.mac()
    }

    /// Changes the rules.
    pub fn change<T>(&self, change: impl FnOnce(&mut Rules) -> T) -> T {
        let mut rules = lock(&self.rules);
        let result = change(&mut rules);
        self.changes.fetch_add(1, Ordering::Release);
        result
    }

    /// The driver changes the rules.
    pub fn change_by_driver<T>(&self, change: impl FnOnce(&mut Rules) -> T) -> T {
        let result = self.change(change);
        self.report();
        result
    }

    /// Reports that the driver has changed the rules or its MAC address, if the filter was asked for
    /// since the last time.
    pub fn report(&self) {
        if !self.is_reported.swap(true, Ordering::AcqRel) {
            self.events.report(DeviceEvent::RxFilterChanged);
        }
    }

    /// What passes to the NIC with this name. The next change is reported again.
    pub fn query(&self, name: &str) -> RxFilterInfo {
        // Before the rules are read: a change after that is reported.
        self.is_reported.store(false, Ordering::Release);
        let rules = lock(&self.rules);
        RxFilterInfo::new(name, self.own(), &rules)
    }

    /// Brings a receive queue's copy, of which it knows the number, up to date.
    pub fn refresh(&self, number: &mut u32, copy: &mut Rules) {
        let changes = self.changes.load(Ordering::Acquire);
        if *number != changes {
            // The lock is taken after the number is read: a change in between is seen twice.
            *number = changes;
            copy.clone_from(&lock(&self.rules));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::NetConfig;
    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 2];
    const GROUP: Mac = [1, 0, 0x5e, 0, 0, 1];
    const OTHER_GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];

    fn passes(rules: &Rules) -> [bool; 5] {
        [OWN, OTHER, GROUP, OTHER_GROUP, BROADCAST].map(|to| rules.pass(OWN, to, None))
    }

    #[test]
    fn rules_follow_the_drivers_commands() {
        let fresh = Rules::new(Features::empty());
        assert!(!fresh.may_drop());
        assert_eq!(passes(&fresh), [true; 5]);

        let mut listed = fresh.clone();
        listed.set_table(&[], &[GROUP]);
        assert!(listed.may_drop());
        assert_eq!(passes(&listed), [true, false, true, false, true]);

        let mut more = listed.clone();
        more.set_table(&[OTHER], &[]);
        assert_eq!(passes(&more), [true, true, false, false, true]);

        let groups = Rules {
            all_multicast: true,
            ..listed.clone()
        };
        assert_eq!(passes(&groups), [true, false, true, true, true]);

        let all = Rules {
            promiscuous: true,
            ..listed
        };
        assert!(!all.may_drop());
        assert_eq!(passes(&all), [true; 5]);
    }

    #[test]
    fn table_that_is_too_long_lets_all_of_its_kind_pass() {
        let mut rules = Rules::new(Features::empty());
        let many: Vec<Mac> = (0..=MAX_ADDRESSES as u8)
            .map(|n| [1, 0, 0, 0, 0, n])
            .collect();
        rules.set_table(&[], &many);
        assert_eq!(passes(&rules), [true, false, true, true, true]);
    }

    #[test]
    fn vlans_pass_once_they_are_named() {
        let mut rules = Rules::new(Features::CTRL_VLAN);
        let tag = Some(0x6005);
        assert!(rules.may_drop() && !rules.pass(OWN, OWN, tag));
        assert!(rules.pass(OWN, OWN, None) && rules.pass(OWN, OWN, Some(0x6000)));
        assert!(
            rules.set_vlan(5, true) && rules.pass(OWN, OWN, tag) && !rules.pass(OWN, OWN, Some(6))
        );
        assert!(rules.set_vlan(5, false) && !rules.pass(OWN, OWN, tag));
        assert!(!rules.set_vlan(4096, true));
        assert!(!Rules::new(Features::empty()).set_vlan(5, true));
        rules.promiscuous = true;
        assert!(rules.pass(OWN, OWN, tag));
        assert!(Rules::new(Features::empty()).pass(OWN, OWN, tag));
    }

    #[test]
    fn copy_follows_changes_alone() {
        let config = NetConfig {
            mac: OWN,
            mtu: 1500,
        };
        let filter = Filter::new(
            Arc::new(ConfigSpace::new(config, 1, EventSink::default())),
            EventSink::default(),
        );
        let (mut number, mut copy) = (0, Rules::default());
        filter.change(|rules| rules.promiscuous = true);
        filter.refresh(&mut number, &mut copy);
        assert!(copy.promiscuous);
        copy.promiscuous = false;
        filter.refresh(&mut number, &mut copy);
        assert!(!copy.promiscuous, "nothing new to take");
    }
}
