//! What the kernel says of one link (RTM_NEWLINK).

use super::wire::{Attribute, Attributes, u16_of, u32_of};
use crate::mac::MacAddr;
use crate::mode::Mode;

/// What the crate needs to know of one link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    /// Unique in its namespace, and only there.
    pub index: u32,
    pub name: String,
    /// Its alternative names (IFLA_ALT_IFNAME).
    pub alt_names: Vec<String>,
    /// The driver's word for a virtual link (`macvtap`, `bridge`); empty for a real NIC.
    pub kind: String,
    /// None when it isn't six bytes.
    pub mac: Option<[u8; 6]>,
    pub mtu: u32,
    /// For a macvtap: how many frames its queue holds for a slow reader.
    pub tx_queue_len: u32,
    /// For a macvtap or macvlan: how many broadcasts from outside may wait for it.
    pub bc_queue_len: u32,
    /// It was brought up (IFF_UP).
    pub up: bool,
    /// The wire is there (IFF_LOWER_UP).
    pub carrier: bool,
    /// It takes every multicast frame (IFF_ALLMULTI).
    pub all_multicast: bool,
    pub loopback: bool,
    pub ethernet: bool,
    /// The index of the bridge, bond, ... that it is a port of.
    pub master: Option<u32>,
    /// The index of the link that it sits on, when that is in the same namespace.
    pub lower: Option<u32>,
    /// The mode of a macvlan or macvtap.
    pub mode: Option<Mode>,
    /// The senders that a macvlan or macvtap in source mode receives from.
    pub source_macs: Vec<[u8; 6]>,
    /// The link that it sits on in another namespace: our number for that namespace, and the link's index there.
    pub lower_elsewhere: Option<(i32, u32)>,
    /// The mode of an ipvlan.
    pub ipvlan_mode: Option<&'static str>,
    /// Free text (IFLA_IFALIAS); empty for none. What is not UTF-8 is U+FFFD here, as in the name.
    pub alias: String,
}

/// Size of `struct ifinfomsg`, which the attributes follow.
const HEADER: usize = 16;

// include/uapi/linux/if_link.h
const IFLA_MACVLAN_MODE: u16 = 1;
const IFLA_MACVLAN_MACADDR: u16 = 4;
const IFLA_MACVLAN_MACADDR_DATA: u16 = 5;
const IFLA_MACVLAN_BC_QUEUE_LEN: u16 = 7;
const IFLA_IPVLAN_MODE: u16 = 1;

/// The bytes before the attributes of a request about the link with this index, or about all for 0.
pub(super) fn header(index: u32) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes
}

impl Link {
    /// Reads the body of RTM_NEWLINK or RTM_DELLINK, and skips unknown and malformed attributes. None without a header.
    pub(crate) fn parse(body: &[u8]) -> Option<Self> {
        let (header, attributes) = body.split_at_checked(HEADER)?;
        let flags = u32_of(&header[8..])?.cast_signed();
        let mut link = Self {
            index: u32_of(&header[4..])?,
            up: flags & libc::IFF_UP != 0,
            carrier: flags & libc::IFF_LOWER_UP != 0,
            all_multicast: flags & libc::IFF_ALLMULTI != 0,
            loopback: flags & libc::IFF_LOOPBACK != 0,
            ethernet: u16_of(&header[2..])? == libc::ARPHRD_ETHER,
            ..Self::default()
        };
        let mut namespace = None;
        for attribute in Attributes(attributes) {
            let number = u32_of(attribute.value);
            match attribute.kind() {
                libc::IFLA_IFNAME => link.name = attribute.text(),
                libc::IFLA_ADDRESS => link.mac = attribute.value.try_into().ok(),
                libc::IFLA_MTU => link.mtu = number.unwrap_or_default(),
                libc::IFLA_TXQLEN => link.tx_queue_len = number.unwrap_or_default(),
                libc::IFLA_MASTER => link.master = number,
                libc::IFLA_LINK => link.lower = number,
                libc::IFLA_LINK_NETNSID => namespace = number.map(u32::cast_signed),
                libc::IFLA_IFALIAS => link.alias = attribute.text(),
                libc::IFLA_LINKINFO => link.learn(attribute),
                libc::IFLA_PROP_LIST => {
                    let is_name = |one: &Attribute<'_>| one.kind() == libc::IFLA_ALT_IFNAME;
                    let names = attribute.nested().filter(is_name);
                    link.alt_names.extend(names.map(|name| name.text()));
                }
                _ => {}
            }
        }
        if let Some(namespace) = namespace {
            link.lower_elsewhere = link.lower.take().map(|index| (namespace, index));
        }
        Some(link)
    }

