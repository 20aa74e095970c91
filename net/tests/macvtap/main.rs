//! Macvtaps on real links, in network namespaces of the tests' own. They need root.

#![allow(
    clippy::unwrap_used,
    reason = "all of this file is tests, and the lint spares #[test] functions alone"
)]

#[allow(dead_code, reason = "other test binaries use the rest")]
#[path = "../child/mod.rs"]
mod child;
mod keys;
mod lowers;
#[path = "../../../tests/harness/netns.rs"]
mod netns;
mod placement;
#[path = "../wire/mod.rs"]
mod wire;

use std::error::Error as _;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use net::{Error, Macvtap, MacvtapSpec, Mode, Problem, Unfit};
use netns::{Netns, root_test};
use wire::{arp_request, exchange, frame, receives, send};

const MAC: &str = "52:54:00:12:34:56";
const BROADCAST: [u8; 6] = [0xff; 6];

fn spec(link: &str) -> MacvtapSpec {
    MacvtapSpec::new(link.parse().unwrap())
}

fn with(link: &str, set: impl FnOnce(&mut MacvtapSpec)) -> MacvtapSpec {
    let mut spec = spec(link);
    set(&mut spec);
    spec
}

fn with_mac(link: &str, mac: &str) -> MacvtapSpec {
    with(link, |spec| spec.mac = Some(mac.parse().unwrap()))
}

fn with_mode(link: &str, mode: Mode) -> MacvtapSpec {
    with(link, |spec| spec.mode = Some(mode))
}

fn open(netns: &Netns, spec: &MacvtapSpec) -> Macvtap {
    netns
        .enter(|| Macvtap::open(spec))
        .unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// The problem that keeps a macvtap from being opened, after a check that nothing was left.
fn problem(netns: &Netns, spec: &MacvtapSpec) -> Problem {
    let before = netns.links();
    let error = netns.enter(|| Macvtap::open(spec)).expect_err("a problem");
    eprintln!("{}", chain(&error));
    assert_eq!(netns.links(), before);
    error.source
}

fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text + ": " + &net::remedy(error).unwrap_or_default()
}

