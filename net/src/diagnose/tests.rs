use super::*;
use crate::spec::MacvtapSpec;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

/// An Ethernet NIC in working order.
pub(super) fn nic(index: u32, name: &str) -> Link {
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

pub(super) fn on(lower: u32, kind: &str, link: Link) -> Link {
    Link {
        lower: Some(lower),
        kind: kind.to_owned(),
        ..link
    }
}

/// A problem, and what to do about it.
pub(super) fn text(problem: &Problem) -> String {
    format!("{problem}: {}", problem.remedy().unwrap_or_default())
}

fn mac() -> MacAddr {
    MacAddr::try_from(MAC).unwrap()
}

#[test]
fn find_unknown_name_hints_at_the_near_one_and_lists_all() {
    let lo = Link {
        loopback: true,
        ..nic(1, "lo")
    };
    let links = [lo, nic(2, "eno1"), nic(3, "wan")];
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
    let links: Vec<Link> = (1..=25).map(|n| nic(n, &format!("port{n}"))).collect();
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
fn existing_macvtap_must_be_what_was_asked_for() {
    let macvtap = Link {
        mac: Some(MAC),
        mode: Some(Mode::Vepa),
        ..on(1, "macvtap", nic(2, "mvt"))
    };
    let links = [nic(1, "eno1"), macvtap.clone()];
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

    let refusal = |expected| text(&check_existing(&links, &macvtap, &expected).unwrap_err());
    let text = refusal(MacvtapSpec {
        mode: Some(Mode::Bridge),
        ..nothing.clone()
    });
    assert!(
        text.starts_with("the macvtap `mvt` has the mode vepa, not bridge"),
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
        text.starts_with("the macvtap `mvt` has the MTU 1500, not 9000"),
        "{text}"
    );
    let text = refusal(MacvtapSpec {
        tx_queue_len: Some(500),
        ..nothing.clone()
    });
    assert!(text.contains("the txqueuelen 1000, not 500"), "{text}");
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
    assert!(text.contains("has the name mvt, not other"), "{text}");
}

#[test]
fn existing_macvtap_that_would_lose_frames_is_refused() {
    let nothing = MacvtapSpec::new("mvt".parse().unwrap());
    let macvtap = on(1, "macvtap", nic(2, "mvt"));
    let down = |name: &str, links: &[Link]| {
        let refusal = check_existing(links, &links[1], &nothing).unwrap_err();
        assert!(matches!(refusal, Problem::Unfit(Unfit::Down { name: found }) if found == name));
    };
    down(
        "mvt",
        &[
            nic(1, "eno1"),
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
                ..nic(1, "eno1")
            },
            macvtap.clone(),
        ],
    );
    let deaf = Link {
        tx_queue_len: 0,
        ..macvtap
    };
    let refusal = check_existing(&[], &deaf, &nothing).unwrap_err();
    assert!(matches!(
        refusal,
        Problem::Unfit(Unfit::NoReceiveRing { .. })
    ));
}

#[test]
fn made_macvtap_on_a_kernel_that_ignored_something_is_refused() {
    let asked = MacvtapSpec {
        mode: Some(Mode::Source),
        bc_queue_len: Some(2000),
        source_macs: vec![mac(), mac()],
        ..MacvtapSpec::new("eno1".parse().unwrap())
    };
    let made = Link {
        mode: Some(Mode::Source),
        bc_queue_len: 2000,
        source_macs: vec![MAC],
        ..on(1, "macvtap", nic(2, "mvt"))
    };
    check_made(&made, &asked).unwrap();
    let nothing = MacvtapSpec::new("eno1".parse().unwrap());
    let bridge = Link {
        mode: Some(Mode::Bridge),
        ..made.clone()
    };
    check_made(&bridge, &nothing).unwrap();
    // A kernel before 5.11 does not tell of a length either.
    let old = Link {
        bc_queue_len: 0,
        ..made.clone()
    };
    let text = text(&check_made(&old, &asked).unwrap_err());
    assert!(
        text.contains("bcqueuelen 0, not 2000") && text.contains("5.11"),
        "{text}"
    );
    let deaf = Link {
        source_macs: vec![],
        ..made
    };
    let text = check_made(&deaf, &asked).unwrap_err().to_string();
    assert!(text.contains("not 52:54:00:00:00:01"), "{text}");
    let text = check_made(&bridge, &asked).unwrap_err().to_string();
    assert!(text.contains("mode bridge, not source"), "{text}");
}
