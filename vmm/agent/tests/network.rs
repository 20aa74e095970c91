//! The guest's network on veth pairs: leases, routers, fixed addresses, and servers that mean no good.
//!
//! Each guest is a process in namespaces of its own; the other end of its wire is a namespace with
//! dnsmasq, passt or a server of the test's.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

#[path = "network/guest.rs"]
mod guest;
#[path = "../../../tests/harness/netns.rs"]
mod netns;
#[path = "../../../tests/harness/patience.rs"]
#[allow(dead_code)]
mod patience;
#[path = "network/server.rs"]
mod server;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use agent_protocol::boot::IpConfig;

use guest::{Guest, addresses, dhcp, fixed, nic};
use netns::{Netns, root_test};
use patience::{PATIENCE, eventually};
use server::{ACK, Answer, DISCOVER, Message, NAK, OFFER, RELEASE, REQUEST, Server, grant, usual};

/// How long a guest tries a server that gives it nothing: long enough for a first answer, on a busy machine too.
const TRIAL: Duration = Duration::from_secs(5);

/// The guest's and the server's end of a wire, each in its namespace. The server's has 10.77.0.1 and fd77::1.
struct Wire {
    guest: Netns,
    server: Netns,
}

impl Wire {
    fn new() -> Self {
        let (guest, server) = (Netns::new(), Netns::new());
        server.veth("srv0", &guest, "eth0");
        server.address("srv0", "10.77.0.1/24");
        server.address("srv0", "fd77::1/64");
        // For answers to those who have no address yet.
        server.ip("route add default dev srv0");
        // As a guest's NIC is before its init.
        guest.down("eth0");
        guest.ip("link set lo down");
        Self { guest, server }
    }

    fn mac(&self) -> String {
        self.guest.mac("eth0")
    }

    /// A guest with this NIC alone, which gets its addresses from the network.
    fn start(&self, patience: Duration) -> Guest {
        Guest::start(&self.guest, &[dhcp(&self.mac())], patience)
    }

    /// Whether the guest's NIC has an address, as `ip` writes it.
    fn guest_has(&self, address: &str) -> bool {
        let list = self.guest.ip("-o address show dev eth0");
        list.split_whitespace().any(|word| word == address)
    }
}

/// A program that is killed with this value.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// dnsmasq on the server's end of a wire.
fn dnsmasq(wire: &Wire, directory: &Path, options: &[&str]) -> Program {
    let leases = directory.join("leases");
    let mut command = wire.server.command("dnsmasq");
    command
        .args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-ping"])
        .args(["--user=root", "--group=root", "--pid-file=", "--port=0"])
        .args([
            "--interface=srv0",
            "--log-facility=-",
            "--dhcp-authoritative",
        ])
        .arg(format!("--dhcp-leasefile={}", leases.display()))
        .args(options)
        .stderr(Stdio::null());
    Program(command.spawn().unwrap())
}

