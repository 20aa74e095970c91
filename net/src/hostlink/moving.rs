//! Moving addresses and routes from one link to another: the plan, which is pure.

use std::net::IpAddr;

use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags, RouteProtocol,
    RouteType,
};
use rtnetlink::packet_route::{AddressFamily, route::RouteAddress};

use super::step::Step;
use crate::address::{InterfaceAddress, is_link_local};
use crate::netlink::Link;

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

/// A route by a next-hop object, which would have to be moved itself: `ip nexthop`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct UsesNextHopObject;

/// What has to be done to move all of `addresses` and `routes` that are `from`'s and not link-local ones.
///
/// A route through a gateway can be made only where another route leads to that gateway, and that goes for the way back
/// too. So for a time both links have the addresses and the routes on the link, and meanwhile those through a gateway
/// change over.
pub(super) fn plan(
    from: End<'_>,
    to: End<'_>,
    addresses: &[AddressMessage],
    routes: &[RouteMessage],
) -> Result<Vec<Step>, UsesNextHopObject> {
    let addresses = in_order_of_making(addresses.iter().filter(|address| moves(address, from)));
    let routes = routes.iter().filter(|route| leads_over(route, from));
    let (through, direct): (Vec<_>, Vec<_>) = routes.partition(|route| has_gateway(route));
    let by_object = |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::NhId(_));
    let mut all = through.iter().chain(&direct);
    if all.any(|route| route.attributes.iter().any(by_object)) {
        return Err(UsesNextHopObject);
    }

    let mut steps = Vec::new();
    steps.extend(
        addresses
            .iter()
            .map(|address| Step::AddAddress(address_on(address, from, to))),
    );
    steps.extend(
        direct
            .iter()
            .map(|route| Step::AddRoute(route_over(route, from, to))),
    );
    for route in through {
        let mut change = [
            Step::AddRoute(route_over(route, from, to)),
            Step::DeleteRoute(route_over(route, from, from)),
        ];
        // IPv6 would make one route with two next hops of both. So whoever is killed in between loses it.
        if route.header.address_family == AddressFamily::Inet6 {
            change.reverse();
        }
        steps.extend(change);
    }
    let gone = direct.iter().rev();
    steps.extend(gone.map(|route| Step::DeleteRoute(route_over(route, from, from))));
    // Secondaries first, because the kernel deletes them with their primary.
    let gone = addresses.iter().rev();
    steps.extend(gone.map(|address| Step::DeleteAddress(address_on(address, from, from))));
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

/// Whether an address was given for a time only, as DHCP and router advertisements do.
pub(super) fn is_leased(message: &AddressMessage) -> bool {
    message.attributes.iter().any(
        |attribute| matches!(attribute, AddressAttribute::CacheInfo(times) if times.ifa_valid != u32::MAX),
    )
}

/// Whether the kernel made an IPv6 address up from a router advertisement, rather than that it was given to the link:
/// by us, that is without duplicate detection.
pub(super) fn is_autoconfigured(message: &AddressMessage) -> bool {
    let given = |attribute: &AddressAttribute| matches!(attribute, AddressAttribute::Flags(flags) if flags.contains(AddressFlags::Nodad));
    message.header.family == AddressFamily::Inet6
        && is_leased(message)
        && !message.attributes.iter().any(given)
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
    // It was in use a moment ago: nobody else has it, and it has to go on at once.
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

/// `route`, which leads over `from`, leading over `to` in its stead.
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
