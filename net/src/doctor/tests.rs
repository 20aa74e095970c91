use super::*;
use crate::harness::{self as netns, Netns, root_test};
use crate::privileges::tests::{CONFINED, CONFINED_ROOT, FOREIGN, ROOT, USER};
use crate::{LinkId, Mode, TapInfo};

/// A namespace where all is well: `eno1` up, with the bridge-mode macvtap `mvt0` on it.
fn healthy() -> Facts {
    let nic = Link {
        index: 2,
        name: "eno1".to_owned(),
        mac: Some([2, 0, 0, 0, 0, 2]),
        mtu: 1500,
        tx_queue_len: 500,
        up: true,
        carrier: true,
        ethernet: true,
        ..Link::default()
    };
    let macvtap = Link {
        index: 7,
        name: "mvt0".to_owned(),
        kind: "macvtap".to_owned(),
        mac: Some([2, 0, 0, 0, 0, 7]),
        lower: Some(2),
        mode: Some(Mode::Bridge),
        ..nic.clone()
    };
    let hardware = Hardware {
        wireless: false,
        driver: Some("e1000e".to_owned()),
        filters_vlans: false,
    };
    Facts {
        driver: Driver::Present,
        vhost_net: VhostNet::Usable,
        privileges: Some(ROOT),
        mounts_sysfs: true,
        links: Some(vec![nic, macvtap]),
        hardware: BTreeMap::from([(2, hardware)]),
        stale: BTreeMap::new(),
        nodes: vec![Node {
            index: 7,
            found: Some(99),
            expected: Some(99),
        }],
        namespace: 1,
        neighbours: Vec::new(),
    }
}

/// The checks of a host that differs from the healthy one by `change`, without those that are ok.
fn complaints(
    link: &str,
    change: impl FnOnce(&mut Facts, &mut Vec<Link>),
) -> Vec<(Status, String)> {
    let mut facts = healthy();
    let mut links = facts.links.take().unwrap();
    change(&mut facts, &mut links);
    facts.links = Some(links);
    let checks = verdicts::all(&facts, Some(link).filter(|link| !link.is_empty()));
    for check in &checks {
        assert_eq!(
            check.remedy.is_none(),
            check.status == Status::Ok,
            "{check:?}"
        );
        assert!(
            !check.message.contains('\n') && !check.message.ends_with('.'),
            "{check:?}"
        );
    }
    let bad = checks
        .into_iter()
        .filter(|check| check.status != Status::Ok);
    bad.map(|check| {
        (
            check.status,
            format!(
                "{}: {} -> {}",
                check.name,
                check.message,
                check.remedy.unwrap_or_default()
            ),
        )
    })
    .collect()
}

