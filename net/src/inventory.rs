//! Who shares which wire, as far as the caller's network namespace shows it.

use serde::{Serialize, Serializer};
use thiserror::Error;

use crate::diagnose::{self, Problem};
use crate::hostlink;
use crate::mac::MacAddr;
use crate::name::LinkName;
use crate::netlink::{Link, Netlink};
use crate::netns;
use crate::owner::Owner;
use crate::stale::Judge;

/// A link that carries others, and those.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LowerInfo {
    /// Where it is. In another namespace nothing but its index is known.
    #[serde(skip)]
    pub place: Place,
    /// Its name.
    pub name: Option<String>,
    /// Its interface index in its place.
    pub index: u32,
    /// None also when it is no Ethernet link.
    pub mac: Option<MacAddr>,
    /// In bytes, without the Ethernet header.
    pub mtu: Option<u32>,
    /// It is administratively up (IFF_UP).
    pub up: Option<bool>,
    /// The wire is there (IFF_LOWER_UP).
    pub carrier: Option<bool>,
    /// The links on it that this namespace has; those that are in others, such as the private ones of
    /// [`Macvtap`](crate::Macvtap), don't show.
    #[serde(rename = "links")]
    pub uppers: Vec<UpperInfo>,
}

/// A network namespace, as seen from the caller's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// The caller's.
    #[default]
    Here,
    /// Another, by the number that the caller's namespace has for it (`ip netns list-id`).
    Other(i32),
}

/// A link that shares the wire of another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct UpperInfo {
    /// Its name.
    pub name: String,
    /// Its interface index.
    pub index: u32,
    /// Its driver: `macvlan`, `macvtap` or `ipvlan`.
    pub kind: String,
    /// As ip-link(8) has it: `bridge`, `vepa`, ... and for an ipvlan `l2`, `l3` or `l3s`.
    pub mode: Option<&'static str>,
    /// None when it is none that a NIC may have.
    pub mac: Option<MacAddr>,
    /// In bytes, without the Ethernet header.
    pub mtu: u32,
    /// It is administratively up (IFF_UP).
    pub up: bool,
    /// The wire is there (IFF_LOWER_UP).
    pub carrier: bool,
    /// The process that it belongs to, if it says so.
    #[serde(serialize_with = "as_text")]
    pub owner: Option<Owner>,
    /// That process has ended, and no other uses it: [`delete_stale`](crate::delete_stale()) deletes it.
    pub leaked: bool,
    /// It is the host's own among its guests, see [`HostLink`](crate::HostLink).
    pub host_link: bool,
    /// That, and the addresses of the lower were moved onto it.
    #[serde(skip)]
    pub moved: bool,
    /// Its alias, whatever it means.
    #[serde(skip)]
    pub alias: String,
}

fn as_text<S: Serializer>(owner: &Option<Owner>, serializer: S) -> Result<S::Ok, S::Error> {
    owner.as_ref().map(Owner::describe).serialize(serializer)
}