/// All that `ip` knows of a link, as words.
fn details(netns: &Netns, link: &str) -> String {
    let text = netns.ip(&format!("-d -o link show dev {link}"));
    text.split(&[' ', '\\', '\n'][..])
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

root_test!(open_by_name_of_the_lower_makes_a_private_macvtap, || {
    let netns = Netns::new();
    netns.wire("v0");
    let before = netns.links();
    let (macvtap, moved) = netns.enter(|| {
        let here = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let start = here();
        (Macvtap::open(&spec("v0")).unwrap(), here() != start)
    });
    assert!(!moved, "the caller's thread was moved to another namespace");
    assert_eq!(
        (
            macvtap.info().lower.as_str(),
            macvtap.info().name.as_str(),
            macvtap.info().mtu
        ),
        ("v0", "macvtap0", 1500)
    );
    assert!(macvtap.info().mac.is_local());
    assert_eq!(
        netns.links(),
        before,
        "it must not show in the caller's namespace"
    );
});

root_test!(open_with_mac_and_mtu_gives_these, || {
    let netns = Netns::new();
    netns.wire("v0");
    let mut spec = with_mac("v0", MAC);
    spec.mtu = Some(1400);
    let macvtap = open(&netns, &spec);
    assert_eq!(
        (macvtap.info().mac.to_string().as_str(), macvtap.info().mtu),
        (MAC, 1400)
    );
});

root_test!(drop_frees_the_mac_at_once, || {
    let netns = Netns::new();
    netns.wire("v0");
    for _ in 0..10 {
        drop(open(&netns, &with_mac("v0", MAC)));
    }
    let (queue, guard) = open(&netns, &with_mac("v0", MAC)).into_parts();
    assert!(matches!(
        problem(&netns, &with_mac("v0", MAC)),
        Problem::MacTaken { .. }
    ));
    drop(guard);
    open(&netns, &with_mac("v0", MAC));
    drop(queue);
});

root_test!(frames_pass_both_ways_through_the_queue, || {
    let (host, peer) = (Netns::new(), Netns::new());
    host.veth("v0", &peer, "v1");
    peer.address("v1", "192.0.2.1/24");
    let macvtap = open(&host, &spec("v0"));
    // The peer's kernel answers, and to the right address.
    let mac = macvtap.info().mac.octets();
    let answer = exchange(
        macvtap.queue(),
        &arp_request(mac, [192, 0, 2, 2], [192, 0, 2, 1]),
        |frame| frame[..6] == mac && frame[12..14] == [8, 6] && frame[28..32] == [192, 0, 2, 1],
    );
    assert!(answer, "no ARP answer from the peer");
});

root_test!(multicast_of_an_unjoined_group_is_received, || {
    let (host, peer) = (Netns::new(), Netns::new());
    host.veth("v0", &peer, "v1");
    let (ours, theirs) = (open(&host, &spec("v0")), open(&peer, &spec("v1")));
    let multicast = frame([0x33, 0x33, 0xff, 1, 2, 3], theirs.info().mac.octets());
    send(theirs.queue(), &multicast);
    assert!(receives(ours.queue(), |frame| frame == multicast));
});

root_test!(host_sends_nothing_through_the_macvtap_of_itself, || {
    let (host, peer) = (Netns::new(), Netns::new());
    host.veth("v0", &peer, "v1");
    let listener = open(&peer, &spec("v1"));
    let quiet = open(&host, &spec("v0"));
    // Duplicate address detection and MLD reports would come within this second.
    let mac = quiet.info().mac.octets();
    let received = wire::collect(listener.queue(), Duration::from_millis(1500));
    assert!(
        received.iter().all(|frame| frame[6..12] != mac),
        "{received:02x?}"
    );
});

root_test!(bridge_siblings_alone_receive_from_each_other, || {
    for (mode, expected) in [
        (Mode::Bridge, true),
        (Mode::Private, false),
        (Mode::Vepa, false),
    ] {
        let netns = Netns::new();
        netns.wire("v0");
        let (one, two) = (
            open(&netns, &with_mode("v0", mode)),
            open(&netns, &with_mode("v0", mode)),
        );
        let hello = frame(two.info().mac.octets(), one.info().mac.octets());
        send(one.queue(), &hello);
        assert_eq!(
            receives(two.queue(), |frame| frame == hello),
            expected,
            "{mode}"
        );
    }
});

root_test!(passthru_takes_the_lowers_mac_and_receives_all, || {
    let (host, peer) = (Netns::new(), Netns::new());
    host.veth("v0", &peer, "v1");
    let ours = open(&host, &with_mode("v0", Mode::Passthru));
    assert_eq!(ours.info().mac.to_string(), host.mac("v0"));
    let theirs = open(&peer, &spec("v1"));
    let stray = frame([0x52, 0x54, 0, 9, 9, 9], theirs.info().mac.octets());
    send(theirs.queue(), &stray);
    assert!(receives(ours.queue(), |frame| frame == stray));
});

root_test!(source_with_an_empty_list_receives_nothing, || {
    let (host, peer) = (Netns::new(), Netns::new());
    host.veth("v0", &peer, "v1");
    let (ours, theirs) = (
        open(&host, &with_mode("v0", Mode::Source)),
        open(&peer, &spec("v1")),
    );
    let hello = frame(ours.info().mac.octets(), theirs.info().mac.octets());
    send(theirs.queue(), &hello);
    assert!(!receives(ours.queue(), |frame| frame == hello));
    // It can still send.
    let hello = frame(BROADCAST, ours.info().mac.octets());
    send(ours.queue(), &hello);
    assert!(receives(theirs.queue(), |frame| frame == hello));
});

root_test!(existing_macvtap_is_used_and_left_as_it_was, || {
    let (host, peer) = (Netns::new(), Netns::new());
    host.veth("v0", &peer, "v1");
    host.macvtap("mine", "v0", "vepa");
    let macvtap = open(&host, &spec("mine"));
    assert_eq!(
        (macvtap.info().name.as_str(), macvtap.info().lower.as_str()),
        ("mine", "v0")
    );
    assert_eq!(macvtap.info().mac.to_string(), host.mac("mine"));
    let theirs = open(&peer, &spec("v1"));
    let hello = frame(macvtap.info().mac.octets(), theirs.info().mac.octets());
    send(theirs.queue(), &hello);
    assert!(receives(macvtap.queue(), |frame| frame == hello));
    drop(macvtap);
    assert!(host.links().contains(&"mine".to_owned()));

    assert!(matches!(
        problem(&host, &with_mac("mine", MAC)),
        Problem::Existing { difference, .. } if difference.what == "MAC address"
    ));
    assert!(matches!(
        problem(&host, &with_mode("mine", Mode::Bridge)),
        Problem::Existing { difference, .. } if difference.what == "mode"
    ));
    host.down("mine");
    assert!(
        matches!(problem(&host, &spec("mine")), Problem::Unfit(Unfit::Down { name }) if name == "mine")
    );
    host.up("mine");
    host.ip("link set mine txqueuelen 0");
    assert!(matches!(
        problem(&host, &spec("mine")),
        Problem::Unfit(Unfit::NoReceiveRing { .. })
    ));
});

root_test!(same_index_in_two_namespaces_opens_the_own_device, || {
    // The node /dev/tap<index> can be that of one of them only.
    let spaces = [Netns::new(), Netns::new()];
    let index = 1_000_000 + std::process::id();
    for netns in &spaces {
        netns.wire("v0");
        netns.ip(&format!(
            "link add link v0 name mine index {index} type macvtap mode bridge"
        ));
        netns.up("mine");
    }
    for netns in &spaces {
        assert_eq!(
            open(netns, &spec("mine")).info().mac.to_string(),
            netns.mac("mine")
        );
    }
});

root_test!(user_without_rights_is_refused_with_the_remedy, || {
    let netns = Netns::new();
    netns.wire("v0");
    netns.macvtap("mine", "v0", "bridge");
    let refused = |link| {
        netns.enter(|| {
            become_nobody();
            chain(&Macvtap::open(&spec(link)).expect_err("no right"))
        })
    };
    let text = refused("v0-far");
    assert!(
        text.contains("lacks CAP_NET_ADMIN and CAP_SYS_ADMIN") && text.contains("sudo"),
        "{text}"
    );
});

/// Makes the calling thread, and it alone, an ordinary user. (The libc function would change all
/// threads.)
fn become_nobody() {
    const NOBODY: libc::c_long = 65_534;
    // SAFETY: setresuid takes three numbers.
    let result = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
    assert_eq!(result, 0);
}

const CHILD_LINK: &str = "NET_TEST_CHILD_LINK";
const CHILD_UID: &str = "NET_TEST_CHILD_UID";

/// Not a test by itself: the body of the processes that other tests start.
#[test]
fn child_process_opens_and_waits() {
    let Ok(link) = std::env::var(CHILD_LINK) else {
        return;
    };
    if std::env::var_os(CHILD_UID).is_some() {
        become_nobody();
    }
    match Macvtap::open(&with_mac(&link, MAC)) {
        Ok(macvtap) => {
            println!("CHILD opened {}", macvtap.info().mac);
            std::thread::sleep(Duration::from_secs(60));
        }
        Err(error) => println!("CHILD {}", chain(&error)),
    }
}

/// A process of this test binary that opens `link` inside `netns`, and the line that it says then.
fn child(netns: &Netns, link: &str, as_nobody: bool) -> (Child, String) {
    use std::io::BufRead;
    let mut command: Command = netns.command(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child_process_opens_and_waits", "--nocapture"])
        .env(CHILD_LINK, link);
    if as_nobody {
        command.env(CHILD_UID, "");
    }
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    // The test harness puts its own words before, on the same line.
    let said = lines
        .map_while(Result::ok)
        .find_map(|line| line.split_once("CHILD ").map(|(_, said)| said.to_owned()));
    (child, said.unwrap_or_default())
}

root_test!(killed_process_leaves_neither_link_nor_node_nor_mac, || {
    let netns = Netns::new();
    netns.wire("v0");
    let (mut child, said) = child(&netns, "v0", false);
    assert_eq!(said, format!("opened {MAC}"));
    assert!(matches!(
        problem(&netns, &with_mac("v0", MAC)),
        Problem::MacTaken { .. }
    ));
    let node = private_node_of(child.id());
    assert!(node.exists(), "{node:?}");

    // ip-netns-exec(8) has become the child by exec, so this is the process with the queue.
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while netns.enter(|| Macvtap::open(&with_mac("v0", MAC))).is_err() {
        assert!(Instant::now() < deadline, "the MAC is still taken");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!node.exists(), "{node:?} is still there");
});

/// The node of the macvtap that a process has open.
fn private_node_of(pid: u32) -> std::path::PathBuf {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let mut targets = fds.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    targets
        .find(|target| target.starts_with("/dev") && target.to_string_lossy().contains("tap"))
        .expect("a tap node")
}

root_test!(existing_macvtap_serves_a_user_who_owns_its_node, || {
    let netns = Netns::new();
    netns.wire("v0");
    let index = 2_000_000 + std::process::id();
    netns.ip(&format!(
        "link add link v0 name mine index {index} address {MAC} type macvtap mode bridge"
    ));
    netns.up("mine");
    let node = format!("/dev/tap{index}");

    let (mut denied, said) = child(&netns, "mine", true);
    denied.wait().unwrap();
    assert!(said.contains(&format!("`chown 65534 {node}`")), "{said}");

    std::os::unix::fs::chown(&node, Some(65_534), None).unwrap();
    let (mut served, said) = child(&netns, "mine", true);
    served.kill().unwrap();
    served.wait().unwrap();
    assert_eq!(said, format!("opened {MAC}"));
});

root_test!(queue_is_non_blocking_and_closed_on_exec, || {
    let netns = Netns::new();
    netns.wire("v0");
    let macvtap = open(&netns, &spec("v0"));
    let queue = macvtap.queue();
    assert!(
        rustix::fs::fcntl_getfl(queue)
            .unwrap()
            .contains(rustix::fs::OFlags::NONBLOCK)
    );
    assert!(
        rustix::io::fcntl_getfd(queue.as_fd())
            .unwrap()
            .contains(rustix::io::FdFlags::CLOEXEC)
    );
});
