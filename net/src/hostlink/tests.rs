use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressScope;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};

use super::making::{create, new_address, request};
use super::moving::End;
use super::*;

use crate::harness::{self as netns, Netns, root_test};

fn spec(addresses: &[&str], move_addresses: bool) -> HostLinkSpec {
    let addresses = addresses.iter().map(|text| text.parse().unwrap());
    HostLinkSpec {
        addresses: addresses.collect(),
        move_addresses,
        ..HostLinkSpec::new("v0".parse().unwrap())
    }
}

/// A host with all kinds of addresses and routes on `v0`, and a neighbour behind it.
fn host_with_much() -> (Netns, Netns) {
    let (host, peer) = (Netns::new(), Netns::new());
    host.detect_duplicates(true);
    host.veth("v0", &peer, "v1");
    peer.address("v1", "192.0.2.1/24");
    peer.address("v1", "2001:db8::1/64");
    for line in [
        "address add 192.0.2.5/24 dev v0 brd +",
        "address add 192.0.2.6/24 dev v0 label v0:two",
        "address add 198.51.100.7/25 dev v0 noprefixroute",
        "address add 10.9.9.1/32 peer 10.9.9.2 dev v0",
        "address add 2001:db8::5/64 dev v0 nodad",
        "address add 2001:db8:1::5/64 dev v0 nodad valid_lft 5000 preferred_lft 4000",
        "address add 2001:db8:2::5/64 dev v0 nodad metric 77",
        "route add 198.51.100.0/25 dev v0 proto static metric 100",
        "route add default via 192.0.2.1 metric 50 mtu 1400 src 192.0.2.6",
        "route add 203.0.113.0/24 via 10.255.0.1 dev v0 onlink proto 99",
        "route add 10.20.0.0/16 dev v0 scope link table 77",
        "route add default via 192.0.2.1 table 77",
        "route add 10.30.0.0/16 nexthop via 192.0.2.1 weight 2 nexthop via 192.0.2.254",
        "route add default via 2001:db8::1 metric 1024",
        "route add 2001:db8:77::/48 via fe80::77 dev v0 metric 33",
        "rule add from 192.0.2.6 table 77",
        "rule add not iif v0 fwmark 0x7/0xf tos 0x10 lookup 77 priority 300",
        "rule add oif v0 ipproto udp dport 53-54 uidrange 10-20 goto 32766 priority 301",
        "rule add iif v0 oif v0 to 2001:db8:9::/48 suppress_prefixlength 8 lookup 77 priority 302",
        "neigh add 192.0.2.77 lladdr 02:00:00:00:00:77 dev v0 nud permanent",
        "neigh add 192.0.2.78 lladdr 02:00:00:00:00:78 dev v0 nud noarp",
        "neigh add 2001:db8::77 lladdr 02:00:00:00:00:79 dev v0 nud permanent router",
        "neigh add proxy 198.51.100.9 dev v0 protocol 99",
        "neigh add proxy 2001:db8:5::9 dev v0",
    ] {
        let six = if line.contains("::") { "-6 " } else { "" };
        host.ip(&format!("{six}{line}"));
    }
    settled(&host);
    settled(&peer);
    (host, peer)
}

