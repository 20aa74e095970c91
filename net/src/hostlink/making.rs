//! Making a host link: what is checked before, and the steps that follow.

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::InfoKind;

use super::moving;
use super::settings::{self, Paused};
use super::step::{Journal, Step};
use super::{HostLink, HostLinkProblem, HostLinkSpec, Tag, announce, host_links_on, list, vrf_of};
use crate::address::InterfaceAddress;
use crate::diagnose::{self, LinkRequest, Problem};
use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::name::NewLinkName;
use crate::netlink::{Link, Netlink, NewLink, Object, random_index};
use crate::owner::Owner;
use crate::wifi;

pub(super) fn make(
    host: &Netlink,
    spec: &HostLinkSpec,
    owner: Option<&Owner>,
    mut journal: Journal<'_>,
) -> Result<HostLink, HostLinkProblem> {
    let refused = Problem::from_step;
    let links = list(host)?;
    let link = diagnose::find(&links, spec.link.as_str())?;
    let lower = wifi::fit_lower(&links, link)?;
    let addresses = host.addresses().map_err(refused("list the addresses"))?;
    let plan = MovePlan::of(spec, &links, lower, &addresses)?;
    check_addresses(spec, &links, lower, &addresses)?;
    let tag = Tag {
        moved: spec.move_addresses,
        paused: plan.paused.clone(),
        own: plan.own.iter().map(InterfaceAddress::ip).collect(),
    };
    let alias = match owner {
        Some(owner) => owner.to_string(),
        None => tag.to_alias().ok_or(HostLinkProblem::TooManyAddresses)?,
    };

    let request = request(spec, &links, lower);
    let index = create(host, spec, &request, &alias)?;
    journal.new_link = Some(index);
    if let Some(vrf) = vrf_of(&links, lower) {
        // Before it is up: the kernel would take it down and up again, and it would lose its IPv6 addresses.
        let added = host.set_master(index, vrf.index);
        added.map_err(refused("put the new link into the VRF"))?;
    }
    let look = || host.link(index).map_err(refused("show the new link"));
    let made = look()?;
    if spec.move_addresses {
        plan.copy_settings(&lower.name, &made.name);
    }
    host.up(index)
        .map_err(|error| request.explain_up(&made, error))?;
    // Once more: udev renames a link while it is down.
    let made = look()?;
    for step in plan.steps(host, lower, &made)? {
        let explain = |source| HostLinkProblem::explain(&step, &made.name, source);
        journal.take(step.clone()).map_err(explain)?;
    }
    journal.commit();
    let addresses = [plan.moved, plan.own].concat();
    announce(host, index, &addresses);
    Ok(HostLink {
        name: made.name,
        index,
        lower: lower.name.clone(),
        addresses,
        moved: spec.move_addresses,
    })
}

pub(super) fn request<'a>(
    spec: &HostLinkSpec,
    links: &'a [Link],
    lower: &'a Link,
) -> LinkRequest<'a> {
    LinkRequest {
        links,
        lower,
        mode: Mode::Bridge,
        mac: spec.mac,
        mtu: None,
    }
}

/// The default name: the kernel puts the first number there that is free.
const FREE_NAME: &str = "macvlan%d";

/// Makes the macvlan, and returns its index.
pub(super) fn create(
    host: &Netlink,
    spec: &HostLinkSpec,
    request: &LinkRequest<'_>,
    alias: &str,
) -> Result<u32, HostLinkProblem> {
    request.check()?;
    let random = Problem::from_step("give random bytes for a MAC address");
    let mac = spec.mac.map_or_else(MacAddr::random, Ok).map_err(random)?;
    let name = spec.name.as_ref().map_or(FREE_NAME, NewLinkName::as_str);
    let new = NewLink {
        alias,
        mac: Some(mac),
        ..NewLink::new(InfoKind::MacVlan, name, request.lower.index)
    };
    let explain = |error: std::io::Error| match error.raw_os_error() {
        Some(libc::EEXIST) => HostLinkProblem::NameTaken {
            name: name.to_owned(),
        },
        Some(libc::EOPNOTSUPP) => Problem::NoDriver { driver: "macvlan" }.into(),
        _ => request.explain_create(error).into(),
    };
    host.create(&new, random_index).map_err(explain)
}

/// What is to be moved, and what is added.
#[derive(Debug, Default)]
struct MovePlan {
    moved: Vec<InterfaceAddress>,
    own: Vec<InterfaceAddress>,
    /// The lower's settings that are off meanwhile, and their values.
    paused: Vec<(Paused, u8)>,
}

