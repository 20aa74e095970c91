//! Whether a link can carry macvtaps. Pure.

use super::{Check, Facts};
use crate::diagnose::{self, Problem};
use crate::netlink::Link;

/// Whether `link` can carry a macvtap, one line for each thing that can be wrong.
pub(super) fn lower(facts: &Facts, links: &[Link], link: &Link) -> Vec<Check> {
    let name = link.name.clone();
    if link.loopback {
        return vec![Check::from_problem("link", &Problem::Loopback { name })];
    }
    if !link.ethernet {
        return vec![Check::from_problem("link", &Problem::NotEthernet { name })];
    }
    let hardware = facts.hardware.get(&link.index).cloned().unwrap_or_default();
    let real = diagnose::real_device(links, link);
    let what = match (&hardware.driver, link.kind.as_str()) {
        (Some(driver), _) => format!("`{name}` is an Ethernet card with the driver {driver}"),
        (None, "") => format!("`{name}` is an Ethernet interface"),
        (None, kind) if real.index != link.index => {
            format!(
                "`{name}` is a {kind}: macvtaps go straight onto `{}` under it",
                real.name
            )
        }
        (None, kind) => format!("`{name}` is a virtual Ethernet interface ({kind})"),
    };
    vec![
        Check::ok("link", what),
        wifi(&name, facts.wireless_under(links, link)),
        membership(links, link),
        ipvlan(links, link),
        state(link),
        carrier(link),
        mtu(link),
    ]
}

fn membership(links: &[Link], link: &Link) -> Check {
    let name = &link.name;
    if link.master.is_none() {
        let message = format!("`{name}` is in no bridge, bond or team");
        return Check::ok("membership", message);
    }
    // As if up: whether it is has its own line.
    let as_if_up = Link {
        up: true,
        carrier: true,
        ..link.clone()
    };
    match diagnose::check_lower(links, &as_if_up, None) {
        Err(problem) if !matches!(problem, Problem::Down { .. }) => {
            Check::from_problem("membership", &problem)
        }
        _ => Check::ok(
            "membership",
            format!("`{name}` is in a VRF, which leaves its frames alone"),
        ),
    }
}

fn state(link: &Link) -> Check {
    let name = link.name.clone();
    if link.up {
        Check::ok("state", format!("`{name}` is up"))
    } else {
        Check::from_problem("state", &Problem::Down { name })
    }
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

fn wifi(name: &str, card: Option<&Link>) -> Check {
    if let Some(card) = card {
        Check::from_problem(
            "wifi",
            &Problem::Wireless {
                name: name.to_owned(),
                card: card.name.clone(),
            },
        )
    } else {
        Check::ok("wifi", format!("`{name}` is no Wi-Fi interface"))
    }
}

fn ipvlan(links: &[Link], link: &Link) -> Check {
    let on_it = |other: &&Link| other.lower == Some(link.index) && other.kind.starts_with("ipv");
    match links.iter().find(on_it) {
        Some(by) => {
            let (name, by) = (link.name.clone(), by.name.clone());
            Check::from_problem("ipvlan", &Problem::HasIpvlan { name, by })
        }
        None => Check::ok("ipvlan", format!("`{}` carries no ipvlan", link.name)),
    }
}
