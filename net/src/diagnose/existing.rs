//! Whether a macvtap that exists can be used as it is. Pure.

use std::collections::BTreeSet;

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
    let sources = differing_sources(macvtap, expected);
    let sources = sources.map(|(has, wanted)| Problem::ExistingSources {
        name: name(),
        has: has.into(),
        wanted: wanted.into(),
    });
    let all = mac.into_iter().chain(mode).chain(mtu).chain(renamed);
    all.chain(lengths).chain(sources).collect()
}

/// The list of senders that a macvtap has, and that which was asked for, when these are not the same.
fn differing_sources(macvtap: &Link, expected: &MacvtapSpec) -> Option<(String, String)> {
    let wanted: BTreeSet<[u8; 6]> = expected
        .source_macs
        .iter()
        .map(|mac| mac.octets())
        .collect();
    let has: BTreeSet<[u8; 6]> = macvtap.source_macs.iter().copied().collect();
    let words = |list: BTreeSet<[u8; 6]>| {
        let macs = list
            .into_iter()
            .filter_map(|mac| MacAddr::try_from(mac).ok());
        let macs: Vec<String> = macs.map(|mac| mac.to_string()).collect();
        macs.join(" ")
    };
    (!wanted.is_empty() && wanted != has).then(|| (words(has), words(wanted)))
}

/// Whether a macvtap has been made as it was asked for: a kernel passes over the attributes that it does not know.
/// (Those that every driver has are not among them.)
pub(crate) fn check_made(made: &Link, expected: &MacvtapSpec) -> Result<(), Problem> {
    let ignored = |key, has: String, wanted: String| Problem::Ignored { key, has, wanted };
    let has = made.bc_queue_len;
    if let Some(wanted) = expected.bc_queue_len.filter(|wanted| *wanted != has) {
        return Err(ignored("bcqueuelen", has.to_string(), wanted.to_string()));
    }
    let mode = expected.mode.unwrap_or_default();
    if made.mode != Some(mode) {
        let has = made.mode.map_or("none", Mode::as_str);
        return Err(ignored("mode", has.to_owned(), mode.to_string()));
    }
    match differing_sources(made, expected) {
        Some((has, wanted)) => Err(ignored("source-mac", has, wanted)),
        None => Ok(()),
    }
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
