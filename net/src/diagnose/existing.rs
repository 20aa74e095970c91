//! Whether a macvtap that exists can be used as it is. Pure.

use super::{Problem, by_index};
use crate::mac::MacAddr;
use crate::mode::Mode;
use crate::netlink::Link;
use crate::spec::MacvtapSpec;

/// All that keeps a macvtap from being used as it is, or in which it is not what was asked for; a start fails with the
/// first.
pub(crate) fn problems_of_existing(
    links: &[Link],
    macvtap: &Link,
    expected: &MacvtapSpec,
) -> Vec<Problem> {
    let mut found = differences(macvtap, expected);
    if macvtap.tx_queue_len == 0 {
        let name = macvtap.name.clone();
        found.push(Problem::NoReceiveRing { name });
    }
    let lower = by_index(links, macvtap.lower);
    let down = std::iter::once(macvtap)
        .chain(lower)
        .filter(|link| !link.up);
    found.extend(down.map(|link| Problem::Down {
        name: link.name.clone(),
    }));
    found
}

/// The first of the [`problems_of_existing`].
pub(crate) fn check_existing(
    links: &[Link],
    macvtap: &Link,
    expected: &MacvtapSpec,
) -> Result<(), Problem> {
    let problems = problems_of_existing(links, macvtap, expected);
    problems.into_iter().next().map_or(Ok(()), Err)
}

/// In what it is not what was asked for.
fn differences(macvtap: &Link, expected: &MacvtapSpec) -> Vec<Problem> {
    let name = || macvtap.name.clone();
    let mac = expected.mac.filter(|mac| macvtap.mac != Some(mac.octets()));
    let mac = mac.map(|mac| Problem::ExistingMac {
        name: name(),
        has: macvtap
            .mac
            .and_then(|bytes| MacAddr::try_from(bytes).ok())
            .map_or("none".to_owned(), |mac| mac.to_string()),
        mac,
    });
    let mode = expected.mode.filter(|mode| macvtap.mode != Some(*mode));
    let mode = mode.map(|mode| Problem::ExistingMode {
        name: name(),
        has: macvtap.mode.map_or("an unknown", Mode::as_str).to_owned(),
        mode,
    });
    let mtu = expected.mtu.filter(|mtu| macvtap.mtu != *mtu);
    let mtu = mtu.map(|mtu| Problem::ExistingMtu {
        name: name(),
        has: macvtap.mtu,
        mtu,
    });
    let wanted = expected.name.clone();
    let wanted = wanted.filter(|wanted| wanted.as_str() != macvtap.name);
    let renamed = wanted.map(|wanted| Problem::ExistingName {
        name: name(),
        wanted,
    });
    let (tx, bc) = (macvtap.tx_queue_len, macvtap.bc_queue_len);
    let lengths = [
        ("txqueuelen", "txqueuelen", tx, expected.tx_queue_len),
        (
            "bcqueuelen",
            "type macvtap bcqueuelen",
            bc,
            expected.bc_queue_len,
        ),
    ];
    let lengths = lengths
        .into_iter()
        .filter_map(|(key, command, has, wanted)| {
            let wanted = wanted.filter(|wanted| *wanted != has)?;
            Some(Problem::ExistingLength {
                name: name(),
                key,
                has,
                wanted,
                command,
            })
        });
    let all = mac.into_iter().chain(mode).chain(mtu).chain(renamed);
    all.chain(lengths).collect()
}

/// Warns of a macvtap, made by somebody else, that passes on only the multicast which the host itself has joined: IPv6
/// neighbours would look for its user in vain.
pub(crate) fn warn_of_filter(macvtap: &Link) {
    if macvtap.is_macvtap() && !macvtap.all_multicast {
        let name = &macvtap.name;
        log::warn!(
            "{name} filters multicast, so a fixed IPv6 address behind it may not be found: `ip link set {name} allmulticast on`"
        );
    }
}