root_test!(lease_and_router_give_all_that_they_have, || {
    let wire = Wire::new();
    let directory = tempfile::tempdir().unwrap();
    let options = [
        "--dhcp-range=10.77.0.50,10.77.0.59,255.255.255.0,2m",
        "--dhcp-option=option:mtu,1400",
        "--dhcp-option=option:dns-server,10.77.0.53,10.77.0.54",
        "--dhcp-option=option:domain-name,example.test",
        "--dhcp-option=option:classless-static-route,0.0.0.0/0,10.77.0.1,192.0.2.0/24,10.77.0.7",
        "--enable-ra",
        "--dhcp-range=fd77::,ra-only",
        "--dhcp-option=option6:dns-server,[fd77::53]",
    ];
    let _dnsmasq = dnsmasq(&wire, directory.path(), &options);
    let mut guest = wire.start(PATIENCE);
    let outcome = guest.outcome();
    let nics = outcome.clone().unwrap();
    assert_eq!(nics[0].name, "eth0");
    let address = addresses(&outcome).remove(0);
    assert!(
        address.starts_with("10.77.0.5") && address.ends_with("/24"),
        "{address}"
    );
    assert!(wire.guest_has(&address));
    let link = wire.guest.ip("-o link show dev eth0");
    assert!(link.contains("mtu 1400"), "{link}");
    let routes = wire.guest.ip("route");
    assert!(
        routes.contains("default via 10.77.0.1 dev eth0 metric 100"),
        "{routes}"
    );
    assert!(
        routes.contains("192.0.2.0/24 via 10.77.0.7 dev eth0"),
        "{routes}"
    );
    let given = "search example.test\nnameserver 10.77.0.53\nnameserver 10.77.0.54\n";
    let file = guest.file("etc/resolv.conf");
    assert!(file.starts_with(given), "{file}");
    assert_eq!(guest.file("etc/hostname"), "box\n");
    assert!(guest.file("etc/hosts").contains("127.0.1.1\tbox\n"));
    let loopback = wire.guest.ip("-o address show dev lo");
    assert!(
        loopback.contains("127.0.0.1/8") && loopback.contains("::1/128"),
        "{loopback}"
    );

    // What comes a moment later is taken too.
    let advertised = format!("{given}nameserver fd77::53\n");
    assert!(eventually(|| guest.file("etc/resolv.conf") == advertised));
    let list = || {
        wire.guest
            .ip("-6 -o address show dev eth0 scope global -tentative")
    };
    assert!(eventually(|| list().contains("fd77::")), "{}", list());
    assert!(wire.guest.ip("-6 route").contains("default via fe80::"));

    // The server knows its name, and has its address back in the end.
    let leases = || fs::read_to_string(directory.path().join("leases")).unwrap();
    let has_lease = || leases().contains(&format!("{} box ", address.trim_end_matches("/24")));
    assert!(eventually(has_lease), "{}", leases());
    guest.end();
    assert!(eventually(|| !has_lease()), "{}", leases());
});

root_test!(router_alone_is_enough, || {
    let wire = Wire::new();
    let directory = tempfile::tempdir().unwrap();
    let options = ["--enable-ra", "--dhcp-range=fd77::,ra-only"];
    let _dnsmasq = dnsmasq(&wire, directory.path(), &options);
    let mut guest = wire.start(PATIENCE);
    let addresses = addresses(&guest.outcome());
    assert_eq!(addresses.len(), 1, "{addresses:?}");
    assert!(
        addresses[0].starts_with("fd77::") && addresses[0].ends_with("/64"),
        "{addresses:?}"
    );
    // No one resolves names: the root's own file stays.
    assert!(guest.file("etc/resolv.conf").contains("No such file"));
});

root_test!(nic_without_any_server_fails_with_what_was_tried, || {
    let wire = Wire::new();
    let mut guest = wire.start(Duration::from_secs(2));
    let failure = guest.outcome().unwrap_err();
    let start = format!(
        "eth0 ({}) has no address after 2 s: no DHCP server answered ",
        wire.mac()
    );
    let tried = failure
        .strip_prefix(&start)
        .unwrap_or_else(|| panic!("{failure}"));
    let (discovers, rest) = tried.split_once(' ').unwrap();
    // At once, and then again after 250, 500 and 1000 ms: a busy machine sends fewer, and none sends more.
    assert!(matches!(discovers.parse(), Ok(1_u8..=5)), "{failure}");
    assert!(rest.starts_with("DISCOVER"), "{failure}");
    assert!(
        rest.ends_with("; IPv6: no router advertised a prefix"),
        "{failure}"
    );
});

root_test!(mac_that_no_nic_has_is_named, || {
    let wire = Wire::new();
    let nics = [dhcp("52:54:00:00:00:01")];
    let mut guest = Guest::start(&wire.guest, &nics, Duration::from_secs(1));
    let expected = "no NIC with the MAC address 52:54:00:00:00:01 came up within 1 s";
    assert_eq!(guest.outcome().unwrap_err(), expected);
});

