use super::*;
use crate::diagnose::tests::{nic, on, text};

/// The lower, the links around it, the Wi-Fi interface that carries its frames, and words of each problem in order.
type Case<'a> = (Link, Vec<Link>, Option<Link>, &'a [&'static str]);

/// A port of a master of this kind, called `m0`, and that.
fn port_of(kind: &str) -> (Link, Vec<Link>) {
    let port = Link {
        master: Some(2),
        ..nic(1, "eno1")
    };
    (port, vec![of_kind(kind, nic(2, "m0"))])
}

fn of_kind(kind: &str, link: Link) -> Link {
    Link {
        kind: kind.to_owned(),
        ..link
    }
}

fn in_mode(mode: Mode, link: Link) -> Link {
    Link {
        mode: Some(mode),
        ..link
    }
}

fn down(link: Link) -> Link {
    Link { up: false, ..link }
}

fn judge((link, others, wireless, expected): Case<'_>) {
    let links = [vec![link.clone()], others].concat();
    let found = problems(&links, &link, wireless.as_ref());
    let texts: Vec<String> = found.into_iter().map(|unfit| text(&unfit.into())).collect();
    assert_eq!(texts.len(), expected.len(), "{link:?}: {texts:#?}");
    for (text, words) in texts.iter().zip(expected) {
        assert!(text.contains(words), "{text} lacks {words}");
        assert!(text.contains(": "), "{text} has no remedy");
    }
    let first = check_lower(&links, &link, wireless.as_ref());
    let first = first.err().as_ref().map(text);
    assert_eq!(first.as_ref(), texts.first());
}

#[test]
fn judge_of_a_lower_alone() {
    let eno1 = || nic(1, "eno1");
    let lo = Link {
        loopback: true,
        ethernet: false,
        ..down(nic(1, "lo"))
    };
    let tun = Link {
        ethernet: false,
        ..down(of_kind("tun", nic(1, "tun0")))
    };
    let unplugged = Link {
        carrier: false,
        ..eno1()
    };
    let wlan0 = || nic(1, "wlan0");
    let vlan = on(1, "vlan", nic(2, "wlan0.5"));
    let cases: [Case<'_>; 13] = [
        (eno1(), vec![], None, &[]),
        (unplugged, vec![], None, &[]),
        (of_kind("bridge", eno1()), vec![], None, &[]),
        (of_kind("bond", eno1()), vec![], None, &[]),
        (lo, vec![], None, &["`lo` is the loopback"]),
        (tun, vec![], None, &["`tun0` is not an Ethernet"]),
        (down(eno1()), vec![], None, &["`ip link set eno1 up`"]),
        (wlan0(), vec![], Some(wlan0()), &["`wlan0` is a Wi-Fi"]),
        (
            vlan,
            vec![wlan0()],
            Some(wlan0()),
            &["`wlan0.5` goes over the Wi-Fi interface `wlan0`"],
        ),
        (
            of_kind("vrf", eno1()),
            vec![],
            None,
            &["of the kind vrf, on which the kernel allows no other link"],
        ),
        (
            on(9, "ipvlan", eno1()),
            vec![],
            None,
            &["kind ipvlan, on which"],
        ),
        (
            on(9, "ipvtap", eno1()),
            vec![],
            None,
            &["kind ipvtap, on which"],
        ),
        (
            down(of_kind("vrf", eno1())),
            vec![],
            Some(eno1()),
            &["kind vrf", "Wi-Fi", "is down"],
        ),
    ];
    cases.into_iter().for_each(judge);
}

#[test]
fn judge_of_a_lower_that_is_a_port() {
    for (kind, expected) in [
        (
            "bridge",
            &["use `m0` instead, or free it with `ip link set eno1 nomaster`"][..],
        ),
        ("bond", &["is a port of the bond `m0`"]),
        ("team", &["is a port of the team `m0`"]),
        ("hv_netvsc", &["is a port of the hv_netvsc `m0`"]),
        ("", &["is a port of the device `m0`"]),
        ("openvswitch", &["`ovs-vsctl del-port eno1`"]),
        ("vrf", &[]),
        ("batadv", &[]),
        // Of which only the kernel knows.
        ("lag9", &[]),
    ] {
        let (port, master) = port_of(kind);
        judge((port.clone(), master.clone(), None, expected));
        let also_down = [expected, &["is down"]].concat();
        judge((down(port), master, None, &also_down));
    }
}

#[test]
fn judge_of_a_lower_with_others_on_it() {
    let eno1 = || nic(1, "eno1");
    let upper = |kind| on(1, kind, nic(2, "up0"));
    for kind in ["macvlan", "macvtap", "vlan", "veth", "vxlan"] {
        judge((eno1(), vec![upper(kind)], None, &[]));
    }
    for kind in ["ipvlan", "ipvtap", "macsec", "virt_wifi", "rmnet"] {
        let expected: &[_] =
            &["`up0`, which takes all of its frames: delete that with `ip link delete up0`"];
        judge((eno1(), vec![upper(kind)], None, expected));
        // On another link it is none of ours.
        judge((eno1(), vec![on(9, kind, nic(2, "up0"))], None, &[]));
    }
    let taker = || in_mode(Mode::Passthru, upper("macvtap"));
    let bridge = || in_mode(Mode::Bridge, upper("macvtap"));
    let taken: &[_] = &["`eno1` belongs to `up0` alone"];
    let cases: [Case<'_>; 3] = [
        (eno1(), vec![bridge()], None, &[]),
        (eno1(), vec![taker()], None, taken),
        (
            down(eno1()),
            vec![taker(), on(1, "ipvlan", nic(3, "ipv0"))],
            None,
            &["ipvlan `ipv0`", "belongs to `up0`", "is down"],
        ),
    ];
    cases.into_iter().for_each(judge);
}

/// The driver goes through a macvlan, so it is what is under it that counts.
#[test]
fn judge_of_a_macvlan_as_lower_looks_under_it() {
    let mv0 = || on(1, "macvlan", nic(2, "mv0"));
    let eno1 = || nic(1, "eno1");
    let in_a_bridge = Link {
        master: Some(9),
        ..mv0()
    };
    let br0 = of_kind("bridge", nic(9, "br0"));
    let cases: [Case<'_>; 5] = [
        (mv0(), vec![eno1()], None, &[]),
        (down(mv0()), vec![eno1()], None, &[]),
        (in_a_bridge, vec![eno1(), br0], None, &[]),
        (mv0(), vec![down(eno1())], None, &["`eno1` is down"]),
        (
            in_mode(Mode::Passthru, mv0()),
            vec![eno1()],
            None,
            &["`eno1` belongs to `mv0` alone"],
        ),
    ];
    cases.into_iter().for_each(judge);
    let links = [eno1(), mv0()];
    assert_eq!(real_device(&links, &links[1]).name, "eno1");
    // A veth's IFLA_LINK is its other end, which is no lower.
    let links = [nic(1, "v0"), on(1, "veth", nic(2, "v1"))];
    assert_eq!(real_device(&links, &links[1]).name, "v1");
}
