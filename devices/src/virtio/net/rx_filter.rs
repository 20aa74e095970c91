//! Which frames a driver takes, as QMP's `query-rx-filter` shows it (`RxFilterInfo` of QEMU's
//! qapi/net.json).

use std::collections::BTreeSet;

use serde::Serialize;

use super::filter::{Mac, Rules};
use super::observe::Mac as Written;

/// Of a kind of frames, which ones pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RxState {
    /// Those that the table has.
    Normal,
    /// None.
    None,
    /// All.
    All,
}

/// A NIC's filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RxFilterInfo {
    /// The NIC's name.
    pub name: String,
    /// Everything passes.
    pub promiscuous: bool,
    /// Groups.
    pub multicast: RxState,
    /// Addresses besides the NIC's own.
    pub unicast: RxState,
    /// Frames with a VLAN tag.
    pub vlan: RxState,
    /// Broadcasts pass: always.
    pub broadcast_allowed: bool,
    /// The driver has named more groups than are filtered, so that all pass.
    pub multicast_overflow: bool,
    /// The same of addresses.
    pub unicast_overflow: bool,
    /// The NIC's MAC address.
    pub main_mac: String,
    /// The VLANs that pass.
    pub vlan_table: Vec<u16>,
    /// The addresses that pass besides the NIC's own.
    pub unicast_table: Vec<String>,
    /// The groups that pass.
    pub multicast_table: Vec<String>,
}

impl RxFilterInfo {
    /// What `rules` let pass to the NIC with this name and MAC address.
    pub(super) fn new(name: &str, mac: Mac, rules: &Rules) -> Self {
        // A table that is too long is none, as before the driver has sent any.
        let overflow = |table: &Option<_>| rules.has_table && table.is_none();
        let state = |table: &Option<_>| match table {
            None if !rules.has_table => RxState::All,
            _ => RxState::Normal,
        };
        let texts = |table: &Option<BTreeSet<Mac>>| {
            let macs = table.iter().flatten();
            macs.map(|mac| Written(mac).to_string()).collect()
        };
        Self {
            name: name.to_owned(),
            promiscuous: rules.promiscuous,
            multicast: match rules.all_multicast {
                true => RxState::All,
                false => state(&rules.multicast),
            },
            unicast: state(&rules.unicast),
            vlan: match &rules.vlans {
                None => RxState::All,
                Some(vlans) if vlans.is_empty() => RxState::None,
                Some(_) => RxState::Normal,
            },
            broadcast_allowed: true,
            multicast_overflow: overflow(&rules.multicast),
            unicast_overflow: overflow(&rules.unicast),
            main_mac: Written(&mac).to_string(),
            vlan_table: rules.vlans.iter().flatten().copied().collect(),
            unicast_table: texts(&rules.unicast),
            multicast_table: texts(&rules.multicast),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::features::Features;
    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 0xab];
    const GROUP: Mac = [1, 0, 0x5e, 0, 0, 1];

    #[test]
    fn filter_is_shown_in_the_words_of_qemu() {
        let mut rules = Rules::new(Features::CTRL_VLAN);
        let fresh = RxFilterInfo::new("net0", OWN, &rules);
        let states = |info: &RxFilterInfo| (info.unicast, info.multicast, info.vlan);
        assert_eq!(states(&fresh), (RxState::All, RxState::All, RxState::None));
        rules.set_table(&[], &[GROUP]);
        rules.set_vlan(7, true);
        assert_eq!(
            json!(RxFilterInfo::new("net0", OWN, &rules)),
            json!({
                "name": "net0",
                "promiscuous": false,
                "multicast": "normal",
                "unicast": "normal",
                "vlan": "normal",
                "broadcast-allowed": true,
                "multicast-overflow": false,
                "unicast-overflow": false,
                "main-mac": "02:00:00:00:00:ab",
                "vlan-table": [7],
                "unicast-table": [],
                "multicast-table": ["01:00:5e:00:00:01"],
            })
        );
        rules.set_table(&[OWN; 65], &[]);
        rules.all_multicast = true;
        let full = RxFilterInfo::new("net0", OWN, &rules);
        assert!(full.unicast_overflow && !full.multicast_overflow);
        let wanted = (RxState::Normal, RxState::All, RxState::Normal);
        assert_eq!(states(&full), wanted);
        let plain = RxFilterInfo::new("net0", OWN, &Rules::new(Features::empty()));
        assert_eq!(plain.vlan, RxState::All);
    }
}
