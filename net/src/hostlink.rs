//! The host link: the host's own link among its guests.
//!
//! A link and the macvtaps on it cannot reach each other: the macvlan driver passes frames to the wire and to its own
//! links, never to the link below. So the host talks with its guests through a macvlan in bridge mode beside them, which
//! carries the host's address.
//!
//! When the lower link had the host's only address in that network, it has to move: of two links into the same network the
//! host would use the wrong one. Routes move with it. A step that fails takes all before it back. The alias of the host
//! link records what undoing the move takes.

use rtnetlink::packet_route::address::AddressMessage;

use crate::address::InterfaceAddress;
use crate::diagnose::{self, Problem};
use crate::link_guard::LinkGuard;
use crate::mac::MacAddr;
use crate::name::{LinkName, NewLinkName};
use crate::netlink::{Link, Netlink, Object};
use crate::netns;
use crate::owner::Owner;
use crate::stale::{self, Judge};

mod announce;
mod making;
mod moving;
mod problem;
mod settings;
mod step;
mod tag;

use making::make;
pub(crate) use making::new_address;
pub use problem::{HostLinkError, HostLinkProblem};
use settings::Paused;
use step::{Journal, Step};
pub(crate) use tag::Tag;

/// What is asked for. Begin with [`HostLinkSpec::new`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostLinkSpec {
    /// The link that carries the guests, in the caller's network namespace.
    pub link: LinkName,
    /// None for the first free `macvlan<n>`.
    pub name: Option<NewLinkName>,
    /// The host's addresses among its guests.
    pub addresses: Vec<InterfaceAddress>,
    /// Move the addresses and routes of the lower link onto this one: all of both families, in all tables, but those
    /// that hold on a single link only; and with them the neighbour entries that were set, the policy rules by its name,
    /// and its settings in /proc/sys/net. Firewall rules by its name stay as they are. What manages the lower's addresses
    /// (a DHCP client, a network manager) has to be reconfigured.
    pub move_addresses: bool,
    /// None for a random, locally administered one.
    pub mac: Option<MacAddr>,
}

impl HostLinkSpec {
    /// A host link on `link` without any address yet, everything else by default.
    pub const fn new(link: LinkName) -> Self {
        Self {
            link,
            name: None,
            addresses: Vec::new(),
            move_addresses: false,
            mac: None,
        }
    }
}

/// A host link. It stays when this value is dropped, and when the process ends: see [`HostLinkGuard`] for one that
/// doesn't.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostLink {
    /// Its name.
    pub name: String,
    /// Its interface index.
    pub index: u32,
    /// The name of the link that it sits on.
    pub lower: String,
    /// All that it has, the moved ones first.
    pub addresses: Vec<InterfaceAddress>,
    /// Whether the lower's addresses were moved onto it, or back.
    pub moved: bool,
}

impl HostLink {
    /// Makes a host link in the caller's network namespace and brings it up. Its addresses are usable at once.
    ///
    /// # Errors
    ///
    /// One of the [`HostLinkProblem`]s. All is as it was before, then.
    pub fn create(spec: &HostLinkSpec) -> Result<Self, HostLinkError> {
        make_on_host(spec, |host| make(host, spec, None, Journal::new(host)))
    }

    /// Deletes a host link, named itself or by the link that it sits on, and moves addresses and routes back if they had
    /// been moved. Returns what was deleted.
    ///
    /// # Errors
    ///
    /// One of the [`HostLinkProblem`]s. The link is as it was before, then.
    pub fn delete(link: &LinkName) -> Result<Self, HostLinkError> {
        let error = |source| HostLinkError {
            doing: "delete the host link",
            link: link.clone(),
            source,
        };
        let delete = |host: &Netlink| {
            let links = list(host)?;
            let (found, tag) = host_link_of(&links, link.as_str())?;
            unmake(host, &links, found, &tag, Journal::new(host))
        };
        on_host(delete).map_err(error)
    }
}

/// A host link that belongs to the calling process: dropping this deletes it. Its alias names the [`Owner`]: after a kill,
/// [`delete_stale`](crate::delete_stale()) or the next [`Macvtap::open`](crate::Macvtap::open) deletes it.
#[derive(Debug)]
pub struct HostLinkGuard {
    link: HostLink,
    _guard: LinkGuard,
}

