use std::io;

use super::*;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

/// An Ethernet card in working order.
fn card(index: u32, name: &str) -> Link {
    Link {
        index,
        name: name.to_owned(),
        mac: Some([2, 0, 0, 0, 0, index as u8]),
        mtu: 1500,
        tx_queue_len: 1000,
        bc_queue_len: 1000,
        up: true,
        carrier: true,
        ethernet: true,
        ..Link::default()
    }
}

fn on(lower: u32, kind: &str, link: Link) -> Link {
    Link {
        lower: Some(lower),
        kind: kind.to_owned(),
        ..link
    }
}

fn wish<'a>(links: &'a [Link], mode: Mode) -> Wish<'a> {
    Wish {
        links,
        lower: &links[0],
        mode,
        mac: None,
        mtu: None,
    }
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

fn mac() -> MacAddr {
    MacAddr::try_from(MAC).unwrap()
}

#[test]
fn find_unknown_name_hints_at_the_near_one_and_lists_all() {
    let lo = Link {
        loopback: true,
        ..card(1, "lo")
    };
    let links = [lo, card(2, "eno1"), card(3, "wan")];
    assert_eq!(find(&links, "eno1").unwrap().index, 2);
    let text = find(&links, "en01").unwrap_err().to_string();
    assert_eq!(
        text,
        "there is no network interface `en01`; did you mean `eno1`? (there are eno1, wan)"
    );
    let text = find(&links, "something").unwrap_err().to_string();
    assert_eq!(
        text,
        "there is no network interface `something` (there are eno1, wan)"
    );
    let text = find(&links[..1], "eno1").unwrap_err().to_string();
    assert!(
        text.ends_with("nor any other Ethernet interface in this network namespace"),
        "{text}"
    );
}

#[test]
fn find_among_many_lists_the_first_twenty() {
    let links: Vec<Link> = (1..=25).map(|n| card(n, &format!("port{n}"))).collect();
    let text = find(&links, "x").unwrap_err().to_string();
    assert!(
        text.contains("port20, ...)") && !text.contains("port21"),
        "{text}"
    );
}

#[test]
fn distance_counts_changed_added_and_dropped_letters() {
    for (a, b, expected) in [
        ("eth0", "eth0", 0),
        ("eth0", "eth1", 1),
        ("eth0", "eth", 1),
        ("ab", "ba", 2),
        ("", "abc", 3),
    ] {
        assert_eq!(distance(a, b), expected, "{a} {b}");
        assert_eq!(distance(b, a), expected, "{b} {a}");
    }
}

#[test]
fn lower_in_working_order_passes() {
    let links = [card(1, "eno1")];
    check_lower(&links, &links[0], None).unwrap();
    let unplugged = Link {
        carrier: false,
        ..card(1, "eno1")
    };
    check_lower(&links, &unplugged, None).unwrap();
}

#[test]
fn lower_that_cannot_carry_is_refused_with_the_reason() {
    let refusal = |link: Link, wireless: bool| {
        let wireless = Some(&link).filter(|_| wireless);
        check_lower(std::slice::from_ref(&link), &link, wireless).unwrap_err()
    };
    let lo = Link {
        loopback: true,
        ethernet: false,
        ..card(1, "lo")
    };
    assert!(matches!(refusal(lo, false), Problem::Loopback { .. }));
    let tun = Link {
        ethernet: false,
        ..card(1, "tun0")
    };
    assert!(matches!(refusal(tun, false), Problem::NotEthernet { .. }));
    let down = Link {
        up: false,
        ..card(1, "eno1")
    };
    let text = refusal(down, false).to_string();
    assert!(text.ends_with("`ip link set eno1 up`"), "{text}");
    let text = refusal(card(1, "wlan0"), true).to_string();
    assert!(
        text.contains("`wlan0` is a Wi-Fi") && text.contains("access points"),
        "{text}"
    );
    let (vlan, under) = (card(2, "wlan0.5"), card(1, "wlan0"));
    let text = check_lower(&[], &vlan, Some(&under))
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("`wlan0.5` goes over the Wi-Fi interface `wlan0`"),
        "{text}"
    );
}

#[test]
fn lower_with_a_master_names_it_and_the_way_out() {
    for (kind, expected) in [
        (
            "bridge",
            "use `m0` instead, or free it with `ip link set eno1 nomaster`",
        ),
        ("bond", "is a port of the bond `m0`"),
        ("team", "is a port of the team `m0`"),
        ("openvswitch", "`ovs-vsctl del-port eno1`"),
    ] {
        let port = Link {
            master: Some(2),
            ..card(1, "eno1")
        };
        let master = Link {
            kind: kind.to_owned(),
            ..card(2, "m0")
        };
        let links = [port, master];
        let text = check_lower(&links, &links[0], None)
            .unwrap_err()
            .to_string();
        assert!(text.contains(expected), "{kind}: {text}");
    }
}

