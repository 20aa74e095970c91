//! What keeps a link from carrying a macvtap, in whatever mode. Pure.

use thiserror::Error;

use super::{Problem, by_index, list, real_device};
use crate::mode::Mode;
use crate::netlink::Link;

/// Why a link cannot carry a macvtap, or why a macvtap passes no frame.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
#[allow(
    missing_docs,
    reason = "the message above each variant says what it is and what its fields are"
)]
pub enum Unfit {
    #[error("`{name}` is the loopback interface, which has no wire to share")]
    Loopback { name: String },
    #[error("`{name}` is not an Ethernet interface, and a macvtap needs one")]
    NotEthernet { name: String },
    #[error("`{name}` is of the kind {kind}, on which the kernel allows no other link")]
    CarriesNone { name: String, kind: String },
    #[error(
        "`{name}` {}, and access points drop frames from any MAC address but the NIC's own",
        if .name == .nic { "is a Wi-Fi interface".to_owned() } else { format!("goes over the Wi-Fi interface `{nic}`") }
    )]
    Wireless { name: String, nic: String },
    #[error("`{name}` is a port of the {kind} `{master}`, which takes all of its frames")]
    Enslaved {
        name: String,
        kind: String,
        master: String,
    },
    #[error("`{name}` already carries the {kind} `{by}`, which takes all of its frames")]
    HasExclusive {
        name: String,
        kind: &'static str,
        by: String,
    },
    #[error("`{name}` belongs to {} alone, which is in passthru mode", list(.by))]
    TakenByPassthru { name: String, by: Vec<String> },
    #[error("`{name}` is down and drops all frames silently")]
    Down { name: String },
    #[error("the macvtap `{name}` has a queue length of 0, so that it can receive nothing")]
    NoReceiveRing { name: String },
}

impl Unfit {
    /// What to do about it.
    pub fn remedy(&self) -> String {
        match self {
            Self::Loopback { .. } | Self::NotEthernet { .. } => {
                "choose an Ethernet interface".to_owned()
            }
            Self::CarriesNone { kind, .. } if kind == "vrf" => {
                "choose one of the interfaces that are in it".to_owned()
            }
            Self::CarriesNone { .. } => "choose an interface without ipvlan".to_owned(),
            Self::Wireless { .. } => "choose a wired interface".to_owned(),
            Self::Enslaved { name, kind, .. } if kind == "openvswitch" => format!(
                "use an internal port of the switch instead, or free it with `ovs-vsctl del-port {name}`"
            ),
            Self::Enslaved { name, master, .. } => {
                format!("use `{master}` instead, or free it with `ip link set {name} nomaster`")
            }
            Self::HasExclusive { by, .. } => {
                format!("delete that with `ip link delete {by}`, or choose another interface")
            }
            Self::TakenByPassthru { .. } => "end that, or choose another interface".to_owned(),
            Self::Down { name } => format!("bring it up with `ip link set {name} up`"),
            Self::NoReceiveRing { name } => {
                format!("change it with `ip link set {name} txqueuelen 500`")
            }
        }
    }
}

/// Kinds of masters that take all frames of their ports. An empty kind is a driver of real NICs, such as that of a
/// paravirtual NIC with a faster twin (net_failover, hv_netvsc).
const MASTERS_THAT_TAKE_ALL: [&str; 6] = ["bridge", "bond", "team", "hv_netvsc", "openvswitch", ""];

/// Kinds that leave the frames of their ports to others: a VRF only routes, and batman-adv takes its own protocol alone.
/// For a kind that is in neither list the kernel decides.
pub(super) const MASTERS_THAT_SHARE: [&str; 2] = ["vrf", "batadv"];

/// Kinds that take all frames of the link which they sit on.
const UPPERS_THAT_TAKE_ALL: [&str; 5] = ["ipvlan", "ipvtap", "macsec", "virt_wifi", "rmnet"];

/// Kinds that allow no other link on top (IFF_NO_RX_HANDLER).
const CARRY_NONE: [&str; 3] = ["vrf", "ipvlan", "ipvtap"];

/// All that keeps `link` from carrying a macvtap, what weighs most first: a start fails with the first.
///
/// `links` are those of its namespace, and what else is known to sit on them. `wireless` is the Wi-Fi interface that
/// carries its frames, if there is one.
pub(crate) fn problems(links: &[Link], link: &Link, wireless: Option<&Link>) -> Vec<Unfit> {
    let name = link.name.clone();
    if link.loopback {
        return vec![Unfit::Loopback { name }];
    }
    if !link.ethernet {
        return vec![Unfit::NotEthernet { name }];
    }
    let wifi = wireless.map(|nic| Unfit::Wireless {
        name,
        nic: nic.name.clone(),
    });
    // The macvlan driver goes through a macvlan: what that itself is does not matter.
    let real = real_device(links, link);
    let name = || real.name.clone();
    let carries_none = CARRY_NONE.contains(&real.kind.as_str());
    let carries_none = carries_none.then(|| Unfit::CarriesNone {
        name: name(),
        kind: real.kind.clone(),
    });
    let master = by_index(links, real.master);
    let master = master.filter(|master| MASTERS_THAT_TAKE_ALL.contains(&master.kind.as_str()));
    let enslaved = master.map(|master| Unfit::Enslaved {
        name: name(),
        kind: if master.kind.is_empty() {
            "device"
        } else {
            &master.kind
        }
        .to_owned(),
        master: master.name.clone(),
    });
    let exclusive = uppers(links, real).filter_map(|upper| {
        let mut kinds = UPPERS_THAT_TAKE_ALL.into_iter();
        Some(Unfit::HasExclusive {
            name: name(),
            kind: kinds.find(|kind| *kind == upper.kind)?,
            by: upper.name.clone(),
        })
    });
    let by = uppers(links, real)
        .filter(|upper| upper.is_macvlan() && upper.mode == Some(Mode::Passthru))
        .map(|upper| upper.name.clone());
    let by: Vec<String> = by.collect();
    let taken = (!by.is_empty()).then(|| Unfit::TakenByPassthru { name: name(), by });
    let down = (!real.up).then(|| Unfit::Down { name: name() });
    let first = carries_none.into_iter().chain(wifi).chain(enslaved);
    first.chain(exclusive).chain(taken).chain(down).collect()
}

/// The first of the [`problems`].
pub(crate) fn check_lower(
    links: &[Link],
    link: &Link,
    wireless: Option<&Link>,
) -> Result<(), Problem> {
    let first = problems(links, link, wireless).into_iter().next();
    first.map_or(Ok(()), |unfit| Err(unfit.into()))
}

/// The links on `real` that are known.
pub(super) fn uppers<'a>(links: &'a [Link], real: &Link) -> impl Iterator<Item = &'a Link> {
    let index = real.index;
    links.iter().filter(move |link| link.lower == Some(index))
}

#[cfg(test)]
mod tests;
