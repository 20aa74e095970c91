//! Macvtaps in their own namespace, the caller's and others, and what remains of them.

use std::path::PathBuf;

use net::{Owner, Placement};

use super::child::soon;
use super::*;

fn on_host(link: &str) -> MacvtapSpec {
    with(link, |spec| spec.netns = Placement::Host)
}

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
    assert!(deleted[0].owner.program().starts_with("macvtap-"));
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
