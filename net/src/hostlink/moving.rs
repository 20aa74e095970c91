//! Moving addresses, routes, neighbour entries and policy rules from one link to another: the plan, which is pure.

use std::collections::HashSet;
use std::net::IpAddr;

use rtnetlink::packet_core::Emitable;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags,
    RouteProtocol, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleFlags, RuleMessage};

use super::HostLinkProblem;
use super::step::Step;
use crate::address::{InterfaceAddress, is_link_local};
use crate::diagnose::Problem;
use crate::netlink::{Link, Netlink, Object};

/// What a move needs to know of a link.
#[derive(Clone, Copy, Debug)]
pub(super) struct End<'a> {
    pub index: u32,
    pub name: &'a str,
}

impl<'a> From<&'a Link> for End<'a> {
    fn from(link: &'a Link) -> Self {
        Self {
            index: link.index,
            name: &link.name,
        }
    }
}

/// All that can be moved in a namespace, addresses in the order in which they were made. There may be thousands.
pub(super) fn everything(host: &Netlink) -> Result<Vec<Object>, HostLinkProblem> {
    let explain = Problem::from_step;
    let addresses = host.addresses().map_err(explain("list the addresses"))?;
    let routes = host.routes().map_err(explain("list the routes"))?;
    let neighbours = host.neighbours().map_err(explain("list the neighbours"))?;
    let rules = host.rules().map_err(explain("list the policy rules"))?;
    // The kernel lists IPv4 addresses as they came, a primary before its secondaries, and IPv6 ones the newest first
    // (`ipv6_link_dev_addr` in net/ipv6/addrconf.c). It prefers those that are listed first.
    let is_v6 = |address: &AddressMessage| address.header.family == AddressFamily::Inet6;
    let (six, four): (Vec<_>, Vec<_>) = addresses.into_iter().partition(is_v6);
    let addresses = four.into_iter().chain(six.into_iter().rev());
    let objects = addresses.map(Object::Address);
    let objects = objects.chain(routes.into_iter().map(Object::Route));
    let objects = objects.chain(neighbours.into_iter().map(Object::Neighbour));
    Ok(objects.chain(rules.into_iter().map(Object::Rule)).collect())
}

/// Whether an object is tied to `from`, and goes along when its addresses are moved.
fn is_of(object: &Object, from: End<'_>) -> bool {
    match object {
        Object::Address(address) => moves(address, from),
        Object::Route(route) => leads_over(route, from),
        Object::Neighbour(entry) => is_set(entry, from),
        Object::Rule(rule) => names(rule, from),
    }
}

/// An object of `from` as it has to be on `to`.
fn moved(object: &Object, from: End<'_>, to: End<'_>) -> Object {
    match object {
        Object::Address(address) => Object::Address(address_on(address, from, to)),
        Object::Route(route) => Object::Route(route_over(route, from, to)),
        Object::Neighbour(entry) => Object::Neighbour(neighbour_on(entry, to)),
        Object::Rule(rule) => Object::Rule(rule_on(rule, from, to)),
    }
}

/// The steps that move those of `all` that are `from`'s and not link-local ones.
///
/// A route through a gateway can be made only where another route leads to that gateway, and so it is when moving
/// back. So for a time both links have the addresses and the routes on the link, and meanwhile those through a gateway
/// change over.
pub(super) fn plan(
    from: End<'_>,
    to: End<'_>,
    all: &[Object],
) -> Result<Vec<Step>, HostLinkProblem> {
    let [mut neighbours, mut rules, mut addresses] = [const { Vec::new() }; 3];
    let [mut direct, mut through] = [const { Vec::new() }; 2];
    for object in all.iter().filter(|object| is_of(object, from)) {
        let part = match object {
            Object::Neighbour(_) => &mut neighbours,
            Object::Rule(_) => &mut rules,
            Object::Address(_) => &mut addresses,
            Object::Route(route) if has_gateway(route, from)? => &mut through,
            Object::Route(_) => &mut direct,
        };
        part.push((moved(object, from, to), moved(object, from, from)));
    }
    let add = |(new, _): &(Object, Object)| Step::Add(new.clone());
    let delete = |(_, old): &(Object, Object)| Step::Delete(old.clone());
    let first = neighbours.iter().chain(&rules).chain(&addresses);
    let mut steps: Vec<Step> = first.chain(&direct).map(add).collect();
    for route in &through {
        let mut change = [add(route), delete(route)];
        // IPv6 would make one route with two next hops of both. So one that is killed in between loses it.
        if matches!(&route.0, Object::Route(new) if new.header.address_family == AddressFamily::Inet6)
        {
            change.reverse();
        }
        steps.extend(change);
    }
    steps.extend(direct.iter().rev().map(delete));
    // With a link's last IPv4 address the kernel drops its neighbour entries, set ones too (`fib_disable_ip` in
    // net/ipv4/fib_frontend.c): before that they can still be put back.
    steps.extend(rules.iter().chain(&neighbours).map(delete));
    // Secondaries first, because the kernel deletes them with their primary.
    steps.extend(addresses.iter().rev().map(delete));
    Ok(steps)
}