root_test!(nic_that_comes_later_is_waited_for, || {
    let (peer, netns) = (Netns::new(), Netns::new());
    netns.ip("link set lo down");
    let mac = "52:54:00:12:34:56";
    let nics = [fixed(mac, &["10.77.0.2/24"], &[], &[])];
    let mut guest = Guest::start(&netns, &nics, PATIENCE);
    // It reads its NICs when it runs, and its loopback comes up just before it looks for them.
    let is_up = || netns.ip("-o link show lo").contains(",UP");
    assert!(eventually(is_up));
    peer.ip(&format!(
        "link add srv0 type veth peer name eth0 address {mac} netns {}",
        netns.name()
    ));
    assert_eq!(addresses(&guest.outcome()), ["10.77.0.2/24"]);
});

root_test!(fixed_addresses_work_at_once_and_routers_add_none, || {
    let wire = Wire::new();
    wire.guest.detect_duplicates(true);
    let directory = tempfile::tempdir().unwrap();
    let options = ["--enable-ra", "--dhcp-range=fd77::,ra-only"];
    let _dnsmasq = dnsmasq(&wire, directory.path(), &options);
    let down = Netns::new();
    down.ip(&format!(
        "link add far type veth peer name eth1 netns {}",
        wire.guest.name()
    ));
    let nics = [
        fixed(
            &wire.mac(),
            &["10.77.0.2/24", "10.77.0.3/24", "fd77::2/64"],
            &["10.77.0.1", "fd77::1"],
            &["10.77.0.53", "fd77::53"],
        ),
        nic(&wire.guest.mac("eth1"), IpConfig::None),
    ];
    let mut guest = Guest::start_with(&wire.guest, &nics, PATIENCE, "");
    let nics = guest.outcome().unwrap();
    assert_eq!(nics[0].addresses.len(), 3);
    assert_eq!(
        (&nics[1].name[..], &nics[1].addresses[..]),
        ("eth1", &[][..])
    );
    assert!(!wire.guest.ip("-o link show dev eth1").contains(",UP"));
    for address in ["10.77.0.2/24", "10.77.0.3/24", "fd77::2/64"] {
        assert!(wire.guest_has(address), "{address}");
    }
    let tentative = wire
        .guest
        .ip("-6 -o address show dev eth0 scope global tentative");
    assert_eq!(tentative, "");
    assert!(
        wire.guest
            .ip("route")
            .contains("default via 10.77.0.1 dev eth0")
    );
    assert!(
        wire.guest
            .ip("-6 route")
            .contains("default via fd77::1 dev eth0")
    );
    // Beyond the router.
    wire.server.address("lo", "198.51.100.1/32");
    assert!(wire.guest.pings("198.51.100.1", 5));
    assert_eq!(
        guest.file("etc/resolv.conf"),
        "nameserver 10.77.0.53\nnameserver fd77::53\n"
    );
    let global = wire.guest.ip("-6 -o address show dev eth0 scope global");
    assert_eq!(global.lines().count(), 1, "{global}");
});

root_test!(
    address_without_a_network_has_its_gateway_on_the_link,
    || {
        let wire = Wire::new();
        let nics = [fixed(
            &wire.mac(),
            &["198.51.100.7/32"],
            &["10.77.0.1"],
            &[],
        )];
        let mut guest = Guest::start(&wire.guest, &nics, PATIENCE);
        assert_eq!(addresses(&guest.outcome()), ["198.51.100.7/32"]);
        let routes = wire.guest.ip("route");
        assert!(
            routes.contains("default via 10.77.0.1 dev eth0"),
            "{routes}"
        );
        assert!(wire.guest.pings("10.77.0.1", 5));
    }
);

root_test!(gateway_out_of_reach_is_named_with_the_reason, || {
    let wire = Wire::new();
    let nics = [fixed(&wire.mac(), &["10.77.0.2/24"], &["10.99.0.1"], &[])];
    let mut guest = Guest::start(&wire.guest, &nics, PATIENCE);
    let mac = wire.mac();
    let expected = format!("cannot add a route to 0.0.0.0/0 by eth0 ({mac}) and 10.99.0.1: ");
    let failure = guest.outcome().unwrap_err();
    let reason = failure
        .strip_prefix(&expected)
        .unwrap_or_else(|| panic!("{failure}"));
    assert!(reason.starts_with("Network is unreachable"), "{failure}");
});

