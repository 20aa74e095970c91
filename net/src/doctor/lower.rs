//! Whether a link can carry macvtaps, by the same rules as a start. Pure.

use super::{Check, Facts};
use crate::diagnose::{self, Unfit};
use crate::netlink::Link;

/// Whether a macvtap can be made on `link`, or it can be used if it is one: every problem, and what else was checked.
/// `known` are the links here and those that are known of elsewhere.
pub(super) fn lower(facts: &Facts, known: &[Link], link: &Link) -> Vec<Check> {
    let problems = match link.is_macvtap() {
        true => diagnose::problems_of_existing(known, link),
        false => diagnose::lower::problems(known, link, facts.wireless_under(known, link)),
    };
    let failure =
        |problem: &Unfit| Check::fail(about(problem), problem.to_string(), problem.remedy());
    if let [problem @ (Unfit::Loopback { .. } | Unfit::NotEthernet { .. })] = &problems[..] {
        return vec![failure(problem)];
    }
    let real = diagnose::real_device(known, link);
    let (name, real_name) = (&link.name, &real.name);
    // Of a macvlan only what is under it matters.
    let up = if link.is_macvtap() { name } else { real_name };
    let mut checks = Vec::new();
    for (subject, sound) in [
        ("link", Some(what(facts, link, real))),
        ("wifi", Some(format!("`{name}` is no Wi-Fi interface"))),
        ("membership", Some(membership(known, real))),
        (
            "uppers",
            Some(format!("nothing on `{real_name}` takes all of its frames")),
        ),
        ("state", Some(format!("`{up}` is up"))),
        // Which there are is a check of its own.
        ("macvtaps", None),
    ] {
        let about_it = problems.iter().filter(|problem| about(problem) == subject);
        let failures: Vec<Check> = about_it.map(failure).collect();
        match sound {
            Some(sound) if failures.is_empty() => checks.push(Check::ok(subject, sound)),
            _ => checks.extend(failures),
        }
    }
    checks.extend([carrier(real), mtu(real), vlans(facts, real)]);
    checks
}

/// The check that a problem belongs to.
const fn about(problem: &Unfit) -> &'static str {
    match problem {
        Unfit::Loopback { .. } | Unfit::NotEthernet { .. } | Unfit::CarriesNone { .. } => "link",
        Unfit::Wireless { .. } => "wifi",
        Unfit::Enslaved { .. } => "membership",
        Unfit::HasExclusive { .. } => "uppers",
        Unfit::TakenByPassthru { .. } => "macvtaps",
        Unfit::Down { .. } | Unfit::NoReceiveRing { .. } => "state",
    }
}

fn what(facts: &Facts, link: &Link, real: &Link) -> String {
    let (name, real_name) = (&link.name, &real.name);
    let hardware = facts.hardware.get(&link.index).cloned().unwrap_or_default();
    match (hardware.driver, link.kind.as_str()) {
        (Some(driver), _) => format!("`{name}` is an Ethernet NIC with the driver {driver}"),
        (None, "") => format!("`{name}` is an Ethernet interface"),
        (None, "macvtap") => format!("`{name}` is a macvtap already and is used as it is"),
        (None, kind) if real.index != link.index => {
            format!("`{name}` is a {kind}: macvtaps go straight onto `{real_name}` under it")
        }
        (None, kind) => format!("`{name}` is a virtual Ethernet interface ({kind})"),
    }
}

fn membership(known: &[Link], real: &Link) -> String {
    let name = &real.name;
    match diagnose::by_index(known, real.master) {
        Some(Link {
            kind, name: master, ..
        }) => {
            format!("`{name}` is in the {kind} `{master}`, which leaves its frames alone")
        }
        None => format!("`{name}` is in no bridge, bond or team"),
    }
}

fn carrier(link: &Link) -> Check {
    let (check, name) = ("carrier", &link.name);
    if link.carrier {
        return Check::ok(check, format!("`{name}` has a wire"));
    }
    let (message, remedy) = match link.up {
        true => (
            "so no frame will pass",
            "plug in its cable, or bring up its peer",
        ),
        false => ("as it is down", "bring it up"),
    };
    Check::warn(check, format!("`{name}` has no carrier, {message}"), remedy)
}

fn mtu(link: &Link) -> Check {
    let (name, mtu) = (&link.name, link.mtu);
    if mtu >= 1280 {
        return Check::ok("mtu", format!("the MTU of `{name}` is {mtu}"));
    }
    let message = format!("the MTU of `{name}` is {mtu}, too small for IPv6");
    let remedy = format!("raise it with `ip link set {name} mtu 1500`");
    Check::warn("mtu", message, remedy)
}

/// A macvtap doesn't know which VLANs its user is in, so the NIC is not asked for them.
fn vlans(facts: &Facts, link: &Link) -> Check {
    let name = &link.name;
    let hardware = facts.hardware.get(&link.index);
    if !hardware.is_some_and(|hardware| hardware.filters_vlans) {
        return Check::ok("vlans", format!("`{name}` passes on every VLAN"));
    }
    let message = format!(
        "`{name}` passes on only frames of VLANs that this host is in (rx-vlan-filter), so those of guests may be lost"
    );
    let remedy = format!(
        "for guests with VLANs turn that off with `ethtool -K {name} rx-vlan-filter off`, or give them a vlan link on `{name}` as their interface"
    );
    Check::warn("vlans", message, remedy)
}
