//! The host link on real links, in network namespaces of the tests' own. They need root.

#![allow(
    clippy::unwrap_used,
    reason = "all of this file is tests, and the lint spares #[test] functions alone"
)]

#[path = "../../tests/harness/netns.rs"]
mod netns;

use net::{HostLink, HostLinkError, HostLinkGuard, HostLinkProblem, HostLinkSpec, Problem, Unfit};
use netns::{Netns, root_test};

fn spec(addresses: &[&str]) -> HostLinkSpec {
    let mut spec = HostLinkSpec::new("v0".parse().unwrap());
    spec.addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
    spec
}

fn create(host: &Netns, spec: &HostLinkSpec) -> HostLink {
    host.enter(|| HostLink::create(spec)).unwrap()
}

/// The problem that keeps a host link from being made, after a check that nothing was left.
fn problem(host: &Netns, spec: &HostLinkSpec) -> HostLinkProblem {
    // The kernel gives a link that has come up its link-local address, and takes its time.
    let state = || (host.links(), host.ip("-o address show scope global"));
    let before = state();
    let result = host.enter(|| HostLink::create(spec));
    assert_eq!(state(), before);
    result.expect_err("a problem").source
}

fn delete(host: &Netns, link: &str) -> Result<HostLink, HostLinkProblem> {
    let link = link.parse().unwrap();
    host.enter(|| HostLink::delete(&link))
        .map_err(|error| error.source)
}

/// A host with an address on `v0`, a guest on it with addresses of its own, and a third host on the
/// wire.
fn host_and_guest() -> (Netns, Netns, Netns) {
    let (host, guest, far) = (Netns::new(), Netns::new(), Netns::new());
    host.veth("v0", &far, "v1");
    guest.macvlan("eth0", &host, "v0");
    host.address("v0", "192.0.2.1/24");
    host.address("v0", "2001:db8::1/64");
    guest.address("eth0", "192.0.2.2/24");
    guest.address("eth0", "2001:db8::2/64");
    far.address("v1", "192.0.2.3/24");
    far.address("v1", "2001:db8::3/64");
    (host, guest, far)
}

root_test!(guest_out_of_reach_is_reached_by_a_host_link, || {
    let (host, guest, _far) = host_and_guest();
    assert!(
        !host.pings("192.0.2.2", 1),
        "the lower link itself must not reach its guest"
    );
    guest.address("eth0", "10.7.0.2/24");
    guest.address("eth0", "fd00::2/64");
    host.detect_duplicates(true);
    let made = create(&host, &spec(&["10.7.0.1/24", "fd00::1/64"]));
    assert_eq!(
        (made.name.as_str(), made.lower.as_str()),
        ("macvlan0", "v0")
    );
    // At once: neither duplicate detection nor a first lost packet.
    for (from, to) in [
        (&host, "10.7.0.2"),
        (&host, "fd00::2"),
        (&guest, "10.7.0.1"),
        (&guest, "fd00::1"),
    ] {
        assert!(from.pings(to, 2), "{to}");
    }
    delete(&host, "v0").unwrap();
    assert!(!host.pings("10.7.0.2", 1));
});

root_test!(moved_addresses_reach_guest_and_wire_and_come_back, || {
    let (host, guest, far) = host_and_guest();
    assert!(far.pings("192.0.2.1", 3) && far.pings("2001:db8::1", 3));
    host.ip("route add default via 192.0.2.3");
    let mut wanted = spec(&[]);
    wanted.move_addresses = true;
    wanted.name = Some("uplink".parse().unwrap());
    let made = create(&host, &wanted);
    assert_eq!((made.name.as_str(), made.moved), ("uplink", true));
    for (from, to) in [
        (&host, "192.0.2.2"),
        (&host, "2001:db8::2"),
        (&guest, "192.0.2.1"),
        (&guest, "2001:db8::1"),
        (&host, "192.0.2.3"),
        (&host, "2001:db8::3"),
        (&far, "192.0.2.1"),
        (&far, "2001:db8::1"),
    ] {
        assert!(from.pings(to, 2), "{to}");
    }
    assert!(
        host.ip("route show default")
            .contains("via 192.0.2.3 dev uplink")
    );
    assert!(
        matches!(problem(&host, &wanted), HostLinkProblem::NothingToMove { already, .. } if already == ["`uplink`"])
    );

    let gone = delete(&host, "uplink").unwrap();
    assert_eq!(gone.addresses, made.addresses);
    assert!(
        host.ip("route show default")
            .contains("via 192.0.2.3 dev v0")
    );
    assert!(host.pings("192.0.2.3", 2) && host.pings("2001:db8::3", 2));
    assert!(!host.pings("192.0.2.2", 1));
});

