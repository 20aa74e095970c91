//! Macvtaps that share a wire from other network namespaces: no list of links shows them, but somebody may know.

use super::{Check, Facts};
use crate::diagnose;
use crate::identity::LinkId;
use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::netlink::Link;

/// A macvtap that the caller of [`diagnose_host`](crate::diagnose_host()) knows of, wherever it lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its name in its own network namespace.
    pub name: String,
    /// Which link it is, where that is known.
    pub id: Option<LinkId>,
    /// Which link it stands on.
    pub lower: LinkId,
    /// Its address.
    pub mac: MacAddr,
    /// Its guest's, which should be the same.
    pub guest_mac: MacAddr,
    /// It takes every multicast frame no longer.
    pub filters_multicast: bool,
    /// How it treats its siblings, where that is known.
    pub mode: Option<Mode>,
    /// The process that uses it.
    pub pid: u32,
}

/// Those that stand on links of `namespace`, which has `links`, and are not among these: as links with indexes that no
/// real one has, each with its process.
pub(super) fn out_of_sight(
    neighbours: &[Neighbour],
    links: &[Link],
    namespace: u64,
) -> Vec<(Link, u32)> {
    let is_hidden = |neighbour: &&Neighbour| match neighbour.id {
        Some(id) => id.namespace != namespace,
        None => links.iter().all(|link| link.name != neighbour.name),
    };
    let on_ours = neighbours
        .iter()
        .filter(|neighbour| neighbour.lower.namespace == namespace);
    let as_link = |(index, neighbour): (u32, &Neighbour)| {
        let link = Link {
            index,
            name: format!("{} of pid {}", neighbour.name, neighbour.pid),
            kind: "macvtap".to_owned(),
            mac: Some(neighbour.mac.octets()),
            lower: Some(neighbour.lower.index),
            mode: neighbour.mode,
            up: true,
            ethernet: true,
            ..Link::default()
        };
        (link, neighbour.pid)
    };
    // The kernel's indexes are positive ints.
    let indexes = (0..=u32::MAX).rev();
    indexes
        .zip(on_ours.filter(is_hidden))
        .map(as_link)
        .collect()
}

/// A macvtap that is no longer as its guest needs it.
#[derive(Clone, Debug)]
pub(super) struct Changed {
    neighbour: Neighbour,
    /// Its lower's index, if that is in this namespace.
    lower: Option<u32>,
    /// What it is called in this namespace, if it is there.
    name: Option<String>,
}

/// Those that are in `namespace`, which has `links`, or stand on one of these.
pub(super) fn changed(neighbours: &[Neighbour], links: &[Link], namespace: u64) -> Vec<Changed> {
    let index_here = |id: LinkId| (id.namespace == namespace).then_some(id.index);
    let judge = |neighbour: &Neighbour| {
        let link = diagnose::by_index(links, neighbour.id.and_then(index_here));
        Changed {
            neighbour: neighbour.clone(),
            lower: index_here(neighbour.lower),
            name: link.map(|link| link.name.clone()),
        }
    };
    neighbours
        .iter()
        .filter(|neighbour| neighbour.mac != neighbour.guest_mac || neighbour.filters_multicast)
        .map(judge)
        .filter(|changed| changed.lower.is_some() || changed.name.is_some())
        .collect()
}

/// Whether the macvtaps of running guests are as these need them: all, or those on the link with the index `only`.
pub(super) fn guests(facts: &Facts, only: Option<u32>) -> Check {
    let check = "running guests";
    let (mut messages, mut remedies) = (Vec::new(), Vec::new());
    let all = facts.changed.iter();
    for changed in all.filter(|changed| only.is_none() || changed.lower == only) {
        let Neighbour {
            mac,
            guest_mac,
            pid,
            ..
        } = changed.neighbour;
        let name = changed.name.as_ref().unwrap_or(&changed.neighbour.name);
        let mut tell = |message: String, set: String| {
            messages.push(format!("`{name}` of pid {pid} {message}"));
            remedies.push(match changed.name {
                Some(_) => format!("`ip link set {name} {set}`"),
                None => format!(
                    "`ip link set {name} {set}` in the network namespace that has it, or start \
                     that guest again"
                ),
            });
        };
        if mac != guest_mac {
            tell(
                format!(
                    "has the MAC address {mac}, but its guest has {guest_mac} and gets no frame"
                ),
                format!("address {guest_mac}"),
            );
        }
        if changed.neighbour.filters_multicast {
            tell(
                "filters multicast, so IPv6 neighbours may not find its guest".to_owned(),
                "allmulticast on".to_owned(),
            );
        }
    }
    match messages.is_empty() {
        true => Check::ok(check, "nobody has changed the macvtap of one"),
        false => Check::warn(check, messages.join("; "), remedies.join("; ")),
    }
}

impl Facts {
    /// The process that uses a link, if that is one of another namespace, which no command here could change.
    pub(super) fn user_of(&self, link: &Link) -> Option<u32> {
        let mut neighbours = self.neighbours.iter();
        let (_, pid) = neighbours.find(|(neighbour, _)| neighbour.index == link.index)?;
        Some(*pid)
    }
}