impl HostLinkGuard {
    /// Makes a host link as [`HostLink::create`] does, for as long as this value lives. It cannot take over the lower's
    /// addresses: a killed process could not move them back.
    ///
    /// # Errors
    ///
    /// As for [`HostLink::create`].
    pub fn create(spec: &HostLinkSpec) -> Result<Self, HostLinkError> {
        make_on_host(spec, |host| {
            if spec.move_addresses {
                return Err(HostLinkProblem::MoveIsLasting);
            }
            let owner =
                Owner::this_process().map_err(Problem::from_step("identify this process"))?;
            let namespace =
                netns::current().map_err(Problem::from_step("open the network namespace"))?;
            let link = make(host, spec, Some(&owner), Journal::new(host))?;
            let guard = LinkGuard::visible(namespace, link.index, owner.to_string());
            Ok(Self {
                link,
                _guard: guard,
            })
        })
    }

    /// What was made.
    pub const fn link(&self) -> &HostLink {
        &self.link
    }
}

fn make_on_host<T: Send>(
    spec: &HostLinkSpec,
    make: impl FnOnce(&Netlink) -> Result<T, HostLinkProblem> + Send,
) -> Result<T, HostLinkError> {
    let made = on_host(|host| {
        stale::try_delete_stale(host, &list(host)?);
        make(host)
    });
    made.map_err(|source| HostLinkError {
        doing: "make a host link on",
        link: spec.link.clone(),
        source,
    })
}

/// Runs `work` with a connection to the caller's namespace, on a thread of its own.
fn on_host<T: Send>(
    work: impl FnOnce(&Netlink) -> Result<T, HostLinkProblem> + Send,
) -> Result<T, HostLinkProblem> {
    let connected = || {
        let host = Netlink::connect().map_err(Problem::from_step("connect to rtnetlink"))?;
        work(&host)
    };
    netns::on_own_thread(connected).map_err(Problem::from_step("start a thread"))?
}

fn list(host: &Netlink) -> Result<Vec<Link>, Problem> {
    host.links()
        .map_err(Problem::from_step("list the network interfaces"))
}

fn announce(host: &Netlink, index: u32, addresses: &[InterfaceAddress]) {
    if let Ok(Link { mac: Some(mac), .. }) = host.link(index) {
        announce::announce(index, mac, addresses.iter().map(InterfaceAddress::ip));
    }
}

fn macvlans_on<'a>(links: &'a [Link], lower: &Link) -> impl Iterator<Item = &'a Link> {
    let index = lower.index;
    let is_on_it = move |link: &&Link| link.lower == Some(index) && link.kind == "macvlan";
    links.iter().filter(is_on_it)
}

/// The links on `lower` that carry the tag of a host link.
fn host_links_on<'a>(links: &'a [Link], lower: &Link) -> impl Iterator<Item = (&'a Link, Tag)> {
    macvlans_on(links, lower).filter_map(|link| Some((link, Tag::from_alias(&link.alias)?)))
}

/// A host link for a process's lifetime, if the process has ended without deleting it; None if `link` has no owner.
fn stale_one(link: &Link) -> Option<Result<(&Link, Tag), HostLinkProblem>> {
    let owner: Owner = link.alias.parse().ok()?;
    let (name, pid) = (link.name.clone(), owner.pid());
    Some(match Judge::new().stale_owner(link) {
        Some(_) => Ok((link, Tag::default())),
        None => Err(HostLinkProblem::InUse { name, pid }),
    })
}

/// The host link that is called `name`, or sits on the link of that name.
fn host_link_of<'a>(links: &'a [Link], name: &str) -> Result<(&'a Link, Tag), HostLinkProblem> {
    let named = diagnose::find(links, name)?;
    let name = named.name.clone();
    if named.is_macvlan() {
        let tagged = || Tag::from_alias(&named.alias).map(|tag| (named, tag));
        let not_one = HostLinkProblem::NotOurs { name };
        return stale_one(named).unwrap_or_else(|| tagged().ok_or(not_one));
    }
    let mut found: Vec<_> = host_links_on(links, named).collect();
    if found.len() > 1 {
        let names = found.iter().map(|(link, _)| format!("`{}`", link.name));
        let names = names.collect();
        return Err(HostLinkProblem::Several { names });
    }
    let stale = || macvlans_on(links, named).find_map(stale_one);
    let none = HostLinkProblem::NoHostLink { name };
    found.pop().map_or_else(|| stale().unwrap_or(Err(none)), Ok)
}