/// The links could not be listed.
#[derive(Debug, Error)]
#[error("cannot list who shares a wire")]
pub struct InventoryError(#[source] Problem);

/// Every macvtap, macvlan and ipvlan of the caller's network namespace by the link that it sits on; or those on `link`
/// alone, which may then be none.
///
/// # Errors
///
/// When there is no such link, or the kernel does not list them.
pub fn inventory(link: Option<&LinkName>) -> Result<Vec<LowerInfo>, InventoryError> {
    let list = || {
        let links = Netlink::connect()
            .and_then(|host| host.links())
            .map_err(Problem::from_step("list the network interfaces"))?;
        let mut found = group(&links);
        if let Some(name) = link {
            let link = diagnose::find(&links, name.as_str())?;
            let lower = diagnose::real_device(&links, link);
            found.retain(|info| info.place == Place::Here && info.index == lower.index);
            if found.is_empty() {
                found.push(LowerInfo::of(lower));
            }
        }
        judge(&mut found, &links);
        Ok(found)
    };
    netns::on_own_thread(list)
        .map_err(Problem::from_step("start a thread"))
        .and_then(|found| found)
        .map_err(InventoryError)
}

/// Finds out whose the links on them are, and which are stale.
fn judge(lowers: &mut [LowerInfo], links: &[Link]) {
    let judge = Judge::new();
    for upper in lowers.iter_mut().flat_map(|lower| &mut lower.uppers) {
        if let Some(link) = diagnose::by_index(links, Some(upper.index)) {
            upper.owner = judge.owner_of(link);
            upper.leaked = judge.stale_owner(link).is_some();
        }
    }
}

/// The links that carry others, in the order of their places and indexes, with those in the order of their indexes.
fn group(links: &[Link]) -> Vec<LowerInfo> {
    let mut lowers: Vec<LowerInfo> = Vec::new();
    for link in links {
        let Some(upper) = UpperInfo::of(link) else {
            continue;
        };
        let (place, index) = match (link.lower, link.lower_elsewhere) {
            (Some(index), _) => (Place::Here, index),
            (None, Some((namespace, index))) => (Place::Other(namespace), index),
            (None, None) => continue,
        };
        let known = lowers
            .iter_mut()
            .find(|lower| (lower.place, lower.index) == (place, index));
        match known {
            Some(lower) => lower.uppers.push(upper),
            None => {
                let here = diagnose::by_index(links, link.lower).map(LowerInfo::of);
                lowers.push(LowerInfo {
                    place,
                    index,
                    uppers: vec![upper],
                    ..here.unwrap_or_default()
                });
            }
        }
    }
    lowers.sort_by_key(|lower| (lower.place, lower.index));
    lowers
        .iter_mut()
        .for_each(|lower| lower.uppers.sort_by_key(|upper| upper.index));
    lowers
}

impl LowerInfo {
    fn of(link: &Link) -> Self {
        Self {
            index: link.index,
            name: Some(link.name.clone()),
            mac: link.mac_addr(),
            mtu: Some(link.mtu),
            up: Some(link.up),
            carrier: Some(link.carrier),
            ..Self::default()
        }
    }
}

impl UpperInfo {
    fn of(link: &Link) -> Option<Self> {
        if !link.is_macvlan() && link.kind != "ipvlan" {
            return None;
        }
        let tag = hostlink::Tag::from_alias(&link.alias);
        Some(Self {
            name: link.name.clone(),
            index: link.index,
            kind: link.kind.clone(),
            mode: link.mode.map(crate::Mode::as_str).or(link.ipvlan_mode),
            mac: link.mac_addr(),
            mtu: link.mtu,
            up: link.up,
            carrier: link.carrier,
            owner: link.alias.parse().ok(),
            leaked: false,
            host_link: tag.is_some(),
            moved: tag.is_some_and(|tag| tag.moved),
            alias: link.alias.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Mode;

    fn link(index: u32, kind: &str, lower: Option<u32>) -> Link {
        Link {
            index,
            kind: kind.to_owned(),
            name: format!("{kind}{index}"),
            lower,
            ..Link::default()
        }
    }

    #[test]
    fn inventory_groups_by_lower_and_place() {
        let mut far = link(9, "macvtap", None);
        far.lower_elsewhere = Some((4, 2));
        let mut near = link(7, "macvtap", Some(2));
        near.mode = Some(Mode::Vepa);
        let links = [
            link(1, "", None),
            link(2, "", None),
            far,
            link(8, "ipvlan", Some(3)),
            near,
            link(5, "macvlan", Some(2)),
            // Shares no wire: it has tags of its own.
            link(6, "vlan", Some(2)),
            link(3, "bond", None),
        ];
        let found = group(&links);
        let shape: Vec<_> = found
            .iter()
            .map(|lower| {
                let uppers: Vec<_> = lower.uppers.iter().map(|upper| upper.index).collect();
                (lower.place, lower.index, lower.name.as_deref(), uppers)
            })
            .collect();
        assert_eq!(
            shape,
            [
                (Place::Here, 2, Some("2"), vec![5, 7]),
                (Place::Here, 3, Some("bond3"), vec![8]),
                (Place::Other(4), 2, None, vec![9]),
            ]
        );
        assert_eq!(found[0].uppers[1].mode, Some("vepa"));
    }

    #[test]
    fn inventory_reads_what_an_alias_says() {
        let owner = Owner::this_process().unwrap();
        let aliases = [
            owner.to_string(),
            "host-link moved".to_owned(),
            "mine".to_owned(),
        ];
        let found = aliases.map(|alias| {
            let upper = UpperInfo::of(&Link {
                alias,
                ..link(1, "macvlan", Some(2))
            })
            .unwrap();
            (upper.owner.is_some(), upper.host_link)
        });
        assert_eq!(found, [(true, false), (false, true), (false, false)]);
    }
}
