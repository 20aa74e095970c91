//! Whether a macvtap that exists can be used as it is. Pure.

use super::{Problem, Unfit, by_index};
use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::netlink::Link;
use crate::spec::MacvtapSpec;

/// All that keeps a macvtap from passing frames.
pub(crate) fn problems_of_existing(links: &[Link], macvtap: &Link) -> Vec<Unfit> {
    let ring = (macvtap.tx_queue_len == 0).then(|| Unfit::NoReceiveRing {
        name: macvtap.name.clone(),
    });
    let both = std::iter::once(macvtap).chain(by_index(links, macvtap.lower));
    let down = both.filter(|link| !link.up).map(|link| Unfit::Down {
        name: link.name.clone(),
    });
    ring.into_iter().chain(down).collect()
}

/// Refuses a macvtap that is not what was asked for, or passes no frames.
pub(crate) fn check_existing(
    links: &[Link],
    macvtap: &Link,
    expected: &MacvtapSpec,
) -> Result<(), Problem> {
    if let Some(difference) = differences(macvtap, expected).into_iter().next() {
        let name = macvtap.name.clone();
        let difference = Box::new(difference);
        return Err(Problem::Existing { name, difference });
    }
    let first = problems_of_existing(links, macvtap).into_iter().next();
    first.map_or(Ok(()), |unfit| Err(unfit.into()))
}

/// A property of a macvtap that is not what was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Difference {
    /// Which property.
    pub what: &'static str,
    /// Its value.
    pub has: String,
    /// What was asked for.
    pub wanted: String,
    /// The words of ip-link(8) that set it.
    pub(super) set: &'static str,
}

fn differences(macvtap: &Link, expected: &MacvtapSpec) -> Vec<Difference> {
    let number = |wanted: Option<u32>| wanted.map(|number| number.to_string());
    let wanted_macs: Vec<[u8; 6]> = expected
        .source_macs
        .iter()
        .map(|mac| mac.octets())
        .collect();
    let properties = [
        (
            "MAC address",
            "address",
            macs(macvtap.mac.as_slice()),
            expected.mac.map(|mac| mac.to_string()),
        ),
        (
            "mode",
            "type macvtap mode",
            macvtap.mode.map_or("none", Mode::as_str).to_owned(),
            expected.mode.map(|mode| mode.to_string()),
        ),
        ("MTU", "mtu", macvtap.mtu.to_string(), number(expected.mtu)),
        (
            "name",
            "name",
            macvtap.name.clone(),
            expected.name.as_ref().map(ToString::to_string),
        ),
        (
            "txqueuelen",
            "txqueuelen",
            macvtap.tx_queue_len.to_string(),
            number(expected.tx_queue_len),
        ),
        (
            "bcqueuelen",
            "type macvtap bcqueuelen",
            macvtap.bc_queue_len.to_string(),
            number(expected.bc_queue_len),
        ),
        (
            "source-mac",
            "type macvtap macaddr set",
            macs(&macvtap.source_macs),
            (!wanted_macs.is_empty()).then(|| macs(&wanted_macs)),
        ),
    ];
    let differs = |(what, set, has, wanted): (_, _, String, Option<String>)| {
        let wanted = wanted.filter(|wanted| *wanted != has)?;
        Some(Difference {
            what,
            has,
            wanted,
            set,
        })
    };
    properties.into_iter().filter_map(differs).collect()
}

/// A set of MAC addresses in words.
fn macs(list: &[[u8; 6]]) -> String {
    let mut list = list.to_vec();
    list.sort_unstable();
    list.dedup();
    let macs = list
        .into_iter()
        .filter_map(|mac| MacAddr::try_from(mac).ok());
    let macs: Vec<String> = macs.map(|mac| mac.to_string()).collect();
    if macs.is_empty() {
        "none".to_owned()
    } else {
        macs.join(" ")
    }
}

/// Whether a macvtap has been made as it was asked for: a kernel passes over the attributes that it does not know.
/// (Those that every driver has are not among them.)
pub(crate) fn check_made(made: &Link, expected: &MacvtapSpec) -> Result<(), Problem> {
    let expected = MacvtapSpec {
        mode: expected.mode.or(Some(Mode::default())),
        ..expected.clone()
    };
    let mut found = differences(made, &expected).into_iter();
    let ignored = ["bcqueuelen", "mode", "source-mac"];
    let ignored = found.find(|difference| ignored.contains(&difference.what));
    ignored.map_or(Ok(()), |difference| {
        Err(Problem::Ignored(difference.into()))
    })
}

/// Warns of an existing macvtap that passes on only the multicast which the host itself has joined: IPv6 neighbours would
/// look for its user in vain.
pub(crate) fn warn_of_filter(macvtap: &Link) {
    if macvtap.is_macvtap() && !macvtap.all_multicast {
        let name = &macvtap.name;
        log::warn!(
            "{name} filters multicast, so a fixed IPv6 address of its user may not be found: `ip link set {name} allmulticast on`"
        );
    }
}
