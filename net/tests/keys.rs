//! What is asked for is what the kernel then shows, and is undone. In network namespaces of the
//! tests' own; they need root.

#![allow(
    clippy::unwrap_used,
    reason = "all of this file is tests, and the lint spares #[test] functions alone"
)]

#[allow(dead_code, reason = "other test binaries use the rest")]
mod child;
#[path = "../../tests/harness/netns.rs"]
mod netns;
#[allow(dead_code, reason = "other test binaries use the rest")]
mod wire;

use std::error::Error as _;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use child::soon;
use net::{Error, MacAddr, Macvtap, MacvtapSpec, Mode, Owner, Placement, Problem, QueueError};
use netns::{Netns, root_test};
use wire::{frame, receives, send};

const MAC: &str = "52:54:00:12:34:56";

fn spec(link: &str) -> MacvtapSpec {
    MacvtapSpec::new(link.parse().unwrap())
}

fn with(link: &str, set: impl FnOnce(&mut MacvtapSpec)) -> MacvtapSpec {
    let mut spec = spec(link);
    set(&mut spec);
    spec
}

fn on_host(link: &str) -> MacvtapSpec {
    with(link, |spec| spec.netns = Placement::Host)
}

fn open(netns: &Netns, spec: &MacvtapSpec) -> Macvtap {
    netns
        .enter(|| Macvtap::open(spec))
        .unwrap_or_else(|error| panic!("{error}: {:?}", error.source()))
}

/// The problem that keeps a macvtap from being opened, after a check that nothing was left.
fn problem(netns: &Netns, spec: &MacvtapSpec) -> Problem {
    let before = netns.links();
    let error = netns.enter(|| Macvtap::open(spec)).expect_err("a problem");
    eprintln!("{error}: {}", error.source().unwrap());
    assert_eq!(netns.links(), before);
    match error {
        Error::Make { source, .. } | Error::Use { source, .. } => source,
        other => panic!("{other}"),
    }
}

