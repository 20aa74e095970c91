//! Which links can carry a macvtap, and what is said of those that cannot.

use net::Unfit;

use super::*;

root_test!(passthru_conflicts_are_reported_both_ways, || {
    let netns = Netns::new();
    netns.wire("v0");
    netns.macvtap("mine", "v0", "bridge");
    let alone = problem(&netns, &with_mode("v0", Mode::Passthru));
    assert!(matches!(alone, Problem::NotAlone { others, .. } if others == ["mine"]));
    netns.ip("link delete mine");

    netns.macvtap("taker", "v0", "passthru");
    for mode in [Mode::Bridge, Mode::Passthru] {
        let seen = problem(&netns, &with_mode("v0", mode));
        assert!(
            matches!(seen, Problem::Unfit(Unfit::TakenByPassthru { by, .. }) if by == ["taker"])
        );
    }
    netns.ip("link delete taker");

    // What is in another namespace looks like a driver that carries none, so both are named.
    for hidden in [Mode::Bridge, Mode::Passthru] {
        let hidden = open(&netns, &with_mode("v0", hidden));
        let unseen = problem(&netns, &with_mode("v0", Mode::Passthru));
        let text = unseen.to_string();
        for cause in ["another network namespace", "its driver (veth)"] {
            assert!(text.contains(cause), "{text}");
        }
        if hidden.info().mode == Some(Mode::Passthru) {
            let unseen = problem(&netns, &spec("v0"));
            assert!(matches!(unseen, Problem::Invalid { kind, .. } if kind == "veth"));
        }
    }

    let mut foreign = with_mode("v0-far", Mode::Passthru);
    foreign.mac = Some(MAC.parse().unwrap());
    assert!(matches!(
        problem(&netns, &foreign),
        Problem::PassthruMac { .. }
    ));
});

root_test!(unfit_lowers_are_refused_each_with_its_reason, || {
    let netns = Netns::new();
    netns.wire("v0");
    let near = problem(&netns, &spec("v1"));
    assert!(
        matches!(near, Problem::NoSuchLink { hint, .. } if hint.contains("did you mean `v0`?"))
    );
    assert!(matches!(
        problem(&netns, &spec("lo")),
        Problem::Unfit(Unfit::Loopback { .. })
    ));
    netns.ip("tuntap add mode tun name tun0");
    netns.up("tun0");
    assert!(matches!(
        problem(&netns, &spec("tun0")),
        Problem::Unfit(Unfit::NotEthernet { .. })
    ));
    netns.down("v0");
    assert!(
        matches!(problem(&netns, &spec("v0")), Problem::Unfit(Unfit::Down { name }) if name == "v0")
    );
    netns.up("v0");
    let mut large = spec("v0");
    large.mtu = Some(1501);
    assert!(matches!(
        problem(&netns, &large),
        Problem::Mtu { limit: 1500, .. }
    ));
    let own = with_mac("v0", &netns.mac("v0"));
    assert!(matches!(problem(&netns, &own), Problem::MacIsLowers { .. }));
});

root_test!(lower_in_a_bridge_is_refused_and_the_bridge_carries, || {
    let netns = Netns::new();
    netns.wire("v0");
    netns.bridge("br0", &["v0"]);
    let refusal = problem(&netns, &spec("v0"));
    assert!(
        matches!(refusal, Problem::Unfit(Unfit::Enslaved { kind, master, .. }) if kind == "bridge" && master == "br0")
    );
    assert_eq!(open(&netns, &spec("br0")).info().lower.as_str(), "br0");
});

root_test!(lower_in_a_bond_or_team_is_refused_with_its_name, || {
    for expected in ["bond", "team"] {
        let netns = Netns::new();
        netns.wire("v0");
        if netns.add_if_supported(&format!("m0 type {expected}")) {
            netns.down("v0");
            netns.ip("link set v0 master m0");
            let refusal = problem(&netns, &spec("v0"));
            assert!(
                matches!(refusal, Problem::Unfit(Unfit::Enslaved { kind, master, .. }) if kind == expected && master == "m0")
            );
        }
    }
});

root_test!(lower_with_an_ipvlan_is_refused_with_its_name, || {
    let netns = Netns::new();
    netns.wire("v0");
    if netns.add_if_supported("ipv0 link v0 type ipvlan") {
        assert!(
            matches!(problem(&netns, &spec("v0")), Problem::Unfit(Unfit::HasExclusive { by, .. }) if by == "ipv0")
        );
        netns.up("ipv0");
        let on_it = problem(&netns, &spec("ipv0"));
        assert!(
            matches!(on_it, Problem::Unfit(Unfit::CarriesNone { kind, .. }) if kind == "ipvlan")
        );
    }
});

root_test!(lower_that_is_a_vrf_is_refused_and_its_port_carries, || {
    let netns = Netns::new();
    netns.wire("v0");
    if netns.add_if_supported("red type vrf table 10") {
        netns.up("red");
        let refusal = problem(&netns, &spec("red"));
        assert!(
            matches!(refusal, Problem::Unfit(Unfit::CarriesNone { kind, .. }) if kind == "vrf")
        );
        netns.ip("link set v0 master red");
        open(&netns, &spec("v0"));
    }
});

root_test!(lower_that_is_a_vlan_or_dummy_carries, || {
    let netns = Netns::new();
    netns.wire("v0");
    for args in ["lower link v0 type vlan id 5", "lower type dummy"] {
        if netns.add_if_supported(args) {
            netns.up("lower");
            assert_eq!(open(&netns, &spec("lower")).info().lower.as_str(), "lower");
            netns.ip("link delete lower");
        }
    }
});

root_test!(lower_that_is_a_macvlan_stands_for_the_nic_under_it, || {
    let netns = Netns::new();
    netns.wire("v0");
    netns.macvlan("mv0", &netns, "v0");
    assert_eq!(open(&netns, &spec("mv0")).info().lower.as_str(), "v0");
});

root_test!(taken_mac_names_the_holder_that_can_be_seen, || {
    let netns = Netns::new();
    netns.wire("v0");
    netns.macvlan("mv0", &netns, "v0");
    let taken = problem(&netns, &with_mac("v0", &netns.mac("mv0")));
    assert!(matches!(taken, Problem::MacTaken { by, .. } if by == ["mv0"]));
});
