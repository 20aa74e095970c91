//! What somebody has tied to a link besides addresses and routes: neighbour entries, and policy rules by its name. Pure.

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::neighbour::{
    NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleFlags, RuleMessage};

use super::moving::End;
use super::step::Step;

/// What has to be done to move `neighbours` and `rules` that are `from`'s: before addresses and routes move, and before
/// `from` loses its addresses. In between both links have them.
pub(super) fn plan(
    from: End<'_>,
    to: End<'_>,
    neighbours: &[NeighbourMessage],
    rules: &[RuleMessage],
) -> (Vec<Step>, Vec<Step>) {
    let given = || neighbours.iter().filter(|entry| is_given(entry, from));
    let named = || rules.iter().filter(|rule| names(rule, from));
    let added = given()
        .map(|entry| Step::AddNeighbour(neighbour_on(entry, to)))
        .chain(named().map(|rule| Step::AddRule(rule_on(rule, from, to))));
    let gone = named()
        .map(|rule| Step::DeleteRule(rule_on(rule, from, from)))
        .chain(given().map(|entry| Step::DeleteNeighbour(neighbour_on(entry, from))));
    (added.collect(), gone.collect())
}

/// Whether `entry` is one of `from`'s that the kernel has not learnt, or made up for a group, by itself.
fn is_given(entry: &NeighbourMessage, from: End<'_>) -> bool {
    let header = &entry.header;
    // The kernel gives groups and broadcasts such entries: their MAC addresses have the group bit.
    let to_one = || {
        entry.attributes.iter().any(|attribute| {
            matches!(attribute, NeighbourAttribute::LinkLayerAddress(mac) if mac.first().is_some_and(|first| first & 1 == 0) && mac.iter().any(|byte| *byte != 0))
        })
    };
    let given = match header.state {
        NeighbourState::Permanent => true,
        NeighbourState::Noarp => to_one(),
        _ => header.flags.contains(NeighbourFlags::Proxy) || is_managed(entry),
    };
    given
        && header.ifindex == from.index
        && matches!(header.family, AddressFamily::Inet | AddressFamily::Inet6)
}

/// Whether the kernel was told to keep looking for that neighbour.
fn is_managed(entry: &NeighbourMessage) -> bool {
    let managed = |attribute: &NeighbourAttribute| matches!(attribute, NeighbourAttribute::ExtFlags(flags) if flags.contains(NeighbourExtFlags::Managed));
    entry.attributes.iter().any(managed)
}

fn neighbour_on(entry: &NeighbourMessage, to: End<'_>) -> NeighbourMessage {
    let managed = is_managed(entry);
    let mut moved = entry.clone();
    moved.header.ifindex = to.index;
    moved.header.flags &= NeighbourFlags::Proxy | NeighbourFlags::Router;
    if managed {
        // Found again by the kernel.
        moved.header.state = NeighbourState::None;
    }
    moved.attributes.retain_mut(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(_) => !managed,
        NeighbourAttribute::ExtFlags(flags) => {
            *flags &= NeighbourExtFlags::Managed;
            managed
        }
        NeighbourAttribute::Destination(_) | NeighbourAttribute::Protocol(_) => true,
        _ => false,
    });
    moved
}

/// What tells a neighbour entry from all others.
pub(super) fn neighbour_key(entry: &NeighbourMessage) -> NeighbourMessage {
    let mut key = NeighbourMessage::default();
    key.header.family = entry.header.family;
    key.header.ifindex = entry.header.ifindex;
    key.header.flags = entry.header.flags & NeighbourFlags::Proxy;
    let is_destination =
        |attribute: &&NeighbourAttribute| matches!(attribute, NeighbourAttribute::Destination(_));
    key.attributes = entry
        .attributes
        .iter()
        .filter(is_destination)
        .cloned()
        .collect();
    key
}

fn names(rule: &RuleMessage, from: End<'_>) -> bool {
    rule.attributes.iter().any(|attribute| {
        matches!(attribute, RuleAttribute::Iifname(name) | RuleAttribute::Oifname(name) if name == from.name)
    })
}

/// `rule`, which names `from`, naming `to` in its stead.
pub(super) fn rule_on(rule: &RuleMessage, from: End<'_>, to: End<'_>) -> RuleMessage {
    let mut moved = rule.clone();
    // All others are the kernel's remarks.
    moved.header.flags &= RuleFlags::Invert;
    for attribute in &mut moved.attributes {
        if let RuleAttribute::Iifname(name) | RuleAttribute::Oifname(name) = attribute
            && name == from.name
        {
            *name = to.name.to_owned();
        }
    }
    moved
}
