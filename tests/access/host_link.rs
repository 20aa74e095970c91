//! The host's own access to its guests.

use super::*;

/// The host's addresses in these tests.
const HOST: [&str; 2] = ["10.77.0.8", "fd77::8"];

/// Host and guest reach each other, and the far side still both.
#[track_caller]
fn host_and_guest_talk(place: &Place, vm: &Vm) {
    for ip in addresses(2) {
        assert!(
            place.net.host.pings(&ip, 3),
            "host to {ip}\n{}",
            vm.transcript()
        );
        assert!(place.net.far.pings(&ip, 3), "far side to {ip}");
    }
    for (host, peer) in HOST.iter().zip(PEER) {
        assert!(place.net.far.pings(host, 3), "far side to {host}");
        assert!(place.net.host.pings(peer, 3), "host to {peer}");
        // A second guest asks the host: the first one is busy serving.
        let guest = place.guest(3, &format!("mode=ping count=3 peer={host}"));
        let args = with(&guest, &["--macvtap", "lower"]);
        guest::succeed(Vm::spawn(place.minivmm(&args)));
    }
}

guest_test!(host_link_lets_host_and_guest_talk_until_deleted, || {
    let place = Place::new();
    let vm = place.serve(2, &["--macvtap", "lower"]);
    let [v4, v6] = [format!("{}/24", HOST[0]), format!("{}/64", HOST[1])];
    let make = [
        "net",
        "host-link",
        "lower",
        "--address",
        &v4,
        "--address",
        &v6,
    ];
    for (name, words) in [("macvlan0", &[][..]), ("hosts", &["--name", "hosts"])] {
        let shown = succeeds(place.minivmm(&[&make[..], words].concat()));
        assert!(
            shown.starts_with(&format!("{name} on lower has")),
            "{shown}"
        );
        assert!(shown.contains(&v4) && shown.contains(&v6), "{shown}");
        assert_eq!(place.net.host.links(), ["lower", name]);
        host_and_guest_talk(&place, &vm);
        let listing = succeeds(place.minivmm(&["net", "list", "lower"]));
        assert!(listing.contains("the host's own"), "{listing}");
        // By the name of either link.
        let by = if name == "hosts" { name } else { "lower" };
        let shown = succeeds(place.minivmm(&["net", "host-link", by, "--delete"]));
        assert_eq!(shown, format!("deleted {name} on lower\n"));
        assert_eq!(place.net.host.links(), ["lower"]);
        assert!(!place.net.host.pings(&addresses(2)[0], 1), "without it");
    }
    place.net.quit(2, vm);
});

guest_test!(host_link_moves_addresses_and_routes_and_back, || {
    let place = Place::new();
    let host = &place.net.host;
    host.address("lower", &format!("{}/24", HOST[0]));
    host.address("lower", &format!("{}/64", HOST[1]));
    host.ip(&format!("route add default via {}", PEER[0]));
    host.ip(&format!("-6 route add default via {}", PEER[1]));
    let routes = || host.ip("route show") + &host.ip("-6 route show default");
    let before = routes();
    let vm = place.serve(2, &["--macvtap", "lower"]);
    assert!(
        !host.pings(&addresses(2)[0], 1),
        "that is how macvtap works"
    );

    let shown = succeeds(place.minivmm(&["net", "host-link", "lower", "--move-address"]));
    assert!(
        shown.contains(HOST[0]) && shown.contains(HOST[1]),
        "{shown}"
    );
    let with_link = routes();
    assert_eq!(after(&with_link, "dev"), "macvlan0", "{with_link}");
    assert!(!with_link.contains("dev lower"), "{with_link}");
    assert_eq!(with_link.matches("default via").count(), 2, "{with_link}");
    host_and_guest_talk(&place, &vm);

    let shown = succeeds(place.minivmm(&["net", "host-link", "lower", "--delete"]));
    assert!(shown.contains("are back there"), "{shown}");
    assert_eq!(routes(), before);
    assert_eq!(host.links(), ["lower"]);
    for peer in PEER {
        assert!(host.pings(peer, 3), "{peer}");
    }
    place.net.quit(2, vm);
});

/// A namespace whose `lower` has an address, and minivmm in it with this PATH.
fn firewalled(path: &str) -> (Netns, impl Fn(&[&str]) -> Command) {
    let netns = Netns::new();
    netns.wire("lower");
    netns.address("lower", &format!("{}/24", HOST[0]));
    let path = format!("PATH={path}");
    let start = ["ip", "netns", "exec", netns.name(), "env", &path].map(str::to_owned);
    let host_link = move |args: &[&str]| {
        let mut command = Command::new(&start[0]);
        command.args(&start[1..]).arg(binary());
        command.args(["net", "host-link"]).args(args);
        command.env_remove("RUST_LOG").stdin(Stdio::null());
        command
    };
    (netns, host_link)
}

