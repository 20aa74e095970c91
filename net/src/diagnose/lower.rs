//! The judge of a lower: everything that keeps a link from carrying a macvtap, in whatever mode. Pure.

use super::{Problem, by_index, real_device};
use crate::mode::Mode;
use crate::netlink::Link;

/// Kinds of links that take all frames of a link which is their port. An empty kind is a driver of real NICs, such as
/// that of a paravirtual NIC with a faster twin (net_failover, hv_netvsc).
const MASTERS_THAT_TAKE_ALL: [&str; 5] = ["bridge", "bond", "team", "hv_netvsc", ""];

/// Kinds that leave the frames of their ports to others: a VRF only routes, and batman-adv takes its own protocol alone.
/// Of a kind that is in neither list the kernel has to say it.
pub(super) const MASTERS_THAT_SHARE: [&str; 2] = ["vrf", "batadv"];

/// Kinds that take all frames of the link which they sit on.
const UPPERS_THAT_TAKE_ALL: [&str; 5] = ["ipvlan", "ipvtap", "macsec", "virt_wifi", "rmnet"];

/// Kinds that allow no other link on top (IFF_NO_RX_HANDLER), and what to take instead.
const CARRY_NONE: [(&str, &str); 3] = [
    ("vrf", "one of the interfaces that are in it"),
    ("ipvlan", "an interface without ipvlan"),
    ("ipvtap", "an interface without ipvlan"),
];

/// All that keeps `link` from carrying a macvtap, what weighs most first: a start fails with the first.
///
/// `links` are those of its namespace, and what else is known to sit on them. `wireless` is the Wi-Fi interface that
/// carries its frames, if there is one.
pub(crate) fn problems(links: &[Link], link: &Link, wireless: Option<&Link>) -> Vec<Problem> {
    let name = link.name.clone();
    if link.loopback {
        return vec![Problem::Loopback { name }];
    }
    if !link.ethernet {
        return vec![Problem::NotEthernet { name }];
    }
    // The macvlan driver goes through a macvlan: what that itself is does not matter.
    let real = real_device(links, link);
    let wifi = wireless.map(|nic| Problem::Wireless {
        name,
        nic: nic.name.clone(),
    });
    let down = (!real.up).then(|| Problem::Down {
        name: real.name.clone(),
    });
    carries_none(real)
        .into_iter()
        .chain(wifi)
        .chain(by_index(links, real.master).and_then(|master| enslaved(real, master)))
        .chain(exclusive_uppers(links, real))
        .chain(taken_by_passthru(links, real))
        .chain(down)
        .collect()
}

/// The first of the [`problems`].
pub(crate) fn check_lower(
    links: &[Link],
    link: &Link,
    wireless: Option<&Link>,
) -> Result<(), Problem> {
    let problems = problems(links, link, wireless);
    problems.into_iter().next().map_or(Ok(()), Err)
}

/// Warns of a lower that is fit and has no wire.
pub(crate) fn warn_of_carrier(lower: &Link) {
    if !lower.carrier {
        let name = &lower.name;
        log::warn!("{name} has no carrier: no frame will pass until its cable or peer is there");
    }
}

fn carries_none(real: &Link) -> Option<Problem> {
    let (kind, instead) = CARRY_NONE
        .into_iter()
        .find(|(kind, _)| *kind == real.kind)?;
    Some(Problem::CarriesNone {
        name: real.name.clone(),
        kind: kind.to_owned(),
        instead,
    })
}

fn enslaved(real: &Link, master: &Link) -> Option<Problem> {
    let name = real.name.clone();
    match master.kind.as_str() {
        "openvswitch" => Some(Problem::InOpenVswitch { name }),
        kind if MASTERS_THAT_TAKE_ALL.contains(&kind) => Some(Problem::Enslaved {
            name,
            kind: if kind.is_empty() { "device" } else { kind }.to_owned(),
            master: master.name.clone(),
        }),
        _ => None,
    }
}

fn exclusive_uppers(links: &[Link], real: &Link) -> impl Iterator<Item = Problem> {
    uppers(links, real).filter_map(|upper| {
        let mut kinds = UPPERS_THAT_TAKE_ALL.into_iter();
        Some(Problem::HasExclusive {
            name: real.name.clone(),
            kind: kinds.find(|kind| *kind == upper.kind)?,
            by: upper.name.clone(),
        })
    })
}

fn taken_by_passthru(links: &[Link], real: &Link) -> Option<Problem> {
    let by = uppers(links, real)
        .filter(|upper| upper.is_macvlan() && upper.mode == Some(Mode::Passthru))
        .map(|upper| upper.name.clone());
    let by: Vec<String> = by.collect();
    (!by.is_empty()).then(|| Problem::TakenByPassthru {
        name: real.name.clone(),
        by,
    })
}

/// The links on `real` that are known.
pub(super) fn uppers<'a>(links: &'a [Link], real: &Link) -> impl Iterator<Item = &'a Link> {
    let index = real.index;
    links.iter().filter(move |link| link.lower == Some(index))
}

#[cfg(test)]
mod tests;
