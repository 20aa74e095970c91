//! From facts to checks. Pure.

use super::lower::lower;
use super::neighbour::{guests, out_of_sight};
use super::{Check, Driver, Facts, Node, Status, VhostNet};
use crate::diagnose;
use crate::mode::Mode;
use crate::netlink::{CHOSEN_INDEXES, Link};
use crate::privileges::Obstacle;

/// Every check, for `link` as the lower if one is named.
pub(super) fn all(facts: &Facts, link: Option<&str>) -> Vec<Check> {
    let mut checks = vec![
        driver(facts.driver),
        vhost_net(facts.vhost_net),
        privileges(facts),
    ];
    let Some(links) = &facts.links else {
        let remedy = "check that this container or sandbox allows netlink sockets";
        let message = "the network interfaces cannot be listed";
        checks.push(Check::fail("links", message, remedy));
        return checks;
    };
    let named = match link.map(|name| diagnose::find(links, name)).transpose() {
        Ok(named) => named,
        Err(problem) => {
            let remedy = "name one that is here, or run this in the network namespace that has it";
            checks.push(Check::fail("link", problem.to_string(), remedy));
            return checks;
        }
    };
    let hidden = out_of_sight(facts, links);
    let known: Vec<Link> = links
        .iter()
        .chain(hidden.iter().map(|(link, _)| link))
        .cloned()
        .collect();
    match named {
        Some(link) => checks.extend(lower(facts, &known, link)),
        None => checks.push(candidates(facts, &known)),
    }
    let only = named.map(|link| diagnose::real_device(links, link).index);
    let is_upper = |link: &&Link| link.is_macvlan() && (only.is_none() || link.lower == only);
    let macvtaps = Macvtaps {
        links,
        known: &known,
        uppers: known.iter().filter(is_upper).collect(),
        hidden: &hidden,
    };
    // Unless one keeps others off the named lower, which is a failure of that.
    if !checks.iter().any(|check| check.name == "macvtaps") {
        checks.push(macvtaps.present(named.is_none()));
    }
    checks.push(macvtaps.duplicate_macs());
    checks.push(macvtaps.vepa());
    checks.push(guests(facts, links, only));
    checks.push(macvtaps.stale(facts));
    checks.push(nodes(links, &facts.nodes));
    checks
}

impl Check {
    /// The name of the check for links whose process has ended, which [`delete_stale`](crate::delete_stale()) deletes.
    pub const LEAKED_LINKS: &'static str = "leaked links";

    /// One that found nothing wrong.
    pub fn ok(name: &'static str, message: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            message: message.into(),
            remedy: None,
        }
    }

    /// One that found something that works, but not for everything, or not for long.
    pub fn warn(name: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            status: Status::Warn,
            remedy: Some(remedy.into()),
            ..Self::ok(name, message)
        }
    }

    /// One that found what keeps guests from working.
    pub fn fail(name: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            status: Status::Fail,
            ..Self::warn(name, message, remedy)
        }
    }
}

fn driver(driver: Driver) -> Check {
    let name = "macvtap driver";
    match driver {
        Driver::Present => Check::ok(name, "the kernel has it"),
        Driver::Loadable => Check::ok(name, "it is a module, which is loaded when it is needed"),
        Driver::Absent => Check::fail(
            name,
            "this kernel has no macvtap driver",
            "load it with `modprobe macvtap`, or use a kernel with CONFIG_MACVTAP",
        ),
        Driver::Unknown => Check::warn(
            name,
            "whether the kernel has it shows only to privileged processes",
            "run this as root",
        ),
    }
}

fn vhost_net(vhost_net: VhostNet) -> Check {
    let name = "vhost-net";
    let (message, remedy) = match vhost_net {
        VhostNet::Usable => return Check::ok(name, "/dev/vhost-net can be opened"),
        VhostNet::NotPermitted => (
            "/dev/vhost-net may not be opened",
            "run this as root, or let root give it away with `setfacl -m u:$USER:rw /dev/vhost-net`",
        ),
        VhostNet::Absent => (
            "there is no /dev/vhost-net",
            "load it with `modprobe vhost_net`, or do without",
        ),
    };
    let message = format!("{message}, so the kernel cannot take over the copying of frames");
    Check::warn(name, message, remedy)
}