/// The warnings of a run that must succeed.
#[track_caller]
fn warnings(command: Command) -> Vec<String> {
    let run = run(command);
    assert_eq!(run.status.code(), Some(0), "{run:?}");
    let warnings = run.stderr.lines().filter(|line| line.contains("warn: "));
    warnings.map(str::to_owned).collect()
}

root_test!(host_link_move_names_the_firewall_rules_that_stay, || {
    // Its program is not in an ordinary user's PATH.
    let (netns, host_link) = firewalled("/usr/bin:/bin");
    if netns
        .exec(&["sh", "-c", "command -v nft"])
        .stdout
        .is_empty()
    {
        leave_out("tests of firewall rules need nft: install nftables");
        return;
    }
    let rules = "table ip t { chain c { type filter hook input priority 0; \
                 iifname lower tcp dport 22 accept; iifname lower2 drop; iifname hl drop; }; }";
    assert!(netns.exec(&["nft", rules]).status.success());
    assert!(warnings(host_link(&["lower", "--address", "10.99.0.8/24"])).is_empty());
    assert!(warnings(host_link(&["--delete"])).is_empty());

    let shown = warnings(host_link(&["lower", "--move-address", "--name", "hl"]));
    assert_eq!(shown.len(), 1, "{shown:?}");
    let rule =
        "go by the name lower: `ip t c: iifname \"lower\" tcp dport 22 accept`. Repeat them for hl";
    assert!(shown[0].contains(rule), "{shown:?}");
    let shown = warnings(host_link(&["--delete"]));
    assert_eq!(shown.len(), 1, "{shown:?}");
    let rule = "go by the name hl: `ip t c: iifname \"hl\" drop`. Repeat them for lower";
    assert!(shown[0].contains(rule), "{shown:?}");

    let same = "add rule ip t c iifname hl tcp dport 22 accept";
    assert!(netns.exec(&["nft", same]).status.success());
    assert!(warnings(host_link(&["lower", "--move-address", "--name", "hl"])).is_empty());
});