    fn learn(&mut self, info: Attribute<'_>) {
        let part = |kind| info.nested().find(|part| part.kind() == kind);
        self.kind = part(libc::IFLA_INFO_KIND).map_or_else(String::new, |kind| kind.text());
        let Some(data) = part(libc::IFLA_INFO_DATA) else {
            return;
        };
        for item in data.nested() {
            match (self.kind.as_str(), item.kind()) {
                ("macvlan" | "macvtap", IFLA_MACVLAN_MODE) => {
                    let mut modes = Mode::ALL.into_iter();
                    self.mode = modes.find(|mode| Some(*mode as u32) == u32_of(item.value));
                }
                ("macvlan" | "macvtap", IFLA_MACVLAN_MACADDR_DATA) => {
                    let macs = item
                        .nested()
                        .filter(|mac| mac.kind() == IFLA_MACVLAN_MACADDR);
                    let macs = macs.filter_map(|mac| mac.value.try_into().ok());
                    self.source_macs = macs.collect();
                }
                ("macvlan" | "macvtap", IFLA_MACVLAN_BC_QUEUE_LEN) => {
                    self.bc_queue_len = u32_of(item.value).unwrap_or_default();
                }
                ("ipvlan", IFLA_IPVLAN_MODE) => {
                    let modes = ["l2", "l3", "l3s"];
                    let mode = u16_of(item.value).map(usize::from);
                    self.ipvlan_mode = mode.and_then(|mode| modes.get(mode).copied());
                }
                _ => {}
            }
        }
    }

    /// Its address, if that is one that a NIC may have.
    pub(crate) fn mac_addr(&self) -> Option<MacAddr> {
        self.mac.and_then(|bytes| bytes.try_into().ok())
    }

    /// Whether `name` is one of its names, which no other link of its namespace then has.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        self.name == name || self.alt_names.iter().any(|other| other == name)
    }

    /// Whether it shares its lower's wire by the macvlan driver.
    pub(crate) fn is_macvlan(&self) -> bool {
        self.kind == "macvlan" || self.is_macvtap()
    }

    /// Whether frames can be read and written through it.
    pub(crate) fn is_macvtap(&self) -> bool {
        self.kind == "macvtap"
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::wire::attribute;
    use super::*;

    fn macvtap() -> [Vec<u8>; 6] {
        let data = [
            attribute(IFLA_MACVLAN_MODE, &8_u32.to_ne_bytes()),
            attribute(IFLA_MACVLAN_BC_QUEUE_LEN, &500_u32.to_ne_bytes()),
        ];
        let info = [
            attribute(libc::IFLA_INFO_KIND, b"macvtap\0"),
            attribute(libc::IFLA_INFO_DATA, &data.concat()),
        ];
        let names = ["tap-of-my-guest", "vm7"]
            .map(|name| attribute(libc::IFLA_ALT_IFNAME, name.as_bytes()));
        [
            attribute(libc::IFLA_IFNAME, b"mvt0\0"),
            attribute(libc::IFLA_LINK, &2_u32.to_ne_bytes()),
            attribute(libc::IFLA_MTU, &1500_u32.to_ne_bytes()),
            attribute(libc::IFLA_IFALIAS, b"B\xfcro\0"),
            attribute(libc::IFLA_LINKINFO, &info.concat()),
            attribute(libc::IFLA_PROP_LIST, &names.concat()),
        ]
    }

    fn expected() -> Link {
        Link {
            index: 9,
            name: "mvt0".to_owned(),
            alt_names: ["tap-of-my-guest", "vm7"].map(str::to_owned).to_vec(),
            kind: "macvtap".to_owned(),
            mtu: 1500,
            bc_queue_len: 500,
            lower: Some(2),
            mode: Some(Mode::Passthru),
            alias: "B\u{fffd}ro".to_owned(),
            ..Link::default()
        }
    }

    #[test]
    fn link_without_a_header_is_none() {
        assert_eq!(Link::parse(&[0; HEADER - 1]), None);
        assert_eq!(Link::parse(&header(9)).unwrap().index, 9);
    }

    #[test]
    fn link_in_another_namespace_than_its_lower_says_so() {
        let attributes = [
            macvtap().concat(),
            attribute(libc::IFLA_LINK_NETNSID, &3_u32.to_ne_bytes()),
        ];
        let link = Link::parse(&[header(9), attributes.concat()].concat()).unwrap();
        assert_eq!((link.lower, link.lower_elsewhere), (None, Some((3, 2))));
    }

    proptest! {
        #[test]
        fn any_bytes_make_no_link_or_some(bytes in vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(Link::parse(&bytes).is_some(), bytes.len() >= HEADER);
        }

        /// Of attributes that this version does not know, wherever they stand and whatever is in them.
        #[test]
        fn link_is_read_whatever_else_is_told_of_it(
            at in 0..=6_usize,
            kind in 200..0x3fff_u16,
            value in vec(any::<u8>(), 0..100),
        ) {
            let mut attributes = macvtap().to_vec();
            attributes.insert(at, attribute(kind, &value));
            let link = Link::parse(&[header(9), attributes.concat()].concat());
            prop_assert_eq!(link, Some(expected()));
        }

        /// And of known ones that are too short or too long.
        #[test]
        fn link_with_an_attribute_of_any_bytes_keeps_its_others(
            which in 1..6_usize,
            value in vec(any::<u8>(), 0..40),
        ) {
            let mut attributes = macvtap();
            let kind = u16::from_ne_bytes([attributes[which][2], attributes[which][3]]);
            attributes[which] = attribute(kind, &value);
            let link = Link::parse(&[header(9), attributes.concat()].concat()).unwrap();
            prop_assert_eq!((link.index, link.name.as_str()), (9, "mvt0"));
        }
    }
}
