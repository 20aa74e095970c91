//! From facts to verdicts. Pure.

use super::lower::lower;
use super::neighbour::guests;
use super::{Check, Driver, Facts, Node, Status, VhostNet};
use crate::diagnose::{self, Problem};
use crate::mac::MacAddr;
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
        checks.push(Check::fail(
            "links",
            "the network interfaces cannot be listed",
            remedy,
        ));
        return checks;
    };
    let neighbours = facts.neighbours.iter().map(|(link, _)| link);
    let known: Vec<Link> = links.iter().chain(neighbours).cloned().collect();
    match link.map(|name| diagnose::find(links, name)) {
        Some(Ok(link)) => checks.extend(lower(facts, &known, link)),
        Some(Err(problem)) => {
            let remedy = "name one that is here, or run this in the network namespace that has it";
            checks.push(Check::fail("link", problem.to_string(), remedy));
            return checks;
        }
        None => checks.push(candidates(facts, &known)),
    }
    let only = link.and_then(|name| diagnose::find(links, name).ok());
    let only = only.map(|link| diagnose::real_device(links, link).index);
    let all: Vec<&Link> = known.iter().collect();
    let mut uppers = all.clone();
    uppers.retain(|link| link.is_macvlan() && (only.is_none() || link.lower == only));
    match only {
        // Its judge has said that they keep others off.
        Some(_) if checks.iter().any(|check| check.name == "macvtaps") => {}
        Some(_) => checks.push(present(&uppers)),
        None => checks.push(macvtaps(facts, links, &uppers)),
    }
    checks.push(duplicate_macs(facts, &all, &uppers));
    checks.push(vepa(facts, &uppers));
    checks.push(guests(facts, only));
    checks.push(leaked(facts, &uppers));
    checks.push(nodes(links, &facts.nodes));
    checks
}

impl Check {
    pub(super) fn ok(name: &'static str, message: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            message: message.into(),
            remedy: None,
        }
    }

    pub(super) fn warn(
        name: &'static str,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            name,
            status: Status::Warn,
            message: message.into(),
            remedy: Some(remedy.into()),
        }
    }

    pub(super) fn fail(
        name: &'static str,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            status: Status::Fail,
            ..Self::warn(name, message, remedy)
        }
    }

    /// A problem's sentence has its remedy behind the colon.
    pub(super) fn from_problem(name: &'static str, problem: &Problem) -> Self {
        let text = problem.to_string();
        match text.split_once(": ") {
            Some((message, remedy)) => Self::fail(name, message, remedy),
            None => Self {
                status: Status::Fail,
                ..Self::ok(name, text)
            },
        }
    }
}

fn driver(driver: Driver) -> Check {
    let name = "macvtap driver";
    match driver {
        Driver::Present => Check::ok(name, "the kernel has it"),
        Driver::Loadable => Check::ok(name, "it is a module, which is loaded when it is needed"),
        Driver::Absent => Check::from_problem(name, &Problem::NoDriver),
        Driver::Unknown => Check::warn(
            name,
            "whether the kernel has it cannot be found out without privileges",
            "run this as root",
        ),
    }
}

fn vhost_net(vhost_net: VhostNet) -> Check {
    let name = "vhost-net";
    match vhost_net {
        VhostNet::Usable => Check::ok(name, "/dev/vhost-net can be opened"),
        VhostNet::NotPermitted => Check::warn(
            name,
            "/dev/vhost-net may not be opened, so the kernel cannot take over the copying of frames",
            "run this as root, or let root give it away with `setfacl -m u:$USER:rw /dev/vhost-net`",
        ),
        VhostNet::Absent => Check::warn(
            name,
            "there is no /dev/vhost-net, so the kernel cannot take over the copying of frames",
            "load it with `modprobe vhost_net`, or do without",
        ),
    }
}

/// What this process lacks. Without privileges it may still use what root has opened for it.
fn privileges(facts: &Facts) -> Check {
    let name = "privileges";
    let Some(privileges) = facts.privileges else {
        let message = "/proc does not tell what this process may do";
        return Check::warn(name, message, "mount /proc here");
    };
    let opening = privileges.obstacle_to_opening(facts.mounts_sysfs);
    match privileges.obstacle_to_making().or(opening) {
        None => Check::ok(name, "this process may make and open macvtaps"),
        Some(obstacle) => {
            let status = match obstacle {
                Obstacle::Capabilities(_) => Status::Warn,
                _ => Status::Fail,
            };
            Check {
                status,
                ..Check::from_problem(name, &obstacle.into())
            }
        }
    }
}

/// Which links could carry a macvtap.
fn candidates(facts: &Facts, known: &[Link]) -> Check {
    let fits = |link: &&Link| {
        let wireless = facts.wireless_under(known, link);
        let alone = !link.is_macvlan() && link.carrier;
        alone && diagnose::check_lower(known, link, wireless).is_ok()
    };
    let names: Vec<&str> = known
        .iter()
        .filter(fits)
        .map(|link| link.name.as_str())
        .collect();
    if names.is_empty() {
        let message = "no network interface here could carry a macvtap";
        Check::warn("links", message, "name one to learn what is amiss with it")
    } else {
        Check::ok(
            "links",
            format!("{} could carry macvtaps", names.join(", ")),
        )
    }
}