/// What this process lacks. Without privileges it may still use what root has opened for it.
fn privileges(facts: &Facts) -> Check {
    let name = "privileges";
    let Some(privileges) = facts.privileges else {
        let message = "/proc does not show what this process may do";
        return Check::warn(name, message, "mount /proc here");
    };
    let opening = privileges.obstacle_to_opening(facts.mounts_sysfs);
    match privileges.obstacle_to_making().or(opening) {
        None => Check::ok(name, "this process may make and open macvtaps"),
        Some(lack @ Obstacle::Capabilities(_)) => {
            Check::warn(name, lack.to_string(), lack.remedy())
        }
        Some(obstacle) => Check::fail(name, obstacle.to_string(), obstacle.remedy()),
    }
}

/// Which links could carry a macvtap.
fn candidates(facts: &Facts, known: &[Link]) -> Check {
    let fits = |link: &&Link| {
        let wireless = facts.wireless_under(known, link);
        let alone = !link.is_macvlan() && link.carrier;
        alone && diagnose::check_lower(known, link, wireless).is_ok()
    };
    let fit = known.iter().filter(fits);
    let names: Vec<&str> = fit.map(|link| link.name.as_str()).collect();
    if names.is_empty() {
        let message = "no network interface here could carry a macvtap";
        return Check::warn("links", message, "name one to learn why it cannot");
    }
    Check::ok(
        "links",
        format!("{} could carry macvtaps", names.join(", ")),
    )
}

/// The macvtaps and macvlans that are checked.
struct Macvtaps<'a> {
    /// All links of this namespace.
    links: &'a [Link],
    /// And those that are known of in others.
    known: &'a [Link],
    uppers: Vec<&'a Link>,
    /// Those of other namespaces, with their processes.
    hidden: &'a [(Link, u32)],
}

impl Macvtaps<'_> {
    /// The process that uses a link, if that is one of another namespace, which no command here could change.
    fn user_of(&self, link: &Link) -> Option<u32> {
        let mut hidden = self.hidden.iter();
        let (_, pid) = hidden.find(|(hidden, _)| hidden.index == link.index)?;
        Some(*pid)
    }

    /// Which macvtaps there are, and if `warns`, whether one of them wants its lower for itself.
    fn present(&self, warns: bool) -> Check {
        let name = "macvtaps";
        let mut takers = self
            .uppers
            .iter()
            .filter(|upper| upper.mode == Some(Mode::Passthru));
        let Some(taker) = takers.next().filter(|_| warns) else {
            let message = match self.uppers[..] {
                [] => "there are no macvtaps or macvlans in this network namespace yet".to_owned(),
                _ => format!("there are {}", quoted(&self.uppers)),
            };
            return Check::ok(name, message);
        };
        let lower = diagnose::by_index(self.links, taker.lower);
        let lower = lower.map_or("its lower link", |lower| &lower.name);
        let upper = &taker.name;
        let end = match self.user_of(taker) {
            Some(pid) => format!("end the process {pid}"),
            None => format!("delete it with `ip link delete {upper}`"),
        };
        let message = format!("`{upper}` has `{lower}` for itself alone (passthru mode)");
        Check::warn(name, message, format!("{end}, or use another interface"))
    }

    fn duplicate_macs(&self) -> Check {
        let name = "duplicate MACs";
        let same_wire = |one: &Link, other: &Link| {
            one.mac.is_some()
                && one.mac == other.mac
                && one.index != other.index
                && one.lower.is_some()
                && (one.lower == other.lower || one.lower == Some(other.index))
                // It takes its lower's on purpose.
                && one.mode != Some(Mode::Passthru)
        };
        let pair = self.uppers.iter().find_map(|upper| {
            let twin = self.known.iter().find(|link| same_wire(upper, link))?;
            let is_fixed = |link: &Link| self.user_of(link).is_some();
            // The first is the one to change.
            let swap = is_fixed(upper) && !is_fixed(twin) && twin.is_macvlan();
            Some(if swap { (twin, *upper) } else { (*upper, twin) })
        });
        let Some((link, Link { name: other, .. })) = pair else {
            return Check::ok(name, "no two links on a wire have the same MAC address");
        };
        let one = &link.name;
        let mac = link
            .mac_addr()
            .map(|mac| format!(" {mac}"))
            .unwrap_or_default();
        let message = format!(
            "`{one}` and `{other}` share a wire and have the same MAC address{mac}: only one of them can be up"
        );
        let remedy = match self.user_of(link) {
            Some(pid) => format!("end the process {pid}, or start it with another address"),
            None => format!(
                "delete the one that is not needed, or give it another with `ip link set {one} address MAC`"
            ),
        };
        Check::warn(name, message, remedy)
    }

    fn vepa(&self) -> Check {
        let name = "vepa";
        let has_sibling = |upper: &&&Link| {
            let is_sibling =
                |other: &&Link| other.lower == upper.lower && other.index != upper.index;
            upper.mode == Some(Mode::Vepa)
                && upper.lower.is_some()
                && self.uppers.iter().any(is_sibling)
        };
        let Some(upper) = self.uppers.iter().find(has_sibling) else {
            return Check::ok(name, "no link depends on a hairpin switch");
        };
        let (link, kind) = (&upper.name, &upper.kind);
        let message = format!(
            "`{link}` is in VEPA mode and has siblings, which it reaches only through a switch that sends frames back (hairpin); most don't"
        );
        let change = match self.user_of(upper) {
            Some(_) => "have it made again in bridge mode".to_owned(),
            None => format!("change it with `ip link set {link} type {kind} mode bridge`"),
        };
        Check::warn(
            name,
            message,
            format!("turn hairpin on at the switch, or {change}"),
        )
    }

    fn stale(&self, facts: &Facts) -> Check {
        let mut stale = self.uppers.clone();
        stale.retain(|upper| facts.stale.contains_key(&upper.index));
        let Some(first) = stale.first() else {
            return Check::ok(Check::LEAKED_LINKS, "every link with an owner is in use");
        };
        let owner = &facts.stale[&first.index];
        let message = format!(
            "stale: {} (`{}` of {}, pid {}, which has ended)",
            quoted(&stale),
            first.name,
            owner.program(),
            owner.pid()
        );
        let delete = stale
            .iter()
            .map(|link| format!("`ip link delete {}`", link.name));
        let delete: Vec<String> = delete.collect();
        let remedy = format!("delete with {}", delete.join(", "));
        Check::warn(Check::LEAKED_LINKS, message, remedy)
    }
}

