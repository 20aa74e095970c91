//! Whether a link can carry macvtaps, by the judge that a start asks. Pure.

use super::{Check, Facts};
use crate::diagnose::{self, Problem};
use crate::netlink::Link;
use crate::spec::MacvtapSpec;

/// Whether a macvtap can be made on `link`, or it can be used if it is one: every problem, and what else was looked at.
/// `known` are the links here and those that are known of elsewhere.
pub(super) fn lower(facts: &Facts, known: &[Link], link: &Link) -> Vec<Check> {
    let problems = problems(facts, known, link);
    if let [problem @ (Problem::Loopback { .. } | Problem::NotEthernet { .. })] = &problems[..] {
        return vec![Check::from_problem("link", problem)];
    }
    let real = diagnose::real_device(known, link);
    let mut checks = Vec::new();
    for (subject, sound) in [
        ("link", Some(what(facts, link, real))),
        (
            "wifi",
            Some(format!("`{}` is no Wi-Fi interface", link.name)),
        ),
        ("membership", Some(membership(known, real))),
        (
            "uppers",
            Some(format!(
                "nothing on `{}` takes all of its frames",
                real.name
            )),
        ),
        ("state", Some(state(link, real))),
        // Which there are is a check of its own.
        ("macvtaps", None),
    ] {
        let about_it = problems.iter().filter(|problem| about(problem) == subject);
        let failures: Vec<Check> = about_it
            .map(|problem| Check::from_problem(subject, problem))
            .collect();
        match sound {
            Some(sound) if failures.is_empty() => checks.push(Check::ok(subject, sound)),
            _ => checks.extend(failures),
        }
    }
    checks.extend([carrier(real), mtu(real), vlans(facts, real)]);
    checks
}

fn problems(facts: &Facts, known: &[Link], link: &Link) -> Vec<Problem> {
    if !link.is_macvtap() {
        return diagnose::lower::problems(known, link, facts.wireless_under(known, link));
    }
    match link.name.parse() {
        Ok(name) => diagnose::problems_of_existing(known, link, &MacvtapSpec::new(name)),
        // One that can't be named on a command line either.
        Err(_) => Vec::new(),
    }
}

/// The check that a problem of a lower belongs to.
const fn about(problem: &Problem) -> &'static str {
    match problem {
        Problem::Wireless { .. } => "wifi",
        Problem::Enslaved { .. } | Problem::InOpenVswitch { .. } => "membership",
        Problem::HasExclusive { .. } => "uppers",
        Problem::TakenByPassthru { .. } => "macvtaps",
        Problem::Down { .. } | Problem::NoReceiveRing { .. } => "state",
        _ => "link",
    }
}

fn what(facts: &Facts, link: &Link, real: &Link) -> String {
    let name = &link.name;
    let hardware = facts.hardware.get(&link.index).cloned().unwrap_or_default();
    match (hardware.driver, link.kind.as_str()) {
        (Some(driver), _) => format!("`{name}` is an Ethernet NIC with the driver {driver}"),
        (None, "") => format!("`{name}` is an Ethernet interface"),
        (None, "macvtap") => format!("`{name}` is a macvtap already and is used as it is"),
        (None, kind) if real.index != link.index => {
            let real = &real.name;
            format!("`{name}` is a {kind}: macvtaps go straight onto `{real}` under it")
        }
        (None, kind) => format!("`{name}` is a virtual Ethernet interface ({kind})"),
    }
}

fn membership(known: &[Link], real: &Link) -> String {
    let name = &real.name;
    match diagnose::by_index(known, real.master) {
        Some(master) => format!(
            "`{name}` is in the {} `{}`, which leaves its frames alone",
            master.kind, master.name
        ),
        None => format!("`{name}` is in no bridge, bond or team"),
    }
}

fn state(link: &Link, real: &Link) -> String {
    // Of a macvlan in between only what is under it matters.
    let name = if link.is_macvtap() {
        &link.name
    } else {
        &real.name
    };
    format!("`{name}` is up")
}

fn carrier(link: &Link) -> Check {
    let name = &link.name;
    if link.carrier {
        Check::ok("carrier", format!("`{name}` has a wire"))
    } else if link.up {
        let message = format!("`{name}` has no carrier, so no frame will pass");
        Check::warn(
            "carrier",
            message,
            "plug in its cable, or bring up its peer",
        )
    } else {
        let message = format!("`{name}` has no carrier while it is down");
        Check::warn("carrier", message, "bring it up")
    }
}

fn mtu(link: &Link) -> Check {
    let (name, mtu) = (&link.name, link.mtu);
    if mtu < 1280 {
        let message = format!("the MTU of `{name}` is {mtu}, too small for IPv6");
        let remedy = format!("raise it with `ip link set {name} mtu 1500`");
        Check::warn("mtu", message, remedy)
    } else {
        Check::ok("mtu", format!("the MTU of `{name}` is {mtu}"))
    }
}

/// A macvtap doesn't know which VLANs its user is in, so nobody asks the NIC for them.
fn vlans(facts: &Facts, link: &Link) -> Check {
    let name = &link.name;
    let hardware = facts.hardware.get(&link.index);
    if hardware.is_some_and(|hardware| hardware.filters_vlans) {
        let message = format!(
            "`{name}` passes on only frames of VLANs that this host is in (rx-vlan-filter), so those of guests may be lost"
        );
        let remedy = format!(
            "for guests with VLANs turn that off with `ethtool -K {name} rx-vlan-filter off`, or give them a vlan link on `{name}` as their interface"
        );
        Check::warn("vlans", message, remedy)
    } else {
        Check::ok("vlans", format!("`{name}` passes on every VLAN"))
    }
}