/// All that `ip` knows of a link, as words.
fn details(netns: &Netns, link: &str) -> String {
    let text = netns.ip(&format!("-d -o link show dev {link}"));
    text.split(&[' ', '\\', '\n'][..])
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

root_test!(every_key_shows_on_the_link, || {
    let netns = Netns::new();
    netns.wire("v0");
    let senders = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
    for mode in ["bridge", "vepa", "private", "source"] {
        let spec = with("v0", |spec| {
            spec.netns = Placement::Host;
            spec.name = Some("guest".parse().unwrap());
            spec.mode = Some(mode.parse().unwrap());
            spec.mac = Some(MAC.parse().unwrap());
            spec.mtu = Some(1400);
            spec.tx_queue_len = Some(77);
            spec.bc_queue_len = Some(3333);
            if mode == "source" {
                spec.source_macs = senders.map(|mac| mac.parse().unwrap()).to_vec();
            }
        });
        let macvtap = open(&netns, &spec);
        assert_eq!(
            (
                macvtap.info().name.as_str(),
                macvtap.info().lower.as_str(),
                macvtap.info().mtu
            ),
            ("guest", "v0", 1400)
        );
        assert_eq!(macvtap.info().mac.to_string(), MAC);
        let details = details(&netns, "guest");
        for expected in [
            "guest@v0: <BROADCAST,MULTICAST,ALLMULTI,UP,LOWER_UP>",
            "mtu 1400 ",
            "qlen 77 ",
            &format!("link/ether {MAC} "),
            &format!("macvtap mode {mode} "),
            "bcqueuelen 3333 ",
            "alias owner: keys-",
            &format!(" pid={} ", std::process::id()),
        ] {
            assert!(details.contains(expected), "{expected} in {details}");
        }
        let listed = senders.iter().filter(|mac| details.contains(*mac)).count();
        assert_eq!(listed, if mode == "source" { 2 } else { 0 }, "{details}");
        let ipv6 = netns.ip("-6 address show dev guest");
        assert_eq!(ipv6, "", "the host must have no IPv6 on it");
        drop(macvtap);
        assert!(!netns.links().contains(&"guest".to_owned()));
    }
});

root_test!(receive_ring_holds_as_many_frames_as_asked_for, || {
    let (host, peer) = (Netns::new(), Netns::new());
    host.veth("v0", &peer, "v1");
    let theirs = open(&peer, &spec("v1"));
    for placement in [Placement::Private, Placement::Host] {
        let ours = open(
            &host,
            &with("v0", |spec| {
                spec.netns = placement;
                spec.tx_queue_len = Some(5);
            }),
        );
        let unicast = frame(ours.info().mac.octets(), theirs.info().mac.octets());
        for _ in 0..20 {
            send(theirs.queue(), &unicast);
        }
        let received = wire::collect(ours.queue(), Duration::from_millis(300));
        assert_eq!(
            received.iter().filter(|frame| **frame == unicast).count(),
            5
        );
    }
});

root_test!(longest_receive_ring_opens, || {
    let netns = Netns::new();
    netns.wire("v0");
    let longest = |spec: &mut MacvtapSpec| spec.tx_queue_len = Some(MacvtapSpec::MAX_TX_QUEUE_LEN);
    open(&netns, &with("v0", longest));
});

root_test!(every_queue_is_open_and_takes_its_share, || {
    let (host, peer) = (Netns::new(), Netns::new());
    host.veth("v0", &peer, "v1");
    let theirs = open(&peer, &spec("v1"));
    for placement in [Placement::Private, Placement::Host] {
        let ours = open(
            &host,
            &with("v0", |spec| {
                spec.netns = placement;
                spec.queues = 4;
            }),
        );
        assert_eq!(ours.queues().len(), 4);
        for queue in ours.queues() {
            let hello = frame(theirs.info().mac.octets(), ours.info().mac.octets());
            send(queue.as_fd(), &hello);
            assert!(receives(theirs.queue(), |frame| frame == hello));
        }
        // 64 flows: UDP from as many ports. None may be lost, and all on one queue is next to
        // impossible.
        for port in 0..64 {
            send(
                theirs.queue(),
                &udp(ours.info().mac.octets(), theirs.info().mac.octets(), port),
            );
        }
        let received = ours.queues().iter().map(|queue| {
            let all = wire::collect(queue.as_fd(), Duration::from_millis(200));
            all.iter().filter(|frame| frame[12..14] == [8, 0]).count()
        });
        let received: Vec<usize> = received.collect();
        assert_eq!(received.iter().sum::<usize>(), 64, "{received:?}");
        assert!(
            received.iter().filter(|count| **count > 0).count() > 1,
            "{received:?}"
        );
    }
});

/// An IPv4 UDP frame without checksums.
fn udp(to: [u8; 6], from: [u8; 6], port: u16) -> Vec<u8> {
    let ip = [
        0x45, 0, 0, 46, 0, 0, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2,
    ];
    let [high, low] = (10_000 + port).to_be_bytes();
    let udp = [high, low, 0, 9, 0, 26, 0, 0];
    [&to[..], &from, &[8, 0], &ip, &udp, &[0; 18]].concat()
}

root_test!(queues_beyond_what_the_driver_opens_are_refused, || {
    let netns = Netns::new();
    netns.wire("v0");
    let many = |link, count| with(link, |spec| spec.queues = count);
    assert!(matches!(
        problem(&netns, &many("v0", 257)),
        Problem::OutOfRange {
            key: "queues",
            wanted: 257,
            ..
        }
    ));
    assert!(matches!(
        problem(&netns, &many("v0", 0)),
        Problem::OutOfRange {
            key: "queues",
            wanted: 0,
            ..
        }
    ));
    netns.macvtap("mine", "v0", "bridge");
    let all = open(&netns, &many("mine", 256));
    assert_eq!(all.queues().len(), 256);
    let refusal = problem(&netns, &spec("mine"));
    assert!(matches!(refusal, Problem::Queue(QueueError::AllOpen { link }) if link == "mine"));
    drop(all);
    // A child that another test is just starting holds them too, until it runs its program.
    soon("closed queues can be opened again", || {
        netns.enter(|| Macvtap::open(&spec("mine"))).is_ok()
    });
});

fn differs(refusal: &Problem, what: &str, has: &str) -> bool {
    matches!(refusal, Problem::Existing { difference, .. } if difference.what == what && difference.has == has)
}

root_test!(existing_macvtap_refuses_what_would_change_it, || {
    let netns = Netns::new();
    netns.wire("v0");
    netns.macvtap("mine", "v0", "bridge");
    let refusal = problem(&netns, &with("mine", |spec| spec.tx_queue_len = Some(100)));
    assert!(differs(&refusal, "txqueuelen", "500"), "{refusal}");
    let refusal = problem(&netns, &with("mine", |spec| spec.bc_queue_len = Some(5)));
    assert!(differs(&refusal, "bcqueuelen", "1000"), "{refusal}");
    netns.ip("link set mine type macvtap mode source");
    let sender: MacAddr = "02:00:00:00:00:01".parse().unwrap();
    let hears_one = with("mine", |spec| {
        spec.mode = Some(Mode::Source);
        spec.source_macs = vec![sender];
    });
    let refusal = problem(&netns, &hears_one);
    assert!(differs(&refusal, "source-mac", "none"), "{refusal}");
    // The remedy is a command that works.
    let text = refusal.to_string();
    let command = text.split('`').nth(3).unwrap().strip_prefix("ip ").unwrap();
    netns.ip(command);
    drop(open(&netns, &hears_one));
    netns.ip("link set mine type macvtap mode bridge");
    let renamed = with("mine", |spec| spec.name = Some("other".parse().unwrap()));
    assert!(differs(&problem(&netns, &renamed), "name", "mine"));
    let same = with("mine", |spec| {
        spec.name = Some("mine".parse().unwrap());
        spec.tx_queue_len = Some(500);
        spec.bc_queue_len = Some(1000);
        spec.netns = Placement::Host;
    });
    drop(open(&netns, &same));
    assert!(netns.links().contains(&"mine".to_owned()));
});

root_test!(name_may_be_taken_in_the_hosts_namespace_alone, || {
    let netns = Netns::new();
    netns.wire("v0");
    netns.wire("taken");
    let named = |name: &str, placement| {
        with("v0", |spec| {
            spec.name = Some(name.parse().unwrap());
            spec.netns = placement;
        })
    };
    assert_eq!(
        open(&netns, &named("taken", Placement::Private))
            .info()
            .name
            .as_str(),
        "taken"
    );
    for (name, placement) in [
        ("taken", Placement::Host),
        ("lo", Placement::Host),
        ("lo", Placement::Private),
    ] {
        let refusal = problem(&netns, &named(name, placement));
        assert!(matches!(refusal, Problem::NameTaken { name: taken } if taken == name));
    }
    let refusal = problem(&netns, &named("vm%d", Placement::Host));
    assert!(matches!(refusal, Problem::NameReserved { .. }));
});

root_test!(unnamed_host_links_take_the_first_free_numbers, || {
    let netns = Netns::new();
    netns.wire("v0");
    let three: Vec<Macvtap> = (0..3).map(|_| open(&netns, &on_host("v0"))).collect();
    let names: Vec<&str> = three.iter().map(|one| one.info().name.as_str()).collect();
    assert_eq!(names, ["mvt0", "mvt1", "mvt2"]);
    let [_, second, _] = <[Macvtap; 3]>::try_from(three).unwrap();
    assert_eq!(open(&netns, &on_host("v0")).info().name.as_str(), "mvt0");
    drop(second);
    // A link of that name is no obstacle to the private one's.
    netns.macvtap("macvtap0", "v0", "bridge");
    assert_eq!(open(&netns, &on_host("v0")).info().name.as_str(), "mvt0");
});

root_test!(failure_at_up_leaves_no_host_link, || {
    let netns = Netns::new();
    netns.wire("v0");
    let with_mac = with("v0", |spec| {
        spec.netns = Placement::Host;
        spec.mac = Some(MAC.parse().unwrap());
    });
    let first = open(&netns, &with_mac);
    let refusal = problem(&netns, &with_mac);
    assert!(matches!(refusal, Problem::MacTaken { by, .. } if by == [first.info().name.as_str()]));
});

root_test!(lower_of_another_namespace_carries_both_placements, || {
    let (far, peer, near) = (Netns::new(), Netns::new(), Netns::new());
    far.veth("v0", &peer, "v1");
    let theirs = open(&peer, &spec("v1"));
    for (placement, links) in [
        (Placement::Private, vec![]),
        (Placement::Host, vec!["mvt0"]),
    ] {
        let there = with("v0", |spec| {
            spec.lower_netns = Some(far.path());
            spec.netns = placement;
        });
        let ours = open(&near, &there);
        assert_eq!(near.links(), links);
        assert_eq!(far.links(), ["v0"]);
        assert_eq!(ours.info().lower.as_str(), "v0");
        for (from, to) in [(&ours, &theirs), (&theirs, &ours)] {
            let hello = frame(to.info().mac.octets(), from.info().mac.octets());
            send(from.queue(), &hello);
            assert!(receives(to.queue(), |frame| frame == hello));
        }
        drop(ours);
        assert!(near.links().is_empty());
    }
    far.macvtap("mine", "v0", "bridge");
    let existing = open(
        &near,
        &with("mine", |spec| spec.lower_netns = Some(far.path())),
    );
    assert_eq!(existing.info().mac.to_string(), far.mac("mine"));
    // And by the process that is in it, as for a container.
    let mut process = far.command("sleep").arg("60").spawn().unwrap();
    let path = PathBuf::from(format!("/proc/{}/ns/net", process.id()));
    let namespace = |path| std::fs::read_link(path).unwrap();
    soon("sleep is in its namespace", || {
        namespace(path.clone()) != namespace("/proc/self/ns/net".into())
    });
    open(&near, &with("v0", |spec| spec.lower_netns = Some(path)));
    process.kill().unwrap();
    process.wait().unwrap();
});

root_test!(namespace_that_is_none_is_refused, || {
    let netns = Netns::new();
    netns.wire("v0");
    let directory = tempfile::tempdir().unwrap();
    // Opening it would wait for a writer.
    let fifo = directory.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    let no_namespace = ["/run/netns/no-such", "/dev/null", "/proc/self/ns/pid", "/"];
    for path in no_namespace.map(PathBuf::from).into_iter().chain([fifo]) {
        let refusal = problem(&netns, &with("v0", |spec| spec.lower_netns = Some(path)));
        assert!(matches!(refusal, Problem::Namespace { .. }), "{refusal}");
    }
    let there = with("v1", |spec| spec.lower_netns = Some(netns.path()));
    let error = netns.enter(|| Macvtap::open(&there)).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "cannot make a macvtap on `v1` of the network namespace {}",
            netns.path().display()
        )
    );
});

