//! Making a host link: what is checked before, and the steps that follow.

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};

use super::moving::{self, End};
use super::present::Everything;
use super::settings::{self, Paused};
use super::step::{Journal, Step};
use super::{
    HostLink, HostLinkProblem, HostLinkSpec, Tag, announce, attached, host_links_on, list,
};
use crate::address::InterfaceAddress;
use crate::diagnose::{self, LinkRequest};
use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::name::NewLinkName;
use crate::netlink::{Birthplace, Driver, Link, Netlink, NewLink, random_index};
use crate::owner::Owner;
use crate::wifi;

/// A link that was just made, and is deleted when something fails.
struct Made<'a> {
    host: &'a Netlink,
    index: Option<u32>,
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        if let Some(index) = self.index
            && let Err(error) = self.host.delete(index)
        {
            log::error!("cannot delete the new link {index} again: {error}");
        }
    }
}

pub(super) fn make(
    host: &Netlink,
    spec: &HostLinkSpec,
    owner: Option<&Owner>,
    journal: Journal<'_>,
) -> Result<HostLink, HostLinkProblem> {
    let links = list(host)?;
    let link = diagnose::find(&links, spec.link.as_str())?;
    diagnose::check_lower(&links, link, wifi::carrying(&links, link)?)?;
    let lower = diagnose::real_device(&links, link);
    diagnose::warn_of_carrier(lower);
    let addresses = host
        .addresses()
        .map_err(HostLinkProblem::from_step("list the addresses"))?;
    let move_plan = MovePlan::of(spec, &links, lower, &addresses)?;
    check_addresses(spec, &links, lower, &addresses)?;
    let tag = Tag {
        moved: spec.move_addresses,
        paused: move_plan.paused.clone(),
        own: move_plan.own.iter().map(InterfaceAddress::ip).collect(),
    };
    let alias = match owner {
        Some(owner) => owner.to_string(),
        None => tag.to_alias().ok_or(HostLinkProblem::TooManyAddresses)?,
    };

    let index = create(host, spec, &links, lower, &alias)?;
    let mut made = Made {
        host,
        index: Some(index),
    };
    // Dropped before `made`: the addresses go back before the link that had them goes away.
    let mut journal = journal;
    if let Some(vrf) = vrf_of(&links, lower) {
        // Before it is up: the kernel takes a link that is down and up again, with all of its IPv6 addresses.
        host.set_master(index, vrf.index)
            .map_err(HostLinkProblem::from_step("put the new link into the VRF"))?;
    }
    if spec.move_addresses {
        move_plan.carry_settings(host, lower, index)?;
    }
    let name = bring_up(host, &links, lower, index)?;
    for step in move_plan.steps(host, lower, End { index, name: &name })? {
        let explain = |source| HostLinkProblem::explain(&step, &name, source);
        journal.take(step.clone()).map_err(explain)?;
    }
    journal.commit();
    made.index = None;
    let addresses = [move_plan.moved, move_plan.own].concat();
    announce(host, index, &addresses);
    Ok(HostLink {
        name,
        index,
        lower: lower.name.clone(),
        addresses,
        moved: spec.move_addresses,
    })
}

/// The name for one that nobody has named: the kernel puts the first number there that is free.
const FREE_NAME: &str = "macvlan%d";

/// Makes the macvlan, and hands back its index.
pub(super) fn create(
    host: &Netlink,
    spec: &HostLinkSpec,
    links: &[Link],
    lower: &Link,
    alias: &str,
) -> Result<u32, HostLinkProblem> {
    let request = LinkRequest {
        links,
        lower,
        mode: Mode::Bridge,
        mac: spec.mac,
        mtu: None,
    };
    request.check()?;
    let mac = spec
        .mac
        .map_or_else(MacAddr::random, Ok)
        .map_err(HostLinkProblem::from_step(
            "give random bytes for a MAC address",
        ))?;
    let new = NewLink {
        driver: Driver::Macvlan,
        name: spec.name.as_ref().map_or(FREE_NAME, NewLinkName::as_str),
        lower: lower.index,
        place: Birthplace::BesideLower { alias },
        mode: Mode::Bridge,
        mac: Some(mac),
        mtu: None,
        tx_queue_len: None,
        bc_queue_len: None,
        source_macs: &[],
    };
    host.create(&new, random_index)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EEXIST) => HostLinkProblem::NameTaken {
                name: new.name.to_owned(),
            },
            Some(libc::EOPNOTSUPP) => HostLinkProblem::NoDriver,
            _ => request.explain_create(error).into(),
        })
}