root_test!(
    lease_is_renewed_and_an_address_that_is_lost_replaced,
    || {
        let wire = Wire::new();
        // The first address is granted three times, to be renewed in a second. Then the server wants it back.
        let times = [58, 4, 0, 0, 0, 1, 59, 4, 0, 0, 1, 0];
        let renewed = [&usual(600)[..], &times].concat();
        let mut requests = 0;
        let server = Server::start(&wire.server, move |message| {
            requests += u32::from(message.kind == REQUEST);
            match requests {
                0..=3 => grant(message, [10, 77, 0, 50], &renewed),
                4 if message.kind == REQUEST => Some(Answer {
                    kind: NAK,
                    address: [0; 4],
                    options: vec![54, 4, 10, 77, 0, 1],
                }),
                _ => grant(message, [10, 77, 0, 51], &usual(600)),
            }
        });
        let mut guest = wire.start(PATIENCE);
        assert_eq!(addresses(&guest.outcome()), ["10.77.0.50/24"]);
        assert!(eventually(|| wire.guest_has("10.77.0.51/24")));
        assert!(!wire.guest_has("10.77.0.50/24"));
        assert!(
            wire.guest
                .ip("route")
                .contains("default via 10.77.0.1 dev eth0")
        );
        // Renewals say which address they are for.
        let of_old = |m: &Message| m.kind == REQUEST && m.client.octets() == [10, 77, 0, 50];
        assert!(server.count(of_old) >= 2);
        guest.end();
        assert!(eventually(|| server.count(|m| m.kind == RELEASE) == 1));
    }
);

root_test!(lease_that_is_not_renewed_ends_and_the_guest_goes_on, || {
    let wire = Wire::new();
    let mut first = true;
    let server = Server::start(&wire.server, move |message| {
        let answer = grant(message, [10, 77, 0, 50], &usual(2)).filter(|_| first);
        first &= message.kind != REQUEST;
        answer
    });
    let mut guest = wire.start(PATIENCE);
    assert_eq!(addresses(&guest.outcome()), ["10.77.0.50/24"]);
    assert!(eventually(|| !wire.guest_has("10.77.0.50/24")));
    assert!(eventually(|| server.count(|m| m.kind == DISCOVER) > 2));
    // The NIC goes away, and later the guest ends as if nothing had been.
    wire.guest.ip("link delete eth0");
    assert!(guest.runs());
    guest.end();
});

root_test!(refusals_are_named_and_do_not_make_the_guest_shout, || {
    let wire = Wire::new();
    let server = Server::start(&wire.server, |message| {
        let mut answer = grant(message, [10, 77, 0, 50], &usual(600))?;
        if answer.kind == ACK {
            answer.kind = NAK;
        }
        Some(answer)
    });
    let mut guest = wire.start(TRIAL);
    let failure = guest.outcome().unwrap_err();
    let expected = ": the DHCP server 10.77.0.1 refused what it had offered (NAK); IPv6: ";
    assert!(failure.contains(expected), "{failure}");
    let discovers = server.count(|m| m.kind == DISCOVER);
    assert!((1..=8).contains(&discovers), "{discovers}");
});

/// What a guest says of a server that grants this.
fn failure_of(address: [u8; 4], options: Vec<u8>) -> String {
    let wire = Wire::new();
    let server = Server::start(&wire.server, move |message| {
        grant(message, address, &options)
    });
    let mut guest = wire.start(TRIAL);
    let failure = guest.outcome().unwrap_err();
    let messages = server.count(|_| true);
    assert!((1..=10).contains(&messages), "{messages} messages");
    failure
}