root_test!(host_link_moves_addresses_without_readable_firewall, || {
    let programs = TempDir::new().unwrap();
    for (name, script) in [
        ("nft", "echo no permission >&2; exit 1"),
        ("iptables-legacy-save", "exec sleep 1000"),
        (
            "ip6tables-legacy-save",
            "printf '*raw\\n-A OUTPUT -o low+ -j DROP\\n'",
        ),
    ] {
        let path = programs.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:/usr/bin:/bin", programs.path().display());
    let (netns, host_link) = firewalled(&path);
    let shown = warnings(host_link(&["lower", "--move-address"]));
    assert_eq!(shown.len(), 2, "{shown:?}");
    let rule = "`ip6tables -t raw -A OUTPUT -o low+ -j DROP`. Repeat them for the macvlan";
    assert!(shown[0].contains(rule), "{shown:?}");
    for text in [
        "`nft -s list ruleset`: exit status: 1: no permission",
        "`iptables-legacy-save`: timed out",
    ] {
        assert!(shown[1].contains(text), "{shown:?}");
    }
    assert!(netns.ip("address show dev macvlan0").contains(HOST[0]));
});

guest_test!(host_link_that_is_refused_changes_nothing, || {
    let place = Place::new();
    let host = &place.net.host;
    host.address("lower", &format!("{}/24", HOST[0]));
    // The kernel takes a moment to find that nobody else has the link-local one.
    let addresses = || host.ip("address show").replace(" tentative", "");
    let before = addresses();
    let refused = |args: &[&str], status: i32, texts: &[&str]| {
        let args = [&["net", "host-link"], args].concat();
        is_refused(place.minivmm(&args), status, texts);
        assert_eq!(addresses(), before, "{args:?}");
    };
    let address = ["--address", "10.99.0.8/24"];
    refused(
        &[&["nolink"], &address[..]].concat(),
        FAILED,
        &["cannot make a host link on `nolink`"],
    );
    refused(&["lower"], USAGE, &["--address"]);
    refused(&["lower", "--address", "10.99.0.8"], USAGE, &["10.99.0.8"]);
    refused(
        &["lower", "--address", "10.77.0.9/24"],
        FAILED,
        &["`lower` with its", "network of 10.77.0.9/24"],
    );
    refused(
        &["lower", "--address", &format!("{}/24", HOST[0])],
        FAILED,
        &["has the address", "already"],
    );
    refused(
        &["lower", "--delete"],
        FAILED,
        &["cannot delete the host link", "no host link on `lower`"],
    );
    refused(&["--delete"], FAILED, &["there is no host link"]);
    refused(
        &[&["lower", "--name", "lower"], &address[..]].concat(),
        FAILED,
        &["already an interface `lower`"],
    );
});

guest_test!(only_host_link_is_deleted_without_its_name, || {
    let place = Place::new();
    let host_link = |args: &[&str]| place.minivmm(&[&["net", "host-link"], args].concat());
    for (name, address) in [("one", "10.98.0.8/24"), ("two", "10.99.0.8/24")] {
        succeeds(host_link(&["lower", "--name", name, "--address", address]));
    }
    let both = ["`one` on `lower`", "`two` on `lower`", "name one of them"];
    is_refused(host_link(&["--delete"]), FAILED, &both);
    succeeds(host_link(&["one", "--delete"]));
    let shown = succeeds(host_link(&["--delete"]));
    assert_eq!(shown, "deleted two on lower\n");
});

guest_test!(host_link_of_a_guest_lives_as_long_as_the_guest, || {
    let place = Place::new();
    let [v4, v6] = [format!("{}/24", HOST[0]), format!("{}/64", HOST[1])];
    let options = ["--macvtap", "lower", "--host-link", &v4, "--host-link", &v6];
    let vm = place.serve(2, &options);
    assert_eq!(place.net.host.links(), ["lower", "macvlan0"]);
    host_and_guest_talk(&place, &vm);
    for name in ["lower", "macvlan0"] {
        is_refused(
            place.minivmm(&["net", "host-link", name, "--delete"]),
            FAILED,
            &[&format!("`macvlan0` belongs to the process {}", vm.pid())],
        );
    }
    place.net.quit(2, vm);
    assert_eq!(place.net.host.links(), ["lower"], "after the power-off");

    let vm = place.serve(2, &options);
    terminate(vm);
    assert_eq!(place.net.host.links(), ["lower"], "after SIGTERM twice");

    kill(place.serve(2, &options));
    assert_eq!(place.net.host.links(), ["lower", "macvlan0"]);
    let deleted = succeeds(place.minivmm(&["net", "gc"]));
    assert!(
        deleted.starts_with("deleted macvlan0 (macvlan)"),
        "{deleted}"
    );
    assert_eq!(place.net.host.links(), ["lower"], "after gc");
});

guest_test!(host_link_on_a_lower_of_another_namespace_is_refused, || {
    let place = Place::new();
    // Where minivmm runs, the same names mean something else.
    let elsewhere = Netns::new();
    elsewhere.wire("lower");
    elsewhere.wire("mine");
    let before = elsewhere.links();
    let guest = place.guest(2, "mode=info");
    let spec = format!("lower,lower-netns={}", place.net.host.path().display());
    let options = ["--macvtap", &spec, "--host-link", "10.77.0.9/24"];
    let texts = ["--host-link", "not in this network namespace"];
    let refused = |command| {
        is_refused(command, FAILED, &texts);
        assert_eq!(elsewhere.links(), before);
        assert_eq!(place.net.host.links()[0], "lower");
    };
    refused(minivmm(&elsewhere, &with(&guest, &options)));
    let node = place.macvtap("mine");
    let script = format!("exec \"$@\" 3<>{}", node.display());
    let mut command = elsewhere.command("sh");
    command.args(["-ec", &script, "sh"]).arg(binary());
    command.args(with(
        &guest,
        &["--macvtap", "fd=3", "--host-link", "10.77.0.9/24"],
    ));
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    let run = run(command);
    assert_eq!(run.status.code(), Some(FAILED), "{run:?}");
    for text in [&texts[..], &["its carrier and its end will not show"]].concat() {
        assert_eq!(run.stderr.matches(text).count(), 1, "{text}: {run:?}");
    }
    assert_eq!(elsewhere.links(), before);
});

guest_test!(host_link_of_a_guest_that_cannot_be_leaves_nothing, || {
    let place = Place::new();
    place.net.host.address("lower", &format!("{}/24", HOST[0]));
    let guest = place.guest(2, "mode=info");
    let options = [
        "--macvtap",
        "lower,netns=host",
        "--host-link",
        "10.77.0.9/24",
    ];
    is_refused(
        place.minivmm(&with(&guest, &options)),
        FAILED,
        &["cannot make a host link on `lower`", "10.77.0.9/24"],
    );
    assert_eq!(place.net.host.links(), ["lower"]);
    is_refused(
        place.minivmm(&with(&guest, &["--host-link", "10.77.0.9/24"])),
        USAGE,
        &["--macvtap"],
    );
});

guest_test!(stale_host_link_of_a_killed_fd_guest_is_replaced, || {
    let place = Place::new();
    let node = place.macvtap("mine");
    let guest = place.guest(2, "mode=echo");
    let address = format!("{}/24", HOST[0]);
    let args = with(&guest, &["--macvtap", "fd=3", "--host-link", &address]);
    let redirection = format!("3<>{}", node.display());
    let start = || Vm::spawn(place.redirected(&redirection, Stdio::null(), &args));
    kill(place.until_it_serves(start()));
    assert_eq!(place.net.host.links(), ["lower", "mine", "macvlan0"]);
    let vm = place.until_it_serves(start());
    assert_eq!(place.net.host.links(), ["lower", "mine", "macvlan0"]);
    kill(vm);
    // Nor is a lasting one kept out.
    let make = ["net", "host-link", "lower", "--address", &address];
    succeeds(place.minivmm(&make));
    assert_eq!(place.net.host.links(), ["lower", "mine", "macvlan0"]);
});