fn nodes(links: &[Link], nodes: &[Node]) -> Check {
    let name = "device nodes";
    let text = |node: &Node| {
        let index = node.index;
        let path = format!("/dev/tap{index}");
        let foreign = "a macvtap of another network namespace";
        let link = diagnose::by_index(links, Some(index)).map(|link| &link.name);
        match (node.found, node.expected, link) {
            (Some(found), Some(expected), link) if found != expected => {
                let link = link.map_or("it", |link| link);
                Some(format!("{path} is not `{link}` but {foreign}"))
            }
            (Some(_), None, Some(link)) if index < CHOSEN_INDEXES => {
                Some(format!("{path} has the index of `{link}` and is {foreign}"))
            }
            (Some(_), None, None) if index < CHOSEN_INDEXES => Some(format!("{path} is {foreign}")),
            (None, Some(_), link) => {
                let link = link.map_or("a macvtap", |link| link);
                Some(format!("`{link}` has no node {path}"))
            }
            _ => None,
        }
    };
    let found: Vec<String> = nodes.iter().filter_map(text).collect();
    if found.is_empty() {
        return Check::ok(name, "every /dev/tapN is what its name says");
    }
    let remedy = "open macvtaps by their names, not by /dev/tap$(cat /sys/class/net/NAME/ifindex)";
    Check::warn(name, found.join("; "), remedy)
}

fn quoted(links: &[&Link]) -> String {
    const SHOWN: usize = 8;
    let name = |link: &&Link| match link.mode {
        Some(mode) => format!("`{}` ({mode})", link.name),
        None => format!("`{}`", link.name),
    };
    let names: Vec<String> = links.iter().take(SHOWN).map(name).collect();
    let names = names.join(", ");
    match links.len().saturating_sub(SHOWN) {
        0 => names,
        more => format!("{names} and {more} more"),
    }
}
