//! Macvtaps that share a wire from other network namespaces: no list of links shows them, but the caller may know them.

use super::{Check, Facts};
use crate::diagnose;
use crate::mac::MacAddr;
use crate::macvtap::TapInfo;
use crate::netlink::Link;

/// A macvtap that the caller of [`diagnose_host`](crate::diagnose_host()) knows of, in whichever namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// What it is.
    pub tap: TapInfo,
    /// Its guest's MAC address, which should be the same.
    pub guest_mac: MacAddr,
    /// It no longer takes every multicast frame.
    pub filters_multicast: bool,
    /// The process that uses it.
    pub pid: u32,
}

impl Neighbour {
    /// The index of its lower in `namespace`, if that is there.
    fn lower_in(&self, namespace: u64) -> Option<u32> {
        let lower = self.tap.lower_id?;
        (lower.namespace == namespace).then_some(lower.index)
    }
}

/// Those of other namespaces on links of this one, which has `links`: as links with indexes that no real one has, each
/// with its process.
pub(super) fn out_of_sight(facts: &Facts, links: &[Link]) -> Vec<(Link, u32)> {
    let is_hidden = |neighbour: &&Neighbour| match neighbour.tap.id {
        Some(id) => id.namespace != facts.namespace,
        None => links.iter().all(|link| link.name != neighbour.tap.name),
    };
    let as_link = |(index, neighbour): (u32, &Neighbour)| {
        let link = Link {
            index,
            name: format!("{} of pid {}", neighbour.tap.name, neighbour.pid),
            kind: "macvtap".to_owned(),
            mac: Some(neighbour.tap.mac.octets()),
            lower: Some(neighbour.lower_in(facts.namespace)?),
            mode: neighbour.tap.mode,
            up: true,
            ethernet: true,
            ..Link::default()
        };
        Some((link, neighbour.pid))
    };
    // The kernel's indexes are positive ints.
    let indexes = (0..=u32::MAX).rev();
    let hidden = facts.neighbours.iter().filter(is_hidden);
    indexes.zip(hidden).filter_map(as_link).collect()
}

/// Whether the macvtaps of running guests are as these need them: all that are here or stand on `links`, or those on the
/// link with the index `only`.
pub(super) fn guests(facts: &Facts, links: &[Link], only: Option<u32>) -> Check {
    let check = "running guests";
    let (mut messages, mut remedies) = (Vec::new(), Vec::new());
    for neighbour in &facts.neighbours {
        let lower = neighbour.lower_in(facts.namespace);
        let index = neighbour
            .tap
            .id
            .filter(|id| id.namespace == facts.namespace);
        let here = diagnose::by_index(links, index.map(|id| id.index));
        if (lower.is_none() && here.is_none()) || (only.is_some() && lower != only) {
            continue;
        }
        let name = here.map_or(&neighbour.tap.name, |link| &link.name);
        let (pid, guest_mac) = (neighbour.pid, neighbour.guest_mac);
        let mut complain = |message: &str, set: &str| {
            messages.push(format!("`{name}` of pid {pid} {message}"));
            let elsewhere = match here {
                Some(_) => "",
                None => " in the network namespace that has it, or start that guest again",
            };
            remedies.push(format!("`ip link set {name} {set}`{elsewhere}"));
        };
        if neighbour.tap.mac != guest_mac {
            let mac = neighbour.tap.mac;
            complain(
                &format!(
                    "has the MAC address {mac}, but its guest has {guest_mac} and gets no frame"
                ),
                &format!("address {guest_mac}"),
            );
        }
        if neighbour.filters_multicast {
            complain(
                "filters multicast, so IPv6 neighbours may not find its guest",
                "allmulticast on",
            );
        }
    }
    if messages.is_empty() {
        return Check::ok(check, "their macvtaps are as they need them");
    }
    Check::warn(check, messages.join("; "), remedies.join("; "))
}