// A lower regains what passthru mode took: in both placements, at the end and when the process is
// killed.
root_test!(passthru_restores_the_lowers_mac_and_promiscuity, || {
    let netns = Netns::new();
    netns.wire("v0");
    let own = netns.mac("v0");
    let is_as_before =
        || netns.mac("v0") == own && details(&netns, "v0").contains("promiscuity 0 ");
    assert!(is_as_before());
    for placement in [Placement::Private, Placement::Host] {
        let passthru = with("v0", |spec| {
            spec.netns = placement;
            spec.mode = Some(Mode::Passthru);
        });
        let macvtap = open(&netns, &passthru);
        child::set_mac(&macvtap, MAC);
        assert_eq!(netns.mac("v0"), MAC);
        assert!(details(&netns, "v0").contains("promiscuity 1 "));
        drop(macvtap);
        assert!(is_as_before(), "{placement:?}");

        let killed = child::start_and_change(&netns, &passthru, MAC);
        assert!(details(&netns, "v0").contains("promiscuity 1 "));
        assert_eq!(netns.mac("v0"), MAC);
        killed.kill();
        if placement == Placement::Host {
            assert_eq!(netns.enter(net::delete_stale).unwrap().len(), 1);
        }
        soon("the lower is as it was", is_as_before);
    }
});

