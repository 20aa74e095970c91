//! What a link has already, of that which a move would add: an earlier one was interrupted, or is taken back after it was.

use std::collections::HashSet;

use rtnetlink::packet_core::Emitable;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::neighbour::NeighbourMessage;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::packet_route::rule::RuleMessage;

use super::HostLinkProblem;
use super::attached::{neighbour_key, rule_on};
use super::moving::{End, ip_of, leads_over, route_over};
use super::step::Step;
use crate::address::InterfaceAddress;
use crate::netlink::Netlink;

/// All that can be moved in a namespace. There may be thousands.
#[derive(Debug, Default)]
pub(super) struct Everything {
    pub addresses: Vec<AddressMessage>,
    pub routes: Vec<RouteMessage>,
    pub neighbours: Vec<NeighbourMessage>,
    pub rules: Vec<RuleMessage>,
}

impl Everything {
    /// What there is now.
    pub(super) fn of(host: &Netlink) -> Result<Self, HostLinkProblem> {
        let explain = HostLinkProblem::from_step;
        Ok(Self {
            addresses: host.addresses().map_err(explain("list the addresses"))?,
            routes: host.routes().map_err(explain("list the routes"))?,
            neighbours: host.neighbours().map_err(explain("list the neighbours"))?,
            rules: host.rules().map_err(explain("list the policy rules"))?,
        })
    }
}

/// What the link has.
#[derive(Debug, Default)]
pub(super) struct Present {
    addresses: HashSet<(u32, Option<InterfaceAddress>)>,
    /// The messages of all else.
    others: HashSet<Vec<u8>>,
}

impl Present {
    /// What the link `to` has of all that there is.
    pub(super) fn on(to: End<'_>, all: &Everything) -> Self {
        let routes = all.routes.iter().filter(|route| leads_over(route, to));
        let routes = routes.map(|route| route_bytes(route_over(route, to, to)));
        let rules = all.rules.iter().map(|rule| bytes(&rule_on(rule, to, to)));
        let neighbours = all
            .neighbours
            .iter()
            .map(|entry| bytes(&neighbour_key(entry)));
        Self {
            addresses: all.addresses.iter().map(address_key).collect(),
            others: routes.chain(rules).chain(neighbours).collect(),
        }
    }

    /// Whether there is nothing left to do for the step.
    pub(super) fn covers(&self, step: &Step) -> bool {
        match step {
            Step::AddAddress(new) => self.addresses.contains(&address_key(new)),
            Step::AddRoute(new) => self.others.contains(&route_bytes(new.clone())),
            Step::AddNeighbour(new) => self.others.contains(&bytes(&neighbour_key(new))),
            Step::AddRule(new) => self.others.contains(&bytes(new)),
            _ => false,
        }
    }
}

fn address_key(message: &AddressMessage) -> (u32, Option<InterfaceAddress>) {
    (message.header.index, ip_of(message))
}

/// A route without the time that is left to it, which is never the same twice.
fn route_bytes(mut route: RouteMessage) -> Vec<u8> {
    let is_time = |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::Expires(_));
    route.attributes.retain(|attribute| !is_time(attribute));
    bytes(&route)
}

fn bytes(message: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}