/// Which steps of a move onto the link `to` are done already: an earlier move was interrupted, or is undone after that.
pub(super) fn done(to: End<'_>, all: &[Object]) -> impl Fn(&Step) -> bool + use<> {
    let key_of = |object: &Object| match object {
        Object::Route(_) | Object::Rule(_) => {
            is_of(object, to).then(|| key(&moved(object, to, to)))
        }
        Object::Address(_) | Object::Neighbour(_) => Some(key(object)),
    };
    let present: HashSet<Vec<u8>> = all.iter().filter_map(key_of).collect();
    move |step| matches!(step, Step::Add(object) if present.contains(&key(object)))
}

/// What two objects have in common that stand for the same thing.
fn key(object: &Object) -> Vec<u8> {
    match object {
        Object::Address(it) => format!("{} {:?}", it.header.index, ip_of(it)).into_bytes(),
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

/// The address in a message, if that is one of IP.
pub(super) fn ip_of(message: &AddressMessage) -> Option<InterfaceAddress> {
    // IFA_LOCAL is the link's own; IFA_ADDRESS is the peer's where there is one, and IPv6 may have it alone.
    let mut local = None;
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            _ => {}
        }
    }
    InterfaceAddress::new(local.or(address)?, message.header.prefix_len)
}

/// Whether an address has a lifetime, as those of DHCP and router advertisements do.
pub(super) fn is_leased(message: &AddressMessage) -> bool {
    message.attributes.iter().any(
        |attribute| matches!(attribute, AddressAttribute::CacheInfo(times) if times.ifa_valid != u32::MAX),
    )
}

/// Whether the kernel made an IPv6 address of a router advertisement. Those that this crate adds are without duplicate
/// detection.
pub(super) fn is_autoconfigured(message: &AddressMessage) -> bool {
    let added = |attribute: &AddressAttribute| matches!(attribute, AddressAttribute::Flags(flags) if flags.contains(AddressFlags::Nodad));
    message.header.family == AddressFamily::Inet6
        && is_leased(message)
        && !message.attributes.iter().any(added)
}

/// Whether `route` is the kernel's own to the network of an address.
pub(super) fn is_prefix_route(route: &RouteMessage, address: &AddressMessage) -> bool {
    let RouteHeader { protocol, kind, .. } = route.header;
    let leads_to = |address: InterfaceAddress| {
        address.prefix() == route.header.destination_prefix_length
            && destination(route).is_some_and(|ip| address.contains(ip))
    };
    let over = RouteAttribute::Oif(address.header.index);
    (protocol, kind) == (RouteProtocol::Kernel, RouteType::Unicast)
        && ip_of(address).is_some_and(leads_to)
        && route.attributes.contains(&over)
}

/// Whether an address goes along when the addresses of `from` are moved.
pub(super) fn moves(message: &AddressMessage, from: End<'_>) -> bool {
    message.header.index == from.index
        && message.header.scope != AddressScope::Host
        && ip_of(message).is_some_and(|address| !is_link_local(address.ip()))
}

/// `message`, an address of `from`, as it has to be on `to`.
fn address_on(message: &AddressMessage, from: End<'_>, to: End<'_>) -> AddressMessage {
    let keep = AddressFlags::Noprefixroute
        | AddressFlags::Homeaddress
        | AddressFlags::Managetempaddr
        | AddressFlags::Mcautojoin;
    // It was in use a moment ago: no other host has it, and it has to go on at once.
    let at_once = match message.header.family {
        AddressFamily::Inet6 => AddressFlags::Nodad,
        _ => AddressFlags::empty(),
    };
    let mut moved = message.clone();
    moved.header.index = to.index;
    moved.header.flags = AddressHeaderFlags::empty();
    moved.attributes.retain_mut(|attribute| {
        match attribute {
            AddressAttribute::Label(label) => match relabel(label, from.name, to.name) {
                Some(new) => *label = new,
                None => return false,
            },
            AddressAttribute::Flags(flags) => *flags = *flags & keep | at_once,
            _ => {}
        }
        true
    });
    moved
}

