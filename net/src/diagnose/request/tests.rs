use super::*;
use crate::diagnose::tests::{nic, on, text};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

fn request<'a>(links: &'a [Link], mode: Mode) -> LinkRequest<'a> {
    LinkRequest {
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
fn request_mtu_must_be_within_the_lowers() {
    let links = [nic(1, "eno1")];
    let check = |mtu| {
        LinkRequest {
            mtu: Some(mtu),
            ..request(&links, Mode::Bridge)
        }
        .check()
    };
    check(68).unwrap();
    check(1500).unwrap();
    for mtu in [67, 1501] {
        let text = text(&check(mtu).unwrap_err());
        assert_eq!(
            text,
            format!(
                "an MTU of {mtu} does not fit `eno1`: choose 68 to 1500, the interface's own MTU"
            )
        );
    }
}

#[test]
fn request_mac_of_the_lower_is_for_passthru_alone() {
    let links = [
        Link {
            mac: Some(MAC),
            ..nic(1, "eno1")
        },
        nic(2, "eno2"),
    ];
    let own = |mode| LinkRequest {
        mac: Some(mac()),
        ..request(&links, mode)
    };
    own(Mode::Passthru).check().unwrap();
    assert!(matches!(
        own(Mode::Bridge).check(),
        Err(Problem::MacIsLowers { .. })
    ));
    let foreign = |mode| LinkRequest {
        lower: &links[1],
        ..own(mode)
    };
    foreign(Mode::Bridge).check().unwrap();
    let text = text(&foreign(Mode::Passthru).check().unwrap_err());
    assert!(
        text.contains("`ip link set eno2 address 52:54:00:00:00:01`"),
        "{text}"
    );
}

#[test]
fn request_for_passthru_on_a_shared_lower_names_who_is_there() {
    let links = [nic(1, "eno1"), on(1, "macvtap", nic(2, "mvt0"))];
    request(&links, Mode::Bridge).check().unwrap();
    let text = request(&links, Mode::Passthru)
        .check()
        .unwrap_err()
        .to_string();
    assert!(text.contains("it already carries `mvt0`"), "{text}");
}

/// The judge has seen no cause: so each that remains is named.
#[test]
fn create_refused_names_every_cause_that_is_left() {
    let on_port = |kind: &str| {
        let port = Link {
            master: Some(2),
            ..nic(1, "eno1")
        };
        let master = Link {
            kind: kind.to_owned(),
            ..nic(2, "m0")
        };
        vec![port, master]
    };
    let veth = vec![Link {
        kind: "veth".to_owned(),
        ..nic(1, "eno1")
    }];
    let all =
        "(a bridge, bond, team, Open vSwitch, ipvlan, macsec or HSR device, perhaps in another";
    for (links, mode, number, expected) in [
        (vec![nic(1, "eno1")], Mode::Bridge, libc::EBUSY, &[all][..]),
        (on_port("vrf"), Mode::Bridge, libc::EBUSY, &[all]),
        (
            on_port("lag9"),
            Mode::Bridge,
            libc::EBUSY,
            &["the lag9 `m0`, which it is a port of, or else a bridge"],
        ),
        (
            veth.clone(),
            Mode::Bridge,
            libc::EINVAL,
            &["passthru mode in another", "driver (veth) allows no link"],
        ),
        (
            veth.clone(),
            Mode::Source,
            libc::EINVAL,
            &[
                "passthru mode in another",
                "no link",
                "knows no source mode",
            ],
        ),
        (
            veth,
            Mode::Passthru,
            libc::EINVAL,
            &["links in another", "on it already", "driver (veth)"],
        ),
    ] {
        let problem = request(&links, mode).explain_create(errno(number));
        let text = problem.to_string();
        for words in expected {
            assert!(text.contains(words), "{text} lacks {words}");
        }
        let remedy = problem.remedy().unwrap();
        assert!(remedy.ends_with("choose another interface"), "{remedy}");
    }
}

#[test]
fn create_refused_for_want_of_something_says_what() {
    let links = [nic(1, "eno1")];
    let explain = |number| request(&links, Mode::Bridge).explain_create(errno(number));
    assert!(text(&explain(libc::EOPNOTSUPP)).contains("`modprobe macvtap`"));
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
        ..on(1, "macvlan", nic(2, "mv0"))
    };
    let links = [nic(1, "eno1"), sibling];
    let made = Link {
        mac: Some(MAC),
        ..nic(9, "macvtap0")
    };
    for number in [libc::EADDRINUSE, libc::EBUSY] {
        let text = request(&links, Mode::Bridge)
            .explain_up(&made, errno(number))
            .to_string();
        assert!(
            text.starts_with(
                "the MAC address 52:54:00:00:00:01 is already taken on `eno1` by `mv0`"
            ),
            "{text}"
        );
    }
    let text = request(&links[..1], Mode::Bridge)
        .explain_up(&made, errno(libc::EADDRINUSE))
        .to_string();
    assert!(text.contains("another network namespace"), "{text}");
}

#[test]
fn up_with_the_lowers_own_mac_says_so() {
    let links = [nic(1, "eno1")];
    let made = Link {
        mac: links[0].mac,
        ..nic(9, "macvtap0")
    };
    let refusal = request(&links, Mode::Bridge).explain_up(&made, errno(libc::EADDRINUSE));
    assert!(matches!(refusal, Problem::MacIsLowers { .. }));
}

#[test]
fn spec_numbers_at_the_limits_pass_and_beyond_are_refused() {
    let spec = MacvtapSpec::new("eno1".parse().unwrap());
    check_spec(&spec).unwrap();
    let largest = MacvtapSpec {
        queues: 256,
        tx_queue_len: Some(524_288),
        bc_queue_len: Some(1),
        mode: Some(Mode::Source),
        source_macs: vec!["02:00:00:00:00:01".parse().unwrap()],
        name: Some("guest".parse().unwrap()),
        ..spec.clone()
    };
    check_spec(&largest).unwrap();
    let refusals = [
        (
            MacvtapSpec {
                queues: 0,
                ..spec.clone()
            },
            "queues has to be 1 to 256, not 0",
        ),
        (
            MacvtapSpec {
                queues: 257,
                ..spec.clone()
            },
            "1 to 256, not 257",
        ),
        (
            MacvtapSpec {
                tx_queue_len: Some(0),
                ..spec.clone()
            },
            "1 to 524288, not 0",
        ),
        (
            MacvtapSpec {
                tx_queue_len: Some(524_289),
                ..spec.clone()
            },
            "not 524289",
        ),
        (
            MacvtapSpec {
                bc_queue_len: Some(0),
                ..spec.clone()
            },
            "choose 1 or more",
        ),
        (
            MacvtapSpec {
                source_macs: vec!["02:00:00:00:00:01".parse().unwrap()],
                ..spec.clone()
            },
            "give it that mode",
        ),
        (
            MacvtapSpec {
                name: Some("vm%d".parse().unwrap()),
                ..spec
            },
            "`vm%d`",
        ),
    ];
    for (spec, expected) in refusals {
        let text = text(&check_spec(&spec).unwrap_err());
        assert!(text.contains(expected), "{text}");
    }
}