#[test]
fn lower_in_a_vrf_passes() {
    let links = [
        Link {
            master: Some(2),
            ..card(1, "eno1")
        },
        Link {
            kind: "vrf".to_owned(),
            ..card(2, "red")
        },
    ];
    check_lower(&links, &links[0], None).unwrap();
}

#[test]
fn lower_macvlan_stands_for_the_device_under_it() {
    let real = Link {
        up: false,
        ..card(1, "eno1")
    };
    let links = [real, on(1, "macvlan", card(2, "mv0"))];
    assert_eq!(real_device(&links, &links[1]).name, "eno1");
    let refusal = check_lower(&links, &links[1], None).unwrap_err();
    assert!(matches!(refusal, Problem::Down { name } if name == "eno1"));
    // A veth's IFLA_LINK is its other end, which is no lower.
    let links = [card(1, "v0"), on(1, "veth", card(2, "v1"))];
    assert_eq!(real_device(&links, &links[1]).name, "v1");
}

#[test]
fn wish_mtu_must_be_within_the_lowers() {
    let links = [card(1, "eno1")];
    let check = |mtu| {
        Wish {
            mtu: Some(mtu),
            ..wish(&links, Mode::Bridge)
        }
        .check()
    };
    check(68).unwrap();
    check(1500).unwrap();
    for mtu in [67, 1501] {
        let text = check(mtu).unwrap_err().to_string();
        assert_eq!(
            text,
            format!(
                "an MTU of {mtu} does not fit `eno1`: choose 68 to 1500, the interface's own MTU"
            )
        );
    }
}

#[test]
fn wish_mac_of_the_lower_is_for_passthru_alone() {
    let links = [
        Link {
            mac: Some(MAC),
            ..card(1, "eno1")
        },
        card(2, "eno2"),
    ];
    let own = |mode| Wish {
        mac: Some(mac()),
        ..wish(&links, mode)
    };
    own(Mode::Passthru).check().unwrap();
    assert!(matches!(
        own(Mode::Bridge).check(),
        Err(Problem::MacIsLowers { .. })
    ));
    let foreign = |mode| Wish {
        lower: &links[1],
        ..own(mode)
    };
    foreign(Mode::Bridge).check().unwrap();
    let text = foreign(Mode::Passthru).check().unwrap_err().to_string();
    assert!(
        text.contains("`ip link set eno2 address 52:54:00:00:00:01`"),
        "{text}"
    );
}

#[test]
fn create_busy_names_the_ipvlan_where_one_is_seen() {
    let links = [card(1, "eno1"), on(1, "ipvlan", card(2, "ipv0"))];
    let text = wish(&links, Mode::Bridge)
        .explain_create(errno(libc::EBUSY))
        .to_string();
    assert!(
        text.contains("ipvlan `ipv0`") && text.contains("`ip link delete ipv0`"),
        "{text}"
    );
    let unseen = wish(&links[..1], Mode::Bridge).explain_create(errno(libc::EBUSY));
    assert!(matches!(unseen, Problem::InUse { .. }));
}

#[test]
fn create_invalid_is_a_passthru_conflict_either_way() {
    let taken = Link {
        mode: Some(Mode::Passthru),
        ..on(1, "macvtap", card(2, "p0"))
    };
    let links = [card(1, "eno1"), taken];
    let text = wish(&links, Mode::Bridge)
        .explain_create(errno(libc::EINVAL))
        .to_string();
    assert!(text.starts_with("`eno1` belongs to `p0` alone"), "{text}");
    let text = wish(&links, Mode::Passthru)
        .explain_create(errno(libc::EINVAL))
        .to_string();
    assert!(text.contains("it already carries `p0`"), "{text}");
    let text = wish(&links[..1], Mode::Passthru)
        .explain_create(errno(libc::EINVAL))
        .to_string();
    assert!(text.contains("in another network namespace"), "{text}");
}

#[test]
fn create_refused_for_want_of_something_says_what() {
    let links = [card(1, "eno1")];
    let explain = |number| wish(&links, Mode::Bridge).explain_create(errno(number));
    assert!(
        explain(libc::EOPNOTSUPP)
            .to_string()
            .contains("`modprobe macvtap`")
    );
    assert!(explain(libc::EPERM).to_string().contains("CAP_NET_ADMIN"));
    assert!(matches!(explain(libc::ENODEV), Problem::Gone { .. }));
    let other = explain(libc::ENOMEM);
    assert_eq!(other.to_string(), "the kernel refused to make the macvtap");
    assert!(std::error::Error::source(&other).is_some());
}

