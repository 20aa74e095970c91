//! Which steps of a move are done already: an earlier move was interrupted, or is undone after that.

use std::collections::HashSet;

use rtnetlink::packet_core::Emitable;
use rtnetlink::packet_route::route::RouteAttribute;

use super::moving::{End, Everything, ip_of, leads_over, neighbour_key, route_over, rule_on};
use super::step::Step;
use crate::netlink::Object;

/// The keys of what a link has.
#[derive(Debug, Default)]
pub(super) struct Present(HashSet<Vec<u8>>);

impl Present {
    /// What the link `to` has of all that there is.
    pub(super) fn on(to: End<'_>, all: &Everything) -> Self {
        let routes = all.routes.iter().filter(|route| leads_over(route, to));
        let routes = routes.map(|route| Object::Route(route_over(route, to, to)));
        let rules = all.rules.iter().map(|rule| rule_on(rule, to, to));
        let objects = routes
            .chain(rules.map(Object::Rule))
            .chain(all.neighbours.iter().cloned().map(Object::Neighbour))
            .chain(all.addresses.iter().cloned().map(Object::Address));
        Self(objects.map(|object| key(&object)).collect())
    }

    /// Whether the step has been taken.
    pub(super) fn covers(&self, step: &Step) -> bool {
        matches!(step, Step::Add(object) if self.0.contains(&key(object)))
    }
}

/// What two objects have in common that stand for the same thing.
fn key(object: &Object) -> Vec<u8> {
    match object {
        Object::Address(address) => {
            format!("{} {:?}", address.header.index, ip_of(address)).into_bytes()
        }
        Object::Route(route) => {
            let mut route = route.clone();
            // The time that is left to it is never the same twice.
            let lasts =
                |attribute: &RouteAttribute| !matches!(attribute, RouteAttribute::Expires(_));
            route.attributes.retain(lasts);
            bytes(&route)
        }
        Object::Neighbour(entry) => bytes(&neighbour_key(entry)),
        Object::Rule(rule) => bytes(rule),
    }
}

fn bytes(message: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}