/// The VRF that a link belongs to. A host link has to be in the lower's, or its addresses and routes would be in another
/// table.
fn vrf_of<'a>(links: &'a [Link], link: &Link) -> Option<&'a Link> {
    diagnose::by_index(links, link.master).filter(|master| master.kind == "vrf")
}

/// Refuses to move addresses back out of a VRF, or into one.
fn check_vrf(links: &[Link], link: &Link, lower: &Link) -> Result<(), HostLinkProblem> {
    let vrf = vrf_of(links, link);
    if vrf == vrf_of(links, lower) {
        return Ok(());
    }
    Err(HostLinkProblem::OtherVrf {
        name: link.name.clone(),
        has: vrf.map(|vrf| vrf.name.clone()),
        lower: lower.name.clone(),
    })
}

fn unmake(
    host: &Netlink,
    links: &[Link],
    link: &Link,
    tag: &Tag,
    mut journal: Journal<'_>,
) -> Result<HostLink, HostLinkProblem> {
    let lower = diagnose::by_index(links, link.lower);
    let mut had = host
        .addresses()
        .map_err(Problem::from_step("list the addresses"))?;
    had.retain(|message| moving::moves(message, link.into()));
    if tag.moved {
        let lower = lower.ok_or_else(|| HostLinkProblem::LowerElsewhere {
            name: link.name.clone(),
        })?;
        check_vrf(links, link, lower)?;
        move_back(host, link, lower, tag, &had, &mut journal)?;
    }
    host.delete(link.index)
        .map_err(Problem::from_step("delete the link"))?;
    journal.commit();
    let addresses: Vec<InterfaceAddress> = had.iter().filter_map(moving::ip_of).collect();
    if let Some(lower) = lower.filter(|_| tag.moved) {
        let mut back = addresses.clone();
        back.retain(|address| !tag.own.contains(&address.ip()));
        announce(host, lower.index, &back);
    }
    Ok(HostLink {
        name: link.name.clone(),
        index: link.index,
        lower: lower.map_or_else(String::new, |lower| lower.name.clone()),
        addresses,
        moved: tag.moved,
    })
}

/// Moves what the host link took over back to its lower. `had` are its addresses, its own ones included.
fn move_back(
    host: &Netlink,
    link: &Link,
    lower: &Link,
    tag: &Tag,
    had: &[AddressMessage],
    journal: &mut Journal<'_>,
) -> Result<(), HostLinkProblem> {
    let mut take = |step: Step| {
        let explain = |source| HostLinkProblem::explain(&step, &lower.name, source);
        journal.take(step.clone()).map_err(explain)
    };
    // As long as its neighbours are the lower's, it would answer for all of them.
    if let Some(value) = Paused::ProxyArp.read(&link.name) {
        take(Paused::ProxyArp.set(&link.name, value, 0))?;
    }
    let is_own = |message: &&AddressMessage| {
        moving::ip_of(message).is_some_and(|address| tag.own.contains(&address.ip()))
    };
    for own in had.iter().filter(is_own) {
        take(Step::Delete(Object::Address(own.clone())))?;
    }
    // Their routes went with them, so only now is it clear what is left to move.
    let mut all = moving::everything(host)?;
    // A move that was interrupted has left some of it on both links.
    let is_done = moving::done(lower.into(), &all);
    all.retain(|object| !matches!(object, Object::Address(it) if moving::is_autoconfigured(it)));
    for step in moving::plan(link.into(), lower.into(), &all)? {
        if !is_done(&step) {
            take(step)?;
        }
    }
    let mut paused = tag.paused.iter();
    paused.try_for_each(|(what, value)| take(what.set(&lower.name, 0, *value)))
}

#[cfg(test)]
mod tests;