#[test]
fn up_with_a_taken_mac_names_the_holder_on_old_and_new_kernels() {
    let sibling = Link {
        mac: Some(MAC),
        ..on(1, "macvlan", card(2, "mv0"))
    };
    let links = [card(1, "eno1"), sibling];
    let made = Link {
        mac: Some(MAC),
        ..card(9, "macvtap0")
    };
    for number in [libc::EADDRINUSE, libc::EBUSY] {
        let text = wish(&links, Mode::Bridge)
            .explain_up(&made, errno(number))
            .to_string();
        assert!(
            text.starts_with(
                "the MAC address 52:54:00:00:00:01 is already taken on `eno1` by `mv0`"
            ),
            "{text}"
        );
    }
    let text = wish(&links[..1], Mode::Bridge)
        .explain_up(&made, errno(libc::EADDRINUSE))
        .to_string();
    assert!(text.contains("another network namespace"), "{text}");
}

#[test]
fn existing_macvtap_must_be_what_was_asked_for() {
    let macvtap = Link {
        mac: Some(MAC),
        mode: Some(Mode::Vepa),
        ..on(1, "macvtap", card(2, "mvt"))
    };
    let links = [card(1, "eno1"), macvtap.clone()];
    let nothing = MacvtapSpec::new("mvt".parse().unwrap());
    check_existing(&links, &macvtap, &nothing).unwrap();
    check_existing(
        &links,
        &macvtap,
        &MacvtapSpec {
            mode: Some(Mode::Vepa),
            mac: Some(mac()),
            mtu: Some(1500),
            tx_queue_len: Some(1000),
            bc_queue_len: Some(1000),
            name: Some("mvt".parse().unwrap()),
            queues: 4,
            ..nothing.clone()
        },
    )
    .unwrap();

    let refusal = |expected| {
        check_existing(&links, &macvtap, &expected)
            .unwrap_err()
            .to_string()
    };
    let text = refusal(MacvtapSpec {
        mode: Some(Mode::Bridge),
        ..nothing.clone()
    });
    assert!(
        text.starts_with("the macvtap `mvt` is in vepa mode, not bridge"),
        "{text}"
    );
    let text = refusal(MacvtapSpec {
        mac: Some(MacAddr::try_from([2; 6]).unwrap()),
        ..nothing.clone()
    });
    assert!(
        text.starts_with(
            "the macvtap `mvt` has the MAC address 52:54:00:00:00:01, not 02:02:02:02:02:02"
        ),
        "{text}"
    );
    let text = refusal(MacvtapSpec {
        mtu: Some(9000),
        ..nothing.clone()
    });
    assert!(
        text.starts_with("the macvtap `mvt` has an MTU of 1500, not 9000"),
        "{text}"
    );
    let text = refusal(MacvtapSpec {
        tx_queue_len: Some(500),
        ..nothing.clone()
    });
    assert!(text.contains("a txqueuelen of 1000, not 500"), "{text}");
    assert!(text.contains("`ip link set mvt txqueuelen 500`"), "{text}");
    let text = refusal(MacvtapSpec {
        bc_queue_len: Some(1),
        ..nothing.clone()
    });
    assert!(
        text.contains("`ip link set mvt type macvtap bcqueuelen 1`"),
        "{text}"
    );
    let text = refusal(MacvtapSpec {
        name: Some("other".parse().unwrap()),
        ..nothing.clone()
    });
    assert!(text.contains("not renamed to `other`"), "{text}");
}

#[test]
fn existing_macvtap_that_would_lose_frames_is_refused() {
    let nothing = MacvtapSpec::new("mvt".parse().unwrap());
    let macvtap = on(1, "macvtap", card(2, "mvt"));
    let down = |name: &str, links: &[Link]| {
        let refusal = check_existing(links, &links[1], &nothing).unwrap_err();
        assert!(matches!(refusal, Problem::Down { name: found } if found == name));
    };
    down(
        "mvt",
        &[
            card(1, "eno1"),
            Link {
                up: false,
                ..macvtap.clone()
            },
        ],
    );
    down(
        "eno1",
        &[
            Link {
                up: false,
                ..card(1, "eno1")
            },
            macvtap.clone(),
        ],
    );
    let deaf = Link {
        tx_queue_len: 0,
        ..macvtap
    };
    let refusal = check_existing(&[], &deaf, &nothing).unwrap_err();
    assert!(matches!(refusal, Problem::NoReceiveRing { .. }));
}