root_test!(stale_links_are_deleted_and_no_others, || {
    let netns = Netns::new();
    netns.wire("v0");
    for (name, alias) in [
        ("plain", ""),
        ("theirs", "uplink of the lab"),
        ("odd", "owner: somebody"),
    ] {
        netns.macvtap(name, "v0", "bridge");
        if !alias.is_empty() {
            netns.exec(&["ip", "link", "set", name, "alias", alias]);
        }
    }
    let alive = child::start(&netns, &on_host("v0"));
    let dead = child::start(&netns, &on_host("v0"));
    let mine = open(&netns, &on_host("v0"));
    assert_eq!(
        [&*alive.link, &*dead.link, mine.info().name.as_str()],
        ["mvt0", "mvt1", "mvt2"]
    );
    assert!(netns.enter(net::delete_stale).unwrap().is_empty());

    dead.kill();
    let before = netns.links();
    assert!(before.contains(&"mvt1".to_owned()));
    let deleted = netns.enter(net::delete_stale).unwrap();
    let shown: Vec<_> = deleted
        .iter()
        .map(|link| (&*link.name, &*link.kind))
        .collect();
    assert_eq!(shown, [("mvt1", "macvtap")]);
    assert!(deleted[0].owner.program().starts_with("keys-"));
    let rest: Vec<String> = before.into_iter().filter(|name| name != "mvt1").collect();
    assert_eq!(netns.links(), rest);
    assert!(netns.enter(net::delete_stale).unwrap().is_empty());

    // The next start does the same, and so a MAC of the dead is free again.
    let mac = netns.mac("mvt0");
    alive.kill();
    assert!(netns.links().contains(&"mvt0".to_owned()));
    let next = open(
        &netns,
        &with("v0", |spec| spec.mac = Some(mac.parse().unwrap())),
    );
    assert_eq!(next.info().mac.to_string(), mac);
    assert!(!netns.links().contains(&"mvt0".to_owned()));
});

