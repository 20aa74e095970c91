//! Inventory and diagnosis of network namespaces of the tests' own. They need root.

#![allow(
    clippy::unwrap_used,
    reason = "all of this file is tests, and the lint spares #[test] functions alone"
)]

#[path = "../../tests/harness/netns.rs"]
mod netns;

use net::{Check, Place, Status, diagnose_host, inventory};
use netns::{Netns, root_test};

fn diagnose(netns: &Netns, link: Option<&str>) -> Vec<Check> {
    let link = link.map(|link| link.parse().unwrap());
    let checks = netns.enter(|| diagnose_host(link.as_ref(), &[]));
    for check in &checks {
        eprintln!(
            "{} {}: {} {:?}",
            check.status.as_str(),
            check.name,
            check.message,
            check.remedy
        );
    }
    checks
}

fn check<'a>(checks: &'a [Check], name: &str) -> &'a Check {
    checks.iter().find(|check| check.name == name).unwrap()
}

root_test!(inventory_shows_every_upper_with_its_lower, || {
    let (host, other) = (Netns::new(), Netns::new());
    host.wire("v0");
    host.macvtap("tap0", "v0", "vepa");
    host.macvlan("mv0", &host, "v0");
    host.ip("link set mv0 alias mine");
    other.macvlan("far0", &host, "v0");

    let found = host.enter(|| inventory(None)).unwrap();
    let [lower] = &found[..] else {
        panic!("{found:?}")
    };
    assert_eq!(
        (lower.place, lower.name.as_deref(), lower.mtu),
        (Place::Here, Some("v0"), Some(1500))
    );
    assert_eq!(lower.mac.unwrap().to_string(), host.mac("v0"));
    let [tap, macvlan] = &lower.uppers[..] else {
        panic!("{found:?}")
    };
    assert_eq!(
        (tap.name.as_str(), tap.kind.as_str(), tap.mode),
        ("tap0", "macvtap", Some("vepa"))
    );
    assert!(tap.up && tap.carrier && tap.owner.is_none());
    assert_eq!(
        (macvlan.kind.as_str(), macvlan.mode, macvlan.alias.as_str()),
        ("macvlan", Some("bridge"), "mine")
    );
    assert_eq!(macvlan.mac.unwrap().to_string(), host.mac("mv0"));

    let by_name = |link: &str| host.enter(|| inventory(Some(&link.parse().unwrap())));
    assert_eq!(by_name("v0").unwrap(), found);
    assert_eq!(
        by_name("mv0").unwrap(),
        found,
        "an upper stands for its lower"
    );
    assert!(by_name("v0-far").unwrap()[0].uppers.is_empty());
    assert!(by_name("v9").is_err());

    // There the lower is in another namespace, so little is known of it.
    let there = other.enter(|| inventory(None)).unwrap();
    let [lower] = &there[..] else {
        panic!("{there:?}")
    };
    assert!(matches!(lower.place, Place::Other(_)) && lower.name.is_none());
    assert_eq!(lower.uppers[0].name, "far0");
});

root_test!(doctor_of_a_good_lower_finds_nothing_that_fails, || {
    let host = Netns::new();
    host.wire("v0");
    let links = host.links();
    for link in [None, Some("v0")] {
        let checks = diagnose(&host, link);
        assert!(
            checks.iter().all(|check| check.status != Status::Fail),
            "{checks:?}"
        );
        assert_eq!(check(&checks, "macvtap driver").status, Status::Ok);
    }
    assert_eq!(host.links(), links, "it changes nothing");
});

root_test!(doctor_of_a_bad_lower_says_why, || {
    let host = Netns::new();
    host.wire("v0");
    host.bridge("br0", &["v0"]);
    let checks = diagnose(&host, Some("v0"));
    assert_eq!(check(&checks, "membership").status, Status::Fail);
    host.ip("link set v0 nomaster");
    host.macvtap("tap0", "v0", "vepa");
    // The kernel notices a taken address only when the link is brought up.
    let mac = host.mac("tap0");
    host.ip(&format!(
        "link add link v0 name tap1 address {mac} type macvtap mode vepa"
    ));
    let checks = diagnose(&host, Some("v0"));
    assert_eq!(check(&checks, "vepa").status, Status::Warn);
    assert_eq!(check(&checks, "duplicate MACs").status, Status::Warn);
    assert_eq!(
        check(&diagnose(&host, Some("lo")), "link").status,
        Status::Fail
    );
    assert_eq!(
        check(&diagnose(&host, Some("v7")), "link").status,
        Status::Fail
    );
});

root_test!(doctor_finds_the_node_of_another_namespace, || {
    let spaces = [Netns::new(), Netns::new()];
    let index = 3_000_000 + std::process::id();
    for netns in &spaces {
        netns.wire("v0");
        netns.ip(&format!(
            "link add link v0 name mine index {index} type macvtap mode bridge"
        ));
    }
    let wrong = spaces.iter().filter(|netns| {
        let checks = diagnose(netns, Some("v0"));
        let nodes = check(&checks, "device nodes");
        nodes
            .message
            .contains(&format!("/dev/tap{index} is not `mine`"))
    });
    assert_eq!(wrong.count(), 1);
});