/// Which macvtaps there are, and whether one of them wants its lower for itself.
fn macvtaps(facts: &Facts, links: &[Link], uppers: &[&Link]) -> Check {
    let name = "macvtaps";
    if let Some(taker) = uppers
        .iter()
        .find(|upper| upper.mode == Some(Mode::Passthru))
    {
        let lower = diagnose::by_index(links, taker.lower);
        let lower = lower.map_or("its lower link", |lower| &lower.name);
        let message = format!(
            "`{}` has `{lower}` for itself alone (passthru mode)",
            taker.name
        );
        return Check::warn(
            name,
            message,
            match facts.user_of(taker) {
                Some(pid) => format!("end the process {pid}, or use another interface"),
                None => format!(
                    "delete it with `ip link delete {}`, or use another interface",
                    taker.name
                ),
            },
        );
    }
    present(uppers)
}

fn present(uppers: &[&Link]) -> Check {
    let message = match uppers {
        [] => "there are no macvtaps or macvlans in this network namespace yet".to_owned(),
        _ => format!("there are {}", quoted(uppers)),
    };
    Check::ok("macvtaps", message)
}

fn duplicate_macs(facts: &Facts, all: &[&Link], uppers: &[&Link]) -> Check {
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
    let pair = uppers.iter().find_map(|upper| {
        let twin = all.iter().find(|link| same_wire(upper, link))?;
        // The first is the one to change.
        match facts.user_of(upper) {
            Some(_) if facts.user_of(twin).is_none() && twin.is_macvlan() => Some((twin, upper)),
            _ => Some((upper, twin)),
        }
    });
    match pair {
        Some((one, other)) => {
            let mac = one.mac.and_then(|bytes| MacAddr::try_from(bytes).ok());
            let mac = mac.map_or_else(String::new, |mac| format!(" {mac}"));
            let message = format!(
                "`{}` and `{}` share a wire and have the same MAC address{mac}: only one of them can be up",
                one.name, other.name
            );
            Check::warn(
                name,
                message,
                match facts.user_of(one) {
                    Some(pid) => format!("end the process {pid}, or start it with another address"),
                    None => format!(
                        "delete the one that is not needed, or give it another with `ip link set {} address MAC`",
                        one.name
                    ),
                },
            )
        }
        None => Check::ok(name, "no two links on a wire have the same MAC address"),
    }
}

fn vepa(facts: &Facts, uppers: &[&Link]) -> Check {
    let name = "vepa";
    let with_sibling = uppers.iter().find(|upper| {
        let is_sibling = |other: &&Link| other.lower == upper.lower && other.index != upper.index;
        upper.mode == Some(Mode::Vepa)
            && upper.lower.is_some()
            && uppers.iter().copied().any(|other| is_sibling(&other))
    });
    match with_sibling {
        Some(upper) => Check::warn(
            name,
            format!(
                "`{}` is in VEPA mode and has siblings, which it reaches only through a switch that sends frames back (hairpin); most don't",
                upper.name
            ),
            match facts.user_of(upper) {
                Some(_) => {
                    "turn hairpin on at the switch, or have it made again in bridge mode".to_owned()
                }
                None => format!(
                    "turn hairpin on at the switch, or change it with `ip link set {} type {} mode bridge`",
                    upper.name, upper.kind
                ),
            },
        ),
        None => Check::ok(name, "no link depends on a hairpin switch"),
    }
}

fn leaked(facts: &Facts, uppers: &[&Link]) -> Check {
    let name = "leaked links";
    let dead = uppers
        .iter()
        .filter(|upper| facts.leaked.contains_key(&upper.index));
    let dead: Vec<&Link> = dead.copied().collect();
    let Some(first) = dead.first() else {
        return Check::ok(name, "no link was left behind by a dead process");
    };
    let owner = &facts.leaked[&first.index];
    let message = format!(
        "{} {} left behind by dead processes (`{}` by {}, pid {})",
        quoted(&dead),
        if dead.len() == 1 { "was" } else { "were" },
        first.name,
        owner.program(),
        owner.pid()
    );
    let delete: Vec<String> = dead
        .iter()
        .map(|link| format!("`ip link delete {}`", link.name))
        .collect();
    Check::warn(name, message, format!("delete with {}", delete.join(", ")))
}

fn nodes(links: &[Link], nodes: &[Node]) -> Check {
    let name = "device nodes";
    let text = |node: &Node| {
        let index = node.index;
        let link = diagnose::by_index(links, Some(index));
        match (node.found, node.expected) {
            (Some(found), Some(expected)) if found != expected => {
                let link = link.map_or("it", |link| &link.name);
                Some(format!(
                    "/dev/tap{index} is not `{link}` but a macvtap of another network namespace"
                ))
            }
            (Some(_), None) if index < CHOSEN_INDEXES => Some(match link {
                Some(link) => format!(
                    "/dev/tap{index} has the index of `{}` and is a macvtap of another network namespace",
                    link.name
                ),
                None => format!("/dev/tap{index} is a macvtap of another network namespace"),
            }),
            (None, Some(_)) => Some(format!(
                "`{}` has no node /dev/tap{index}",
                link.map_or("a macvtap", |link| &link.name)
            )),
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
    let names: Vec<String> = links
        .iter()
        .take(SHOWN)
        .map(|link| match link.mode {
            Some(mode) => format!("`{}` ({mode})", link.name),
            None => format!("`{}`", link.name),
        })
        .collect();
    let more = links.len().saturating_sub(SHOWN);
    let more = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    names.join(", ") + &more
}