/// The label of an address on link `from` for link `to`: ifconfig(8) wants it to begin with the link's name. None when
/// it doesn't fit, for the kernel's default.
fn relabel(label: &str, from: &str, to: &str) -> Option<String> {
    let rest = label.strip_prefix(from).unwrap_or_default();
    let label = format!("{to}{rest}");
    (label.len() < libc::IFNAMSIZ).then_some(label)
}

fn leads_over(route: &RouteMessage, from: End<'_>) -> bool {
    let RouteHeader { kind, flags, .. } = route.header;
    let over = route.attributes.iter().any(|attribute| match attribute {
        RouteAttribute::Oif(index) => *index == from.index,
        RouteAttribute::MultiPath(hops) => hops.iter().any(|hop| hop.interface_index == from.index),
        _ => false,
    });
    // The routes to one's own addresses, to broadcasts and to groups are the kernel's to keep.
    over && kind == RouteType::Unicast
        && !flags.contains(RouteFlags::Cloned)
        && !destination(route).is_some_and(|ip| is_link_local(ip) || ip_is_group(ip))
}

fn ip_is_group(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_multicast())
}

fn destination(route: &RouteMessage) -> Option<IpAddr> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some((*ip).into()),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some((*ip).into()),
            _ => None,
        })
}

/// Whether a route leads through a gateway; an error for one by a next-hop object, which would have to be moved itself.
fn has_gateway(route: &RouteMessage, from: End<'_>) -> Result<bool, HostLinkProblem> {
    use RouteAttribute::{Gateway, MultiPath, NhId, Via};
    let mut attributes = route.attributes.iter();
    if attributes
        .clone()
        .any(|attribute| matches!(attribute, NhId(_)))
    {
        let name = from.name.to_owned();
        return Err(HostLinkProblem::NextHopObject { name });
    }
    Ok(attributes.any(|attribute| matches!(attribute, Gateway(_) | Via(_) | MultiPath(_))))
}

/// `route`, which leads over `from`, leading over `to` instead.
fn route_over(route: &RouteMessage, from: End<'_>, to: End<'_>) -> RouteMessage {
    let change = |index: &mut u32| {
        if *index == from.index {
            *index = to.index;
        }
    };
    let mut moved = route.clone();
    moved.header.flags &= RouteFlags::Onlink;
    moved.attributes.retain_mut(|attribute| {
        match attribute {
            RouteAttribute::Oif(index) => change(index),
            RouteAttribute::MultiPath(hops) => {
                for hop in hops {
                    change(&mut hop.interface_index);
                    hop.flags &= RouteNextHopFlags::Onlink;
                }
            }
            // In hundredths of a second here, in seconds where a route is made.
            RouteAttribute::CacheInfo(info)
                if info.expires != 0 && info.expires < i32::MAX as u32 =>
            {
                *attribute = RouteAttribute::Expires(info.expires.div_ceil(100));
            }
            RouteAttribute::CacheInfo(_) | RouteAttribute::Uid(_) => return false,
            _ => {}
        }
        true
    });
    moved
}

/// Whether `entry` is one of `from`'s that was set: not learnt by the kernel, nor made by it for a group.
fn is_set(entry: &NeighbourMessage, from: End<'_>) -> bool {
    let header = &entry.header;
    // The kernel gives groups and broadcasts such entries: their MAC addresses have the group bit.
    let to_one = || {
        entry.attributes.iter().any(|attribute| {
            matches!(attribute, NeighbourAttribute::LinkLayerAddress(mac) if mac.first().is_some_and(|first| first & 1 == 0) && mac.iter().any(|byte| *byte != 0))
        })
    };
    let set = match header.state {
        NeighbourState::Permanent => true,
        NeighbourState::Noarp => to_one(),
        _ => header.flags.contains(NeighbourFlags::Proxy) || is_managed(entry),
    };
    set && header.ifindex == from.index
        && matches!(header.family, AddressFamily::Inet | AddressFamily::Inet6)
}

/// Whether the kernel keeps looking for that neighbour.
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

/// What identifies a neighbour entry.
fn neighbour_key(entry: &NeighbourMessage) -> NeighbourMessage {
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

/// `rule`, which names `from`, naming `to` instead.
fn rule_on(rule: &RuleMessage, from: End<'_>, to: End<'_>) -> RuleMessage {
    let mut moved = rule.clone();
    // The kernel sets all others itself.
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