/// Waits until no address is tentative.
fn settled(netns: &Netns) {
    while netns.ip("-6 address show tentative").contains("inet6") {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// All addresses and routes, sorted, without what passes with time.
fn snapshot(netns: &Netns) -> Vec<String> {
    let mut lines = Vec::new();
    for command in [
        "-o address",
        "-4 route show table all",
        "-6 route show table all",
        "-4 rule",
        "-6 rule",
        "neigh show nud permanent",
        "neigh show nud noarp",
        "-4 neigh show proxy",
        "-6 neigh show proxy",
    ] {
        for line in netns.ip(command).lines() {
            let line = line.split("valid_lft").next().unwrap();
            // The host link's own address: whether its duplicate detection is over is a matter of time.
            let words = line.split_whitespace().filter(|word| *word != "tentative");
            let mut words: Vec<&str> = words.collect();
            if let Some(at) = words.iter().position(|word| *word == "expires") {
                words.drain(at..at + 2);
            }
            lines.push(words.join(" "));
        }
    }
    // Neighbour entries that the kernel makes for groups, when it pleases.
    lines.retain(|line| !line.contains("lladdr 33:33:") && !line.contains("lladdr 01:00:5e:"));
    lines.sort();
    lines
}

/// The kernel makes an IPv6 address's own route a moment after the address.
#[track_caller]
fn becomes(netns: &Netns, expected: &[String], when: &str) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    let look = || own_to_compare(snapshot(netns));
    let expected = own_to_compare(expected.to_vec());
    while look() != expected && std::time::Instant::now() < deadline {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(look(), expected, "{when}");
}

/// Without what the kernel itself adds some time later: to a new link, and for each IPv6 address its local route.
fn own_to_compare(mut lines: Vec<String>) -> Vec<String> {
    let is_kernels = |line: &str| line.contains("fe80::") || line.contains("ff00::/8");
    let is_new = |line: &str| line.contains("half") || line.contains("macvlan0");
    lines.retain(|line| !(is_new(line) && is_kernels(line)));
    lines.retain(|line| !(line.starts_with("local ") && line.contains("::")));
    lines
}

fn make_with(
    host: &Netlink,
    spec: &HostLinkSpec,
    patience: Option<usize>,
) -> Result<HostLink, HostLinkProblem> {
    let mut journal = Journal::new(host);
    journal.patience = patience;
    make(host, spec, None, journal)
}

fn unmake_with(host: &Netlink, patience: Option<usize>) -> Result<HostLink, HostLinkProblem> {
    let links = list(host)?;
    let (link, tag) = host_link_of(&links, "v0")?;
    let mut journal = Journal::new(host);
    journal.patience = patience;
    unmake(host, &links, link, &tag, journal)
}

root_test!(move_that_fails_at_any_step_puts_all_back, || {
    let (host, _peer) = host_with_much();
    let before = snapshot(&host);
    let spec = spec(&["192.0.2.9/24", "fd00::9/64"], true);
    let mut steps = 0;
    loop {
        let result = host.enter(|| make_with(&Netlink::connect().unwrap(), &spec, Some(steps)));
        match result {
            Ok(_) => break,
            Err(HostLinkProblem::Lower(Problem::Kernel { source, .. })) => {
                assert_eq!(source.raw_os_error(), Some(libc::EIO));
            }
            Err(other) => panic!("{other}"),
        }
        becomes(&host, &before, &format!("after a failure at step {steps}"));
        assert_eq!(host.links(), ["v0"]);
        steps += 1;
    }
    assert!(steps > 25, "{steps}");

    let moved = snapshot(&host);
    for patience in 0.. {
        let result = host.enter(|| unmake_with(&Netlink::connect().unwrap(), Some(patience)));
        if result.is_ok() {
            break;
        }
        let step = format!("after a failure at step {patience} of the way back");
        becomes(&host, &moved, &step);
    }
    becomes(&host, &before, "after the way back");
    assert_eq!(host.links(), ["v0"]);
});

root_test!(move_that_was_killed_at_any_step_is_undone_by_delete, || {
    let (host, _peer) = host_with_much();
    let before = snapshot(&host);
    host.enter(|| {
        let netlink = Netlink::connect().unwrap();
        for killed_after in 0.. {
            let (length, lost) = half_a_move(&netlink, killed_after);
            let half = snapshot(&host);
            // And should that fail, all is as it was found.
            let fails = killed_after % 5 == 1;
            if !fails || unmake_with(&netlink, Some(killed_after / 2)).is_err() {
                becomes(&host, &half, &format!("killed after step {killed_after}"));
                unmake_with(&netlink, None).unwrap();
            }
            if let Some(route) = lost {
                netlink.add(&Object::Route(route)).unwrap();
            }
            becomes(&host, &before, &format!("killed after step {killed_after}"));
            assert_eq!(host.links(), ["v0"]);
            if killed_after == length {
                return;
            }
        }
    });
});

/// What a killed `make` leaves behind that had taken so many steps; returns how many it would have taken, and a route
/// that was on neither link just then.
fn half_a_move(host: &Netlink, count: usize) -> (usize, Option<RouteMessage>) {
    let links = list(host).unwrap();
    let lower = diagnose::find(&links, "v0").unwrap();
    let tag = Tag {
        moved: true,
        ..Tag::default()
    };
    let mut spec = spec(&[], true);
    spec.name = Some("half".parse().unwrap());
    let request = request(&spec, &links, lower);
    let index = create(host, &spec, &request, &tag.to_alias().unwrap()).unwrap();
    let link = host.link(index).unwrap();
    host.up(link.index).unwrap();
    let all = moving::everything(host).unwrap();
    let steps = moving::plan(lower.into(), (&link).into(), &all).unwrap();
    let length = steps.len();
    let lost = match (
        count.checked_sub(1).map(|last| &steps[last]),
        steps.get(count),
    ) {
        (Some(Step::Delete(Object::Route(old))), Some(Step::Add(Object::Route(_))))
            if old.header.address_family == AddressFamily::Inet6 =>
        {
            Some(old.clone())
        }
        _ => None,
    };
    let mut journal = Journal::new(host);
    for step in steps.into_iter().take(count) {
        journal.take(step).unwrap();
    }
    journal.commit();
    (length, lost)
}

root_test!(move_takes_everything_but_the_link_local_along, || {
    let (host, peer) = host_with_much();
    assert!(host.pings("192.0.2.1", 5) && host.pings("2001:db8::1", 5));
    let renamed = |name: &str| {
        let lines = snapshot(&host);
        let lines = lines.iter().map(|line| {
            let (_, line) = line.split_once(": ").unwrap_or(("", line));
            line.replace(name, "X")
        });
        let mut lines: Vec<String> = lines
            .filter(|line| line.contains('X') && !line.contains("fe80"))
            .collect();
        lines.retain(|line| !line.contains("ff00::/8"));
        lines.sort();
        lines
    };
    let before = renamed("v0");
    let made = host.enter(|| HostLink::create(&spec(&[], true)).unwrap());
    assert_eq!((made.name.as_str(), made.moved), ("macvlan0", true));
    assert_eq!(made.addresses.len(), 7);
    assert_eq!(renamed("macvlan0"), before);
    assert_eq!(host.ip("-4 -o address show dev v0"), "");
    // The neighbour, who knew the old MAC address, is answered at once; and so is the host.
    for address in ["192.0.2.5", "192.0.2.6", "2001:db8::5"] {
        assert!(peer.pings(address, 2), "{address}");
    }
    for address in ["192.0.2.1", "2001:db8::1"] {
        assert!(host.pings(address, 2), "{address}");
    }
    let deleted = host.enter(|| HostLink::delete(&"macvlan0".parse().unwrap()).unwrap());
    assert_eq!(deleted.addresses, made.addresses);
    assert!(host.pings("192.0.2.1", 5) && host.pings("2001:db8::1", 5));
});

root_test!(
    move_of_advertised_addresses_turns_advertisements_off_meanwhile,
    || {
        let host = Netns::new();
        host.wire("v0");
        host.ip("address add 2001:db8:1::5/64 dev v0 nodad valid_lft 5000 preferred_lft 4000");
        let setting =
            || host.enter(|| std::fs::read_to_string(Paused::AcceptRa.path("v0")).unwrap());
        assert_eq!(setting(), "1\n");
        let delete = || host.enter(|| HostLink::delete(&"v0".parse().unwrap()).unwrap());
        host.enter(|| HostLink::create(&spec(&[], true)).unwrap());
        assert_eq!(setting(), "0\n");
        delete();
        assert_eq!(setting(), "1\n");
    }
);

root_test!(
    move_takes_settings_along_and_leaves_the_lowers_as_they_were,
    || {
        let (host, peer) = (Netns::new(), Netns::new());
        host.veth("v0", &peer, "v1");
        host.address("v0", "192.0.2.5/24");
        peer.address("v1", "192.0.2.1/24");
        let read = |link: &str, key: &str| {
            let path = format!("/proc/sys/net/{}", key.replace("LINK", link));
            host.enter(|| std::fs::read_to_string(path).unwrap().trim().to_owned())
        };
        // None is the default of its kind, and one comes in two units.
        let set = [
            ("ipv4/conf/LINK/forwarding", "1"),
            ("ipv4/conf/LINK/log_martians", "1"),
            ("ipv4/conf/LINK/proxy_arp", "1"),
            ("ipv4/conf/LINK/arp_ignore", "1"),
            ("ipv4/neigh/LINK/proxy_delay", "0"),
            ("ipv4/neigh/LINK/retrans_time_ms", "1240"),
            ("ipv6/conf/LINK/accept_ra", "2"),
            ("ipv6/conf/LINK/forwarding", "1"),
            ("ipv6/neigh/LINK/gc_stale_time", "77"),
        ];
        for (key, value) in set {
            assert_ne!(read("v0", key), value, "{key}");
            let path = format!("/proc/sys/net/{}", key.replace("LINK", "v0"));
            host.enter(|| std::fs::write(path, value).unwrap());
        }
        // It would keep a link without addresses from answering.
        for link in ["all", "v0"] {
            let path = format!("/proc/sys/net/ipv4/conf/{link}/rp_filter");
            host.enter(|| std::fs::write(path, "0").unwrap());
        }
        let all = |link: &str| set.map(|(key, _)| (key, read(link, key)));
        let before = all("v0");
        host.enter(|| HostLink::create(&spec(&[], true)).unwrap());
        assert_eq!(
            all("macvlan0"),
            set.map(|(key, value)| (key, value.to_owned()))
        );
        // Or it would answer for every host on its wire, which is behind another link now.
        assert_eq!(read("v0", "ipv4/conf/LINK/proxy_arp"), "0");
        assert!(!peer.pings("192.0.2.77", 1), "nobody has it");
        let known = peer.ip("neigh show 192.0.2.77");
        assert!(!known.contains("lladdr"), "{known}");
        host.enter(|| HostLink::delete(&"v0".parse().unwrap()).unwrap());
        assert_eq!(all("v0"), before);
    }
);

root_test!(unmoved_link_takes_only_its_own_addresses_away, || {
    let (host, _peer) = host_with_much();
    let before = snapshot(&host);
    let made =
        host.enter(|| HostLink::create(&spec(&["172.16.0.1/24", "fd00::9/64"], false)).unwrap());
    assert!(!made.moved);
    let deleted = host.enter(|| HostLink::delete(&"v0".parse().unwrap()).unwrap());
    assert_eq!(deleted.addresses, made.addresses);
    assert_eq!(snapshot(&host), before);
});

#[test]
fn route_by_a_next_hop_object_is_refused() {
    let mut route = RouteMessage::default();
    route.header.kind = RouteType::Unicast;
    route.attributes = vec![RouteAttribute::Oif(2), RouteAttribute::NhId(7)];
    let steps = |index| {
        let (from, to) = (
            End { index, name: "v0" },
            End {
                index: 3,
                name: "m0",
            },
        );
        moving::plan(from, to, &[Object::Route(route.clone())])
    };
    let refusal = steps(2).unwrap_err();
    assert!(matches!(refusal, HostLinkProblem::NextHopObject { name } if name == "v0"));
    assert_eq!(steps(9).unwrap(), []);
}

#[test]
fn plan_leaves_link_local_and_foreign_addresses_alone() {
    let message = |address: &str, index, scope| {
        let mut message = new_address(&address.parse().unwrap(), index);
        message.header.scope = scope;
        message
    };
    let addresses = [
        message("169.254.1.1/16", 2, AddressScope::Link),
        message("fe80::1/64", 2, AddressScope::Link),
        message("192.0.2.1/24", 4, AddressScope::Universe),
        message("192.0.2.2/24", 2, AddressScope::Universe),
    ];
    let (from, to) = (
        End {
            index: 2,
            name: "v0",
        },
        End {
            index: 3,
            name: "m0",
        },
    );
    let addresses = addresses.map(Object::Address);
    let steps = moving::plan(from, to, &addresses).unwrap();
    let moved = message("192.0.2.2/24", 3, AddressScope::Universe);
    assert_eq!(
        steps,
        [
            Step::Add(Object::Address(moved)),
            Step::Delete(addresses[3].clone())
        ]
    );
}

#[test]
fn plan_of_routes_that_are_there_already_is_covered_however_many() {
    let end = |index| End { index, name: "v0" };
    // So many that comparing each with each would take an hour.
    let routes = (0..100_000_u32).map(|n| {
        let mut route = RouteMessage::default();
        route.header.kind = RouteType::Unicast;
        route.attributes = vec![
            RouteAttribute::Oif(3),
            RouteAttribute::Destination(RouteAddress::Inet(std::net::Ipv4Addr::from_bits(
                (10 << 24) + n,
            ))),
        ];
        route
    });
    let (on_three, mut on_two): (Vec<_>, Vec<_>) = (routes.clone().collect(), routes.collect());
    for route in &mut on_two {
        route.attributes[0] = RouteAttribute::Oif(2);
    }
    let [on_two, on_three] = [on_two, on_three].map(|routes| {
        let objects = routes.into_iter().map(Object::Route);
        objects.collect::<Vec<_>>()
    });
    let steps = moving::plan(end(2), end(3), &on_two).unwrap();
    let adds = || steps.iter().filter(|step| matches!(step, Step::Add(_)));
    let is_done = moving::done(end(3), &on_three);
    assert_eq!(adds().filter(|step| is_done(step)).count(), on_two.len());
    let is_done = moving::done(end(3), &on_two);
    assert!(!adds().any(is_done));
}