root_test!(leases_that_cannot_be_used_are_named, || {
    let server = [54, 4, 10, 77, 0, 1];
    let no_mask = [&server[..], &[51, 4, 0, 0, 2, 0]].concat();
    let leases = [
        ([0; 4], usual(600), "its address is none of a host's"),
        ([255; 4], usual(600), "its address is none of a host's"),
        (
            [127, 0, 0, 9],
            usual(600),
            "its address is none of a host's",
        ),
        ([10, 77, 0, 50], usual(0), "it is for 0 seconds"),
        ([10, 77, 0, 50], no_mask, "it has no subnet mask"),
        (
            [10, 77, 0, 50],
            usual(600)[6..].to_vec(),
            "it has no server identifier",
        ),
    ];
    // They take their time, all at once.
    thread::scope(|scope| {
        for (address, options, why) in leases {
            scope.spawn(move || {
                let failure = failure_of(address, options);
                let expected = format!("sent what cannot be used: {why}; IPv6");
                assert!(failure.contains(&expected), "{failure}");
            });
        }
    });
});

root_test!(offer_without_an_acknowledgement_is_named, || {
    let wire = Wire::new();
    let _server = Server::start(&wire.server, |message| {
        grant(message, [10, 77, 0, 50], &usual(600)).filter(|answer| answer.kind == OFFER)
    });
    let mut guest = wire.start(TRIAL);
    let failure = guest.outcome().unwrap_err();
    let expected = "the DHCP server 10.77.0.1 offered 10.77.0.50 and did not acknowledge it";
    assert!(failure.contains(expected), "{failure}");
});

root_test!(odd_options_leave_a_lease_that_works, || {
    let wire = Wire::new();
    let huge = [&[43, 255][..], &[0xaa; 255]].concat();
    let times_out_of_order = [58, 4, 255, 255, 255, 255, 59, 4, 0, 0, 0, 1];
    let odd = [
        // A domain that would be a line of its own, an MTU that no packet fits into, routes out of reach
        // and cut off, a router elsewhere, an empty option, and one that is longer than the message.
        &b"\x0f\x1bx\nnameserver 198.51.100.66\n"[..],
        &[0; 3],
        &[26, 2, 0, 1],
        &[6, 6, 0, 0, 0, 0, 10, 77],
        &[121, 3, 33, 1, 2],
        &times_out_of_order,
        &[12, 0],
        &huge,
        &huge,
        &huge,
        &[200, 250, 1],
    ];
    let options = [usual(600), odd.concat()].concat();
    let _server = Server::start(&wire.server, move |message| {
        grant(message, [10, 77, 0, 50], &options)
    });
    let mut guest = wire.start(PATIENCE);
    assert_eq!(addresses(&guest.outcome()), ["10.77.0.50/24"]);
    assert!(wire.guest.ip("-o link show dev eth0").contains("mtu 1500"));
    assert!(
        wire.guest
            .ip("route")
            .contains("default via 10.77.0.1 dev eth0")
    );
    assert!(guest.file("etc/resolv.conf").contains("No such file"));
    assert!(wire.guest.pings("10.77.0.1", 5));
});

root_test!(passt_gives_a_lease, || {
    let wire = Wire::new();
    wire.server.ip("route replace default via 10.77.0.9");
    let inside = Netns::new();
    let mut passt: Command = wire.server.command("pasta");
    passt
        .args(["--foreground", "--quiet", "--ipv4-only", "--runas", "0"])
        .args(["--tcp-ports", "none", "--udp-ports", "none"])
        .args(["--tcp-ns", "none", "--udp-ns", "none"])
        .args(["--ns-ifname", "eth0", "--netns"])
        .arg(inside.path());
    let _passt = Program(passt.spawn().unwrap());
    assert!(eventually(|| inside.links() == ["eth0"]));
    let mut guest = Guest::start(&inside, &[dhcp(&inside.mac("eth0"))], PATIENCE);
    // Those of its host.
    assert_eq!(addresses(&guest.outcome()), ["10.77.0.1/24"]);
    assert!(
        inside
            .ip("route")
            .contains("default via 10.77.0.9 dev eth0")
    );
});