/// The VRF that a link belongs to. A host link has to be in the lower's, or its addresses and routes would be in another
/// table, where nobody looks for them.
pub(super) fn vrf_of<'a>(links: &'a [Link], link: &Link) -> Option<&'a Link> {
    diagnose::by_index(links, link.master).filter(|master| master.kind == "vrf")
}

/// Brings the new link up, and hands back its name.
fn bring_up(
    host: &Netlink,
    links: &[Link],
    lower: &Link,
    index: u32,
) -> Result<String, HostLinkProblem> {
    let made = look(host, index)?;
    let request = LinkRequest {
        links,
        lower,
        mode: Mode::Bridge,
        mac: None,
        mtu: None,
    };
    host.up(index)
        .map_err(|error| request.explain_up(&made, error))?;
    // Once more: udev renames a link while it is down.
    Ok(look(host, index)?.name)
}

fn look(host: &Netlink, index: u32) -> Result<Link, HostLinkProblem> {
    host.link(index)
        .map_err(HostLinkProblem::from_step("show the new link"))
}

/// What is to be moved, and what comes besides.
#[derive(Debug)]
struct MovePlan<'a> {
    addresses: &'a [AddressMessage],
    move_addresses: bool,
    moved: Vec<InterfaceAddress>,
    own: Vec<InterfaceAddress>,
    /// The lower's settings that are off meanwhile, and their values.
    paused: Vec<(Paused, u8)>,
}

impl<'a> MovePlan<'a> {
    fn of(
        spec: &HostLinkSpec,
        links: &[Link],
        lower: &Link,
        addresses: &'a [AddressMessage],
    ) -> Result<Self, HostLinkProblem> {
        let name = lower.name.clone();
        if !spec.move_addresses {
            if spec.addresses.is_empty() {
                return Err(HostLinkProblem::NoAddress { name });
            }
            return Ok(Self {
                addresses,
                move_addresses: false,
                moved: Vec::new(),
                own: spec.addresses.clone(),
                paused: Vec::new(),
            });
        }
        let movable = addresses
            .iter()
            .filter(|address| moving::moves(address, lower.into()));
        let moved: Vec<InterfaceAddress> = movable.clone().filter_map(moving::ip_of).collect();
        if moved.is_empty() {
            let already = host_links_on(links, lower)
                .map(|(link, _)| format!("`{}`", link.name))
                .collect();
            return Err(HostLinkProblem::NothingToMove { name, already });
        }
        let leased = |family| {
            let mut movable = movable.clone();
            movable.any(|address| address.header.family == family && moving::is_leased(address))
        };
        if Paused::ProxyArp.read("all").is_some() {
            log::warn!(
                "net.ipv4.conf.all.proxy_arp is on, so {name} will go on to answer, for every neighbour on its wire: turn it on for single links instead"
            );
        }
        let paused = Paused::ALL
            .into_iter()
            .filter(|what| *what != Paused::AcceptRa || leased(AddressFamily::Inet6))
            .filter_map(|what| Some((what, what.read(&name)?)))
            .collect();
        if leased(AddressFamily::Inet) {
            log::warn!(
                "the address of {name} has a lease, and what renews it does not know that it moves: point the DHCP client to the new link"
            );
        }
        let is_own =
            |address: &&InterfaceAddress| moved.iter().all(|other| other.ip() != address.ip());
        Ok(Self {
            addresses,
            move_addresses: true,
            own: spec.addresses.iter().filter(is_own).copied().collect(),
            paused,
            moved,
        })
    }