root_test!(deleters_at_once_share_the_work, || {
    let netns = Netns::new();
    netns.wire("v0");
    let mut ended = std::process::Command::new("true").spawn().unwrap();
    ended.wait().unwrap();
    let me = Owner::this_process().unwrap();
    let pid = |pid| format!(" pid={pid} ");
    let tag = me.to_string().replace(&pid(me.pid()), &pid(ended.id()));
    for n in 0..20 {
        let kind = ["macvtap", "macvlan"][n % 2];
        netns.ip(&format!("link add link v0 name m{n} type {kind}"));
        netns.exec(&["ip", "link", "set", &format!("m{n}"), "alias", &tag]);
    }
    let deleted = std::thread::scope(|scope| {
        let deleters: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| netns.enter(net::delete_stale)))
            .collect();
        let shares = deleters
            .into_iter()
            .map(|deleter| deleter.join().unwrap().unwrap());
        shares.flatten().map(|link| link.name).collect::<Vec<_>>()
    });
    let unique: std::collections::HashSet<_> = deleted.iter().collect();
    assert_eq!((deleted.len(), unique.len()), (20, 20), "{deleted:?}");
    assert_eq!(netns.links().len(), 2);
});

root_test!(queue_alone_keeps_a_private_macvtap, || {
    let (host, peer) = (Netns::new(), Netns::new());
    host.veth("v0", &peer, "v1");
    let theirs = open(&peer, &spec("v1"));
    let (queues, guard) = open(&host, &spec("v0")).into_parts();
    // As by exec, which closes the guard's descriptor and runs no destructor.
    let namespace = namespace_of(&guard);
    std::mem::forget(guard);
    // SAFETY: the descriptor was the guard's, which is forgotten.
    unsafe { libc::close(namespace) };
    std::thread::sleep(Duration::from_millis(200));
    let hello = frame([0xff; 6], theirs.info().mac.octets());
    send(theirs.queue(), &hello);
    assert!(receives(queues[0].as_fd(), |frame| frame == hello));
});

/// The number of the descriptor in a guard, as its Debug output shows it.
fn namespace_of(guard: &net::LinkGuard) -> i32 {
    let text = format!("{guard:?}");
    let (_, rest) = text.split_once("fd: ").expect("a descriptor");
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

root_test!(every_kind_of_lower_carries_in_both_placements, || {
    let netns = Netns::new();
    netns.wire("v0");
    netns.wire("v1");
    let kinds = [
        ("lower link v0 type vlan id 5", &[][..]),
        ("lower type dummy", &[]),
        ("lower type bond", &["v1"]),
        ("lower type bridge", &["v1"]),
    ];
    for (args, ports) in kinds {
        if !netns.add_if_supported(args) {
            continue;
        }
        for port in ports {
            netns.down(port);
            netns.ip(&format!("link set {port} master lower"));
            netns.up(port);
        }
        netns.up("lower");
        for placement in [Placement::Private, Placement::Host] {
            let macvtap = open(&netns, &with("lower", |spec| spec.netns = placement));
            assert_eq!(macvtap.info().lower.as_str(), "lower", "{args}");
            let hello = frame([0xff; 6], macvtap.info().mac.octets());
            send(macvtap.queue(), &hello);
        }
        netns.ip("link delete lower");
    }
});
