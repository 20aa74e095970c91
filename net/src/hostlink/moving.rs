//! Moving addresses, routes, neighbour entries and policy rules from one link to another: the plan, which is pure.

use std::net::IpAddr;

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

/// An object as it is to be, and as it was.
type Moved = (Object, Object);

/// The steps that move those of `addresses`, and of `all` else, that are `from`'s and not link-local ones.
///
/// A route through a gateway can be made only where another route leads to that gateway, and that goes for the way back
/// too. So for a time both links have the addresses and the routes on the link, and meanwhile those through a gateway
/// change over.
pub(super) fn plan(
    from: End<'_>,
    to: End<'_>,
    addresses: &[AddressMessage],
    all: &Everything,
) -> Result<Vec<Step>, HostLinkProblem> {
    let address = |it: &AddressMessage, to| Object::Address(address_on(it, from, to));
    let route = |it: &RouteMessage, to| Object::Route(route_over(it, from, to));
    let neighbour = |it: &NeighbourMessage, to| Object::Neighbour(neighbour_on(it, to));
    let rule = |it: &RuleMessage, to| Object::Rule(rule_on(it, from, to));

    let routes = all.routes.iter().filter(|route| leads_over(route, from));
    let by_object = |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::NhId(_));
    if routes
        .clone()
        .any(|route| route.attributes.iter().any(by_object))
    {
        let name = from.name.to_owned();
        return Err(HostLinkProblem::NextHopObject { name });
    }
    let (through, direct): (Vec<_>, Vec<_>) = routes.partition(|route| has_gateway(route));
    let direct: Vec<Moved> = direct
        .into_iter()
        .map(|it| (route(it, to), route(it, from)))
        .collect();
    let addresses = addresses.iter().filter(|address| moves(address, from));
    let addresses = in_order_of_making(addresses).into_iter();
    let addresses: Vec<Moved> = addresses
        .map(|it| (address(it, to), address(it, from)))
        .collect();
    let neighbours = all.neighbours.iter().filter(|entry| is_set(entry, from));
    let neighbours: Vec<Moved> = neighbours
        .map(|it| (neighbour(it, to), neighbour(it, from)))
        .collect();
    let rules = all.rules.iter().filter(|rule| names(rule, from));
    let rules: Vec<Moved> = rules.map(|it| (rule(it, to), rule(it, from))).collect();

    let add = |(new, _): &Moved| Step::Add(new.clone());
    let delete = |(_, old): &Moved| Step::Delete(old.clone());
    let first = neighbours.iter().chain(&rules).chain(&addresses);
    let mut steps: Vec<Step> = first.chain(&direct).map(add).collect();
    for it in through {
        let mut change = [Step::Add(route(it, to)), Step::Delete(route(it, from))];
        // IPv6 would make one route with two next hops of both. So one that is killed in between loses it.
        if it.header.address_family == AddressFamily::Inet6 {
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

/// The kernel lists IPv4 addresses as they came, a primary before its secondaries, and IPv6 ones the newest first
/// (`ipv6_link_dev_addr` in net/ipv6/addrconf.c). It prefers those that are listed first.
fn in_order_of_making<'a>(
    listed: impl Iterator<Item = &'a AddressMessage>,
) -> Vec<&'a AddressMessage> {
    let is_v6 = |address: &&AddressMessage| address.header.family == AddressFamily::Inet6;
    let (mut six, mut all): (Vec<_>, Vec<_>) = listed.partition(is_v6);
    six.reverse();
    all.append(&mut six);
    all
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

pub(super) fn leads_over(route: &RouteMessage, from: End<'_>) -> bool {
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

fn has_gateway(route: &RouteMessage) -> bool {
    let through = |attribute: &RouteAttribute| {
        use RouteAttribute::{Gateway, MultiPath, Via};
        matches!(attribute, Gateway(_) | Via(_) | MultiPath(_))
    };
    route.attributes.iter().any(through)
}

/// `route`, which leads over `from`, leading over `to` instead.
pub(super) fn route_over(route: &RouteMessage, from: End<'_>, to: End<'_>) -> RouteMessage {
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

/// `rule`, which names `from`, naming `to` instead.
pub(super) fn rule_on(rule: &RuleMessage, from: End<'_>, to: End<'_>) -> RuleMessage {
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