    /// Gives the new link, which is still down, what is set for the lower.
    fn carry_settings(
        &self,
        host: &Netlink,
        lower: &Link,
        index: u32,
    ) -> Result<(), HostLinkProblem> {
        let to = look(host, index)?.name;
        // Whoever asks for an address of IPv6 wants to have IPv6 there.
        let wants_six = self.own.iter().any(|address| address.ip().is_ipv6());
        let failed = settings::carry(&lower.name, &to, wants_six.then_some("disable_ipv6"));
        if !failed.is_empty() {
            log::warn!(
                "these settings of {} stay behind: {}. {to} has the defaults instead",
                lower.name,
                failed.join(", ")
            );
        }
        Ok(())
    }

    /// The steps onto the link `to`.
    fn steps(
        &self,
        host: &Netlink,
        lower: &Link,
        to: End<'_>,
    ) -> Result<Vec<Step>, HostLinkProblem> {
        let mut steps = Vec::new();
        let paused = self.paused.iter();
        steps.extend(paused.map(|(what, value)| what.off(&lower.name, *value)));
        if self.move_addresses {
            let all = Everything::of(host)?;
            steps.extend(move_steps(lower.into(), to, self.addresses, &all)?);
            // Not before: as long as the way to its neighbours led over the lower, it would answer for all of them.
            let proxy = self
                .paused
                .iter()
                .filter(|(what, _)| *what == Paused::ProxyArp);
            steps.extend(proxy.map(|(what, value)| what.on(to.name, *value)));
        }
        let own = self
            .own
            .iter()
            .map(|address| new_address(address, to.index));
        // Behind those that were there before, which thus stay the first choice as a source address.
        steps.extend(own.map(Step::AddAddress));
        Ok(steps)
    }
}

/// The steps that move all of `addresses`, and all else that is tied to `from`, onto `to`.
pub(super) fn move_steps(
    from: End<'_>,
    to: End<'_>,
    addresses: &[AddressMessage],
    all: &Everything,
) -> Result<Vec<Step>, HostLinkProblem> {
    let (mut steps, attached_gone) = attached::plan(from, to, &all.neighbours, &all.rules);
    let name = from.name.to_owned();
    let mut moves = moving::plan(from, to, addresses, &all.routes)
        .map_err(|_| HostLinkProblem::NextHopObject { name })?;
    // With a link's last IPv4 address the kernel drops its neighbour entries, the given ones too (`fib_disable_ip` in
    // net/ipv4/fib_frontend.c): before that they can still be put back.
    let takes_address = |step: &Step| matches!(step, Step::DeleteAddress(_));
    let at = moves.iter().position(takes_address).unwrap_or(moves.len());
    moves.splice(at..at, attached_gone);
    steps.extend(moves);
    Ok(steps)
}

/// Refuses addresses that the host has already, or would go on looking for elsewhere.
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
        // Of two routes, the one to the smaller network counts.
        let wins = |address: &&InterfaceAddress| {
            address.contains(other.ip()) && other.prefix() >= address.prefix()
        };
        if let Some(address) = spec
            .addresses
            .iter()
            .copied()
            .find(|own| own.ip() == other.ip())
        {
            return Err(HostLinkProblem::AddressTaken { address, by });
        }
        if let Some(address) = spec.addresses.iter().copied().find(|own| wins(&own)) {
            return Err(HostLinkProblem::SameNetwork { address, other, by });
        }
    }
    Ok(())
}

pub(super) fn new_address(address: &InterfaceAddress, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = address.prefix();
    message.header.family = if address.ip().is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    message.attributes = vec![
        AddressAttribute::Local(address.ip()),
        AddressAttribute::Address(address.ip()),
    ];
    if let Some(broadcast) = address.broadcast() {
        message
            .attributes
            .push(AddressAttribute::Broadcast(broadcast));
    }
    if address.ip().is_ipv6() {
        // Duplicate detection would keep it from being used for seconds.
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}