/// One change makes one complaint.
fn complaint(link: &str, change: impl FnOnce(&mut Facts, &mut Vec<Link>)) -> (Status, String) {
    let mut all = complaints(link, change);
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

fn assert_complaint(
    expected: (Status, &str),
    link: &str,
    change: impl FnOnce(&mut Facts, &mut Vec<Link>),
) {
    let (status, text) = complaint(link, change);
    assert_eq!(status, expected.0, "{text}");
    assert!(text.contains(expected.1), "{text} lacks {}", expected.1);
}

fn upper(index: u32, name: &str) -> Link {
    Link {
        index,
        name: name.to_owned(),
        mac: Some([2, 0, 0, 0, 1, index as u8]),
        ..healthy().links.unwrap().remove(1)
    }
}

#[test]
fn doctor_of_a_healthy_host_complains_of_nothing() {
    assert_eq!(complaints("", |_, _| {}), []);
    assert_eq!(complaints("eno1", |_, _| {}), []);
}

#[test]
fn doctor_of_the_kernel_says_what_is_missing() {
    use Status::{Fail, Warn};
    assert_complaint((Fail, "modprobe macvtap"), "", |facts, _| {
        facts.driver = Driver::Absent
    });
    assert_complaint((Warn, "as root"), "", |facts, _| {
        facts.driver = Driver::Unknown
    });
    assert_eq!(
        complaints("", |facts, _| facts.driver = Driver::Loadable),
        []
    );
    assert_complaint((Warn, "modprobe vhost_net"), "", |facts, _| {
        facts.vhost_net = VhostNet::Absent
    });
    assert_complaint((Warn, "may not be opened"), "", |facts, _| {
        facts.vhost_net = VhostNet::NotPermitted
    });
}

#[test]
fn doctor_of_the_process_says_what_it_lacks() {
    use Status::{Fail, Warn};
    for (privileges, mounts_sysfs, expected) in [
        (
            USER,
            false,
            (Warn, "CAP_NET_ADMIN and CAP_SYS_ADMIN -> run"),
        ),
        (FOREIGN, true, (Fail, "belongs to another user namespace")),
        (
            CONFINED,
            true,
            (Fail, "CAP_MKNOD in the initial one -> run"),
        ),
        (CONFINED_ROOT, false, (Fail, "CAP_MKNOD in the initial one")),
    ] {
        assert_complaint(expected, "", |facts, _| {
            facts.privileges = Some(privileges);
            facts.mounts_sysfs = mounts_sysfs;
        });
    }
    let mapped = |facts: &mut Facts, _: &mut Vec<Link>| facts.privileges = Some(CONFINED_ROOT);
    assert_eq!(complaints("", mapped), []);
    assert_complaint((Warn, "mount /proc"), "", |facts, _| {
        facts.privileges = None
    });
}

#[test]
fn doctor_of_a_lower_says_what_makes_it_unfit() {
    use Status::{Fail, Warn};
    assert_complaint((Warn, "no network interface here"), "", |_, links| {
        links[0].carrier = false
    });
    assert_complaint((Fail, "no network interface `eno1`"), "eno1", |_, links| {
        links[0].name = "eth7".to_owned()
    });
    assert_complaint((Fail, "loopback"), "eno1", |_, links| {
        links[0].loopback = true
    });
    assert_complaint((Fail, "not an Ethernet interface"), "eno1", |_, links| {
        links[0].ethernet = false
    });
    assert_complaint((Fail, "choose a wired interface"), "eno1", |facts, _| {
        facts.hardware.get_mut(&2).unwrap().wireless = true;
    });
    let over = "goes over the Wi-Fi interface `eno1`";
    assert_complaint((Fail, over), "eno1.5", |facts, links| {
        facts.hardware.get_mut(&2).unwrap().wireless = true;
        links.push(Link {
            index: 9,
            name: "eno1.5".to_owned(),
            kind: "vlan".to_owned(),
            lower: Some(2),
            ..links[0].clone()
        });
    });
    assert_complaint((Fail, "ip link set eno1 up"), "eno1", |_, links| {
        links[0].up = false
    });
    assert_complaint((Warn, "no carrier"), "eno1", |_, links| {
        links[0].carrier = false
    });
    assert_complaint((Warn, "rx-vlan-filter off`"), "eno1", |facts, _| {
        facts.hardware.get_mut(&2).unwrap().filters_vlans = true;
    });
    assert_complaint((Warn, "too small for IPv6"), "eno1", |_, links| {
        links[0].mtu = 1000
    });
    assert_complaint((Fail, "nomaster"), "eno1", |_, links| {
        links[0].master = Some(9);
        links.push(of_kind("bridge"));
    });
    for kind in ["vrf", "lag9"] {
        assert_eq!(
            complaints("eno1", |_, links| {
                links[0].master = Some(9);
                links.push(of_kind(kind));
            }),
            []
        );
    }
    assert_complaint((Fail, "ip link delete ipv0"), "eno1", |_, links| {
        links.push(Link {
            kind: "ipvlan".to_owned(),
            ..upper(8, "ipv0")
        });
    });
    assert_complaint((Fail, "choose one of the interfaces"), "red", |_, links| {
        links.push(Link {
            name: "red".to_owned(),
            kind: "vrf".to_owned(),
            lower: None,
            ..upper(9, "red")
        });
    });
}

fn of_kind(kind: &str) -> Link {
    Link {
        index: 9,
        name: "m0".to_owned(),
        kind: kind.to_owned(),
        ..Link::default()
    }
}

/// What a start would look at is not the macvlan but the NIC under it.
#[test]
fn doctor_of_a_macvlan_judges_the_link_under_it() {
    let with_macvlan = |links: &mut Vec<Link>, up: bool| {
        links.push(Link {
            kind: "macvlan".to_owned(),
            up,
            ..upper(8, "mv0")
        });
    };
    for up in [true, false] {
        assert_eq!(complaints("mv0", |_, links| with_macvlan(links, up)), []);
    }
    assert_complaint((Status::Fail, "`eno1` is down"), "mv0", |_, links| {
        with_macvlan(links, true);
        links[0].up = false;
    });
}

#[test]
fn doctor_of_a_macvtap_judges_it_as_a_start_does_that_uses_it() {
    use Status::Fail;
    assert_eq!(complaints("mvt0", |_, _| {}), []);
    // It is the taker itself.
    let passthru = |_: &mut Facts, links: &mut Vec<Link>| links[1].mode = Some(Mode::Passthru);
    assert_eq!(complaints("mvt0", passthru), []);
    assert_complaint((Fail, "ip link set mvt0 up"), "mvt0", |_, links| {
        links[1].up = false
    });
    assert_complaint((Fail, "ip link set eno1 up"), "mvt0", |_, links| {
        links[0].up = false
    });
    assert_complaint((Fail, "txqueuelen 500"), "mvt0", |_, links| {
        links[1].tx_queue_len = 0
    });
}

#[test]
fn doctor_shows_every_problem_of_a_lower_at_once() {
    let all = complaints("eno1", |facts, links| {
        facts.hardware.get_mut(&2).unwrap().wireless = true;
        links[0].up = false;
        links[0].master = Some(9);
        links.push(of_kind("bridge"));
        links[1].mode = Some(Mode::Passthru);
    });
    let subjects: Vec<&str> = all
        .iter()
        .filter_map(|(_, text)| text.split(':').next())
        .collect();
    assert_eq!(subjects, ["wifi", "membership", "state", "macvtaps"]);
    assert!(all.iter().all(|(status, _)| *status == Status::Fail));
}

// Mounting one takes the kernel a millisecond, and there may be thousands of links.
root_test!(
    doctor_mounts_sysfs_once_whatever_the_number_of_links,
    || {
        let netns = Netns::new();
        for n in 0..4 {
            netns.wire(&format!("v{n}"));
        }
        let mounts = netns.enter(|| {
            let facts = Facts::collect(None, &[]);
            assert_eq!(facts.links.unwrap().len(), 9);
            crate::sysfs::tests::mounts_of_this_thread()
        });
        assert_eq!(mounts, 1);
    }
);

#[test]
fn doctor_of_macvtaps_says_which_disturb_each_other() {
    use Status::Warn;
    assert_complaint((Status::Fail, "passthru"), "eno1", |_, links| {
        links[1].mode = Some(Mode::Passthru)
    });
    assert_complaint(
        (Warn, "the same MAC address 02:00:00:00:00:07"),
        "",
        |_, links| {
            links.push(Link {
                mac: links[1].mac,
                ..upper(8, "mvt1")
            });
        },
    );
    assert_complaint((Warn, "`mvt0` and `eno1` share a wire"), "", |_, links| {
        links[1].mac = links[0].mac
    });
    // On another wire, or by design, it is none.
    assert_eq!(
        complaints("", |_, links| links.push(Link {
            mac: links[1].mac,
            lower: Some(3),
            ..upper(8, "mvt1")
        })),
        []
    );
    assert_complaint((Warn, "hairpin"), "eno1", |_, links| {
        links.push(Link {
            mode: Some(Mode::Vepa),
            ..upper(8, "mvt1")
        });
    });
    assert_eq!(
        complaints("eno1", |_, links| links[1].mode = Some(Mode::Vepa)),
        [],
        "it has no sibling"
    );
    assert_complaint((Warn, "`ip link delete mvt0`"), "eno1", |facts, _| {
        facts.stale.insert(7, Owner::this_process().unwrap());
    });
}

/// A guest's private macvtap on `eno1` of the namespace 1.
fn private(mode: Mode) -> Neighbour {
    let mac = "02:00:00:00:02:01".parse().unwrap();
    Neighbour {
        tap: TapInfo {
            name: "macvtap0".to_owned(),
            lower: "eno1".to_owned(),
            mac,
            mtu: 1500,
            device: 0,
            id: id(7, 7),
            lower_id: id(1, 2),
            mode: Some(mode),
        },
        guest_mac: mac,
        filters_multicast: false,
        pid: 4711,
    }
}

fn id(namespace: u64, index: u32) -> Option<LinkId> {
    Some(LinkId { namespace, index })
}

#[test]
fn doctor_knows_macvtaps_of_other_namespaces() {
    use Status::Warn;
    let with = |facts: &mut Facts, neighbour: Neighbour| facts.neighbours = vec![neighbour];
    assert_eq!(
        complaints("eno1", |facts, _| with(facts, private(Mode::Bridge))),
        []
    );
    let taker = "`eno1` belongs to `macvtap0 of pid 4711` alone";
    for text in [taker, "end that"] {
        assert_complaint((Status::Fail, text), "eno1", |facts, _| {
            with(facts, private(Mode::Passthru))
        });
    }
    let taker = "`macvtap0 of pid 4711` has `eno1` for itself alone";
    for text in [taker, "end the process 4711"] {
        let all = complaints("", |facts, _| with(facts, private(Mode::Passthru)));
        assert!(all.iter().any(|(_, found)| found.contains(text)), "{all:?}");
    }
    for text in [
        "hairpin",
        "`macvtap0 of pid 4711` is in VEPA",
        "made again in bridge mode",
    ] {
        assert_complaint((Warn, text), "eno1", |facts, _| {
            with(facts, private(Mode::Vepa))
        });
    }
    // One that is here depends on a switch because of one that is not.
    assert_complaint((Warn, "`ip link set mvt0 type"), "eno1", |facts, links| {
        links[1].mode = Some(Mode::Vepa);
        with(facts, private(Mode::Bridge));
    });
    assert_complaint(
        (Warn, "`ip link set mvt0 address MAC`"),
        "eno1",
        |facts, links| {
            with(facts, private(Mode::Bridge));
            links[1].mac = Some(facts.neighbours[0].tap.mac.octets());
        },
    );
}

#[test]
fn neighbours_of_other_lowers_and_those_in_sight_are_left_out() {
    let found = |neighbour: Neighbour| {
        let facts = Facts {
            neighbours: vec![neighbour],
            ..healthy()
        };
        neighbour::out_of_sight(&facts, facts.links.as_ref().unwrap()).len()
    };
    let mut neighbour = private(Mode::Bridge);
    assert_eq!(found(neighbour.clone()), 1);
    neighbour.tap.lower_id = id(2, 2);
    assert_eq!(found(neighbour), 0);
    let mut seen = private(Mode::Bridge);
    seen.tap.id = id(1, 7);
    assert_eq!(found(seen.clone()), 0);
    (seen.tap.id, seen.tap.name) = (None, "mvt0".to_owned());
    assert_eq!(found(seen), 0);
}

#[test]
fn doctor_of_running_guests_says_what_somebody_has_changed_on_their_macvtaps() {
    use Status::Warn;
    let with = |link: &str, neighbour: Neighbour| {
        complaints(link, |facts, _| facts.neighbours = vec![neighbour])
    };
    assert_eq!(with("", private(Mode::Bridge)), []);
    let mut other_mac = private(Mode::Bridge);
    other_mac.tap.mac = "02:00:00:00:02:99".parse().unwrap();
    let mut multicast = private(Mode::Bridge);
    // It has been renamed since.
    multicast.tap.id = id(1, 7);
    multicast.filters_multicast = true;
    for link in ["", "eno1"] {
        let text = "`macvtap0` of pid 4711 has the MAC address 02:00:00:00:02:99, but its guest has \
                    02:00:00:00:02:01 and gets no frame -> `ip link set macvtap0 address \
                    02:00:00:00:02:01` in the network namespace";
        assert_complaint((Warn, text), link, |facts, _| {
            facts.neighbours = vec![other_mac.clone()];
        });
        let text = "`mvt0` of pid 4711 filters multicast, so IPv6 neighbours may not find its guest \
                    -> `ip link set mvt0 allmulticast on`";
        assert_complaint((Warn, text), link, |facts, _| {
            facts.neighbours = vec![multicast.clone()];
        });
    }
    // On another link, and in another namespace.
    other_mac.tap.lower_id = id(1, 3);
    assert_eq!(with("eno1", other_mac.clone()), []);
    other_mac.tap.lower_id = id(2, 3);
    assert_eq!(with("", other_mac), []);
}

#[test]
fn doctor_of_nodes_says_which_mislead() {
    use Status::Warn;
    assert_complaint((Warn, "/dev/tap7 is not `mvt0`"), "", |facts, _| {
        facts.nodes[0].found = Some(98)
    });
    assert_complaint((Warn, "`mvt0` has no node"), "", |facts, _| {
        facts.nodes[0].found = None
    });
    let stray = |index| Node {
        index,
        found: Some(98),
        expected: None,
    };
    assert_complaint(
        (Warn, "/dev/tap2 has the index of `eno1`"),
        "",
        |facts, _| facts.nodes.push(stray(2)),
    );
    assert_complaint(
        (Warn, "/dev/tap50 is a macvtap of another"),
        "",
        |facts, _| facts.nodes.push(stray(50)),
    );
    assert_eq!(
        complaints("", |facts, _| facts.nodes.push(stray(0x4000_0000))),
        []
    );
}

#[test]
fn doctor_without_links_fails() {
    let facts = Facts {
        links: None,
        ..healthy()
    };
    let checks = verdicts::all(&facts, None);
    assert_eq!(checks.last().unwrap().status, Status::Fail);
}

#[test]
fn driver_is_guessed_from_the_files_of_the_kernel() {
    let root = tempfile::tempdir().unwrap();
    let release = rustix::system::uname();
    let modules = root
        .path()
        .join("lib/modules")
        .join(release.release().to_str().unwrap());
    std::fs::create_dir_all(&modules).unwrap();
    let guess = || Driver::guess(root.path());
    assert_eq!(guess(), Driver::Unknown);
    let list = "kernel/drivers/net/macvtap.ko.xz: kernel/drivers/net/tap.ko.xz\n";
    std::fs::write(modules.join("modules.dep"), list).unwrap();
    assert_eq!(guess(), Driver::Loadable);
    std::fs::write(
        modules.join("modules.builtin"),
        "kernel/drivers/net/macvtap.ko\n",
    )
    .unwrap();
    assert_eq!(guess(), Driver::Present);
    std::fs::remove_file(modules.join("modules.builtin")).unwrap();
    std::fs::create_dir_all(root.path().join("sys/module/macvtap")).unwrap();
    assert_eq!(guess(), Driver::Present);
}