impl MovePlan {
    fn of(
        spec: &HostLinkSpec,
        links: &[Link],
        lower: &Link,
        addresses: &[AddressMessage],
    ) -> Result<Self, HostLinkProblem> {
        let name = lower.name.clone();
        if !spec.move_addresses {
            if spec.addresses.is_empty() {
                return Err(HostLinkProblem::NoAddress { name });
            }
            return Ok(Self {
                own: spec.addresses.clone(),
                ..Self::default()
            });
        }
        let mut movable = addresses.to_vec();
        movable.retain(|address| moving::moves(address, lower.into()));
        let moved: Vec<InterfaceAddress> = movable.iter().filter_map(moving::ip_of).collect();
        if moved.is_empty() {
            let already = host_links_on(links, lower)
                .map(|(link, _)| format!("`{}`", link.name))
                .collect();
            return Err(HostLinkProblem::NothingToMove { name, already });
        }
        let leased = |family| {
            let is_it = |address: &AddressMessage| {
                address.header.family == family && moving::is_leased(address)
            };
            movable.iter().any(is_it)
        };
        if Paused::ProxyArp.read("all").is_some() {
            log::warn!(
                "net.ipv4.conf.all.proxy_arp is on, so {name} will go on to answer, for every neighbour on its wire: turn it on for single links instead"
            );
        }
        if leased(AddressFamily::Inet) {
            log::warn!(
                "the address of {name} has a lease, and what renews it does not know that it moves: point the DHCP client to the new link"
            );
        }
        let paused = Paused::ALL
            .into_iter()
            .filter(|what| *what != Paused::AcceptRa || leased(AddressFamily::Inet6))
            .filter_map(|what| Some((what, what.read(&name)?)))
            .collect();
        let mut own = spec.addresses.clone();
        own.retain(|address| moved.iter().all(|other| other.ip() != address.ip()));
        Ok(Self { moved, own, paused })
    }

    /// Copies the settings of the lower to the new link, which is still down.
    fn copy_settings(&self, from: &str, to: &str) {
        // Whoever asks for an IPv6 address wants IPv6 there.
        let wants_six = self.own.iter().any(|address| address.ip().is_ipv6());
        let failed = settings::copy(from, to, wants_six.then_some("disable_ipv6"));
        if !failed.is_empty() {
            log::warn!(
                "these settings of {from} are not copied: {}. {to} has the defaults instead",
                failed.join(", ")
            );
        }
    }

    /// The steps onto the link `to`.
    fn steps(&self, host: &Netlink, lower: &Link, to: &Link) -> Result<Vec<Step>, HostLinkProblem> {
        let paused = self.paused.iter();
        let off = |(what, value): &(Paused, u8)| what.set(&lower.name, *value, 0);
        let mut steps: Vec<Step> = paused.clone().map(off).collect();
        if !self.moved.is_empty() {
            let all = moving::everything(host)?;
            steps.extend(moving::plan(lower.into(), to.into(), &all)?);
            // Not before: as long as the routes to its neighbours led over the lower, it would answer for all of them.
            let proxy = paused.filter(|(what, _)| *what == Paused::ProxyArp);
            steps.extend(proxy.map(|(what, value)| what.set(&to.name, 0, *value)));
        }
        // After the moved ones, which thus stay the first choice as a source address.
        let own = self.own.iter();
        let own = own.map(|address| Object::Address(new_address(address, to.index)));
        steps.extend(own.map(Step::Add));
        Ok(steps)
    }
}

/// Refuses addresses that the host has already, or would look for on another link.
fn check_addresses(
    spec: &HostLinkSpec,
    links: &[Link],
    lower: &Link,
    addresses: &[AddressMessage],
) -> Result<(), HostLinkProblem> {
    let stays =
        |message: &&AddressMessage| !spec.move_addresses || !moving::moves(message, lower.into());
    for message in addresses.iter().filter(stays) {
        let Some(other) = moving::ip_of(message) else {
            continue;
        };
        let holder = diagnose::by_index(links, Some(message.header.index));
        let by = holder.map_or_else(String::new, |link| link.name.clone());
        let mut wanted = spec.addresses.iter().copied();
        if let Some(address) = wanted.clone().find(|own| own.ip() == other.ip()) {
            return Err(HostLinkProblem::AddressTaken { address, by });
        }
        // Of two routes, the one to the smaller network counts.
        let wins =
            |own: &InterfaceAddress| own.contains(other.ip()) && other.prefix() >= own.prefix();
        if let Some(address) = wanted.find(wins) {
            return Err(HostLinkProblem::SameNetwork { address, other, by });
        }
    }
    Ok(())
}

pub(crate) fn new_address(address: &InterfaceAddress, index: u32) -> AddressMessage {
    let ip = address.ip();
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = address.prefix();
    message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    let broadcast = address.broadcast().map(AddressAttribute::Broadcast);
    message.attributes.extend(broadcast);
    message.header.family = AddressFamily::Inet;
    if ip.is_ipv6() {
        message.header.family = AddressFamily::Inet6;
        // Duplicate detection would keep it from being used for seconds.
        let flags = AddressAttribute::Flags(AddressFlags::Nodad);
        message.attributes.push(flags);
    }
    message
}