root_test!(neighbours_learn_of_moved_addresses_at_once, || {
    let (host, _guest, far) = host_and_guest();
    assert!(far.pings("192.0.2.1", 3));
    assert!(far.ip("neigh show 192.0.2.1").contains(&host.mac("v0")));
    let mut wanted = spec(&[]);
    wanted.move_addresses = true;
    let made = create(&host, &wanted);
    let new = host.mac(&made.name);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        let known = far.ip("neigh show 192.0.2.1");
        if known.contains(&new) {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "not {new}: {known}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
});

root_test!(address_that_would_lead_nowhere_is_refused, || {
    let (host, _guest, _far) = host_and_guest();
    use HostLinkProblem as P;
    assert!(matches!(problem(&host, &spec(&[])), P::NoAddress { .. }));
    for taken in ["192.0.2.1/24", "2001:db8::1/128"] {
        assert!(
            matches!(problem(&host, &spec(&[taken])), P::AddressTaken { by, .. } if by == "v0")
        );
    }
    for inside in ["192.0.2.9/24", "192.0.0.9/16", "2001:db8::9/64"] {
        assert!(
            matches!(problem(&host, &spec(&[inside])), P::SameNetwork { by, .. } if by == "v0")
        );
    }
    // A part of the network, for guests there, works.
    create(&host, &spec(&["192.0.2.9/29"]));
    assert!(matches!(delete(&host, "macvlan0"), Ok(gone) if !gone.moved));
    // Moved addresses are no hindrance, whether they are asked for or not.
    let mut wanted = spec(&["192.0.2.1/24", "192.0.2.9/24"]);
    wanted.move_addresses = true;
    let made = create(&host, &wanted);
    assert_eq!(made.addresses.len(), 3);
    assert_eq!(host.ip("-o -4 address show dev v0"), "");
    delete(&host, "v0").unwrap();
    let back = host.ip("-o -4 address show dev v0");
    assert!(
        back.contains("192.0.2.1/24") && !back.contains("192.0.2.9"),
        "{back}"
    );
});

root_test!(unfit_lowers_and_names_are_refused_with_the_reason, || {
    let host = Netns::new();
    host.wire("v0");
    use HostLinkProblem as P;
    let mut named = spec(&["10.7.0.1/24"]);
    named.name = Some("v0-far".parse().unwrap());
    assert!(matches!(problem(&host, &named), P::NameTaken { name } if name == "v0-far"));
    let mut absent = spec(&["10.7.0.1/24"]);
    absent.link = "v7".parse().unwrap();
    assert!(matches!(
        problem(&host, &absent),
        P::Lower(Problem::NoSuchLink { .. })
    ));
    absent.link = "lo".parse().unwrap();
    assert!(matches!(
        problem(&host, &absent),
        P::Lower(Problem::Unfit(Unfit::Loopback { .. }))
    ));
    let mut with_mac = spec(&["10.7.0.1/24"]);
    with_mac.mac = Some(host.mac("v0").parse().unwrap());
    assert!(matches!(
        problem(&host, &with_mac),
        P::Lower(Problem::MacIsLowers { .. })
    ));

    host.macvtap("taker", "v0", "passthru");
    assert!(matches!(
        problem(&host, &spec(&["10.7.0.1/24"])),
        P::Lower(Problem::Unfit(Unfit::TakenByPassthru { by, .. })) if by == ["taker"]
    ));
    host.ip("link delete taker");
    host.ip("link set v0 down");
    assert!(matches!(
        problem(&host, &spec(&["10.7.0.1/24"])),
        P::Lower(Problem::Unfit(Unfit::Down { .. }))
    ));
    host.up("v0");
    host.enter(|| std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap());
    assert!(matches!(
        problem(&host, &spec(&["10.7.0.1/24", "fd00::1/64"])),
        P::Ipv6Disabled { .. }
    ));
    host.bridge("br0", &["v0"]);
    assert!(matches!(
        problem(&host, &spec(&["10.7.0.1/24"])),
        P::Lower(Problem::Unfit(Unfit::Enslaved { .. }))
    ));
});

root_test!(number_in_a_name_is_the_kernels_to_choose, || {
    let host = Netns::new();
    host.wire("v0");
    let mut counted = spec(&["10.7.0.1/24"]);
    counted.name = Some("hl%d".parse().unwrap());
    let first = create(&host, &counted);
    counted.addresses = spec(&["10.8.0.1/24"]).addresses;
    let second = create(&host, &counted);
    assert_eq!((first.name.as_str(), second.name.as_str()), ("hl0", "hl1"));
    for name in ["hl1", "hl0"] {
        assert_eq!(delete(&host, name).unwrap().name, name);
    }
    assert_eq!(host.links(), ["v0-far", "v0"]);
});

root_test!(eight_made_at_once_have_a_name_and_a_tag_each, || {
    let host = Netns::new();
    host.wire("v0");
    let start = std::sync::Barrier::new(8);
    let make = |n: usize| {
        let spec = spec(&[&format!("10.7.{n}.1/24")]);
        host.enter(|| {
            start.wait();
            HostLink::create(&spec).unwrap()
        })
    };
    std::thread::scope(|scope| {
        let make = &make;
        let threads: Vec<_> = (0..8).map(|n| scope.spawn(move || make(n))).collect();
        for thread in threads {
            let made = thread.join().unwrap();
            assert_eq!(delete(&host, &made.name).unwrap().index, made.index);
        }
    });
    assert_eq!(host.links(), ["v0-far", "v0"]);
});

root_test!(delete_touches_nothing_that_is_not_a_host_link, || {
    let host = Netns::new();
    host.wire("v0");
    use HostLinkProblem as P;
    assert!(matches!(delete(&host, "v0"), Err(P::NoHostLink { .. })));
    host.macvlan("mine", &host, "v0");
    assert!(matches!(delete(&host, "mine"), Err(P::NotOurs { .. })));
    assert!(matches!(delete(&host, "v0"), Err(P::NoHostLink { .. })));
    create(&host, &spec(&["10.7.0.1/24"]));
    create(&host, &spec(&["10.8.0.1/24"]));
    assert!(matches!(delete(&host, "v0"), Err(P::Several { names }) if names.len() == 2));
    delete(&host, "macvlan0").unwrap();
    delete(&host, "v0").unwrap();
    assert!(host.links().contains(&"mine".to_owned()));
});

root_test!(guard_deletes_its_link_and_names_its_owner_meanwhile, || {
    let (host, guest, _far) = host_and_guest();
    guest.address("eth0", "10.7.0.2/24");
    let guard = host
        .enter(|| HostLinkGuard::create(&spec(&["10.7.0.1/24"])))
        .unwrap();
    assert_eq!(guard.link().name, "macvlan0");
    assert!(host.pings("10.7.0.2", 2));
    assert!(
        host.ip("link show macvlan0")
            .contains(&format!("pid={}", std::process::id()))
    );
    let busy = delete(&host, "macvlan0");
    assert!(matches!(busy, Err(HostLinkProblem::InUse { pid, .. }) if pid == std::process::id()));
    drop(guard);
    assert_eq!(host.links(), ["v0"]);
    let mut moving = spec(&[]);
    moving.move_addresses = true;
    let refused = host.enter(|| HostLinkGuard::create(&moving));
    assert!(matches!(
        refused,
        Err(HostLinkError {
            source: HostLinkProblem::MoveIsLasting,
            ..
        })
    ));
});
