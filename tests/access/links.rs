//! Macvtaps that `ip link` shows, keys, and lowers in other namespaces.

use super::*;

guest_test!(visible_macvtap_names_its_owner_and_ends_with_it, || {
    let place = Place::new();
    let options = ["--macvtap", "lower,netns=host,name=guest0"];
    let is_shown = |vm: &Vm| {
        let shown = place.net.host.ip("-d link show dev guest0");
        let owner = format!("alias owner: minivmm pid={} start=", vm.pid());
        assert!(shown.contains(&owner), "no {owner:?} in {shown}");
        assert!(shown.contains("macvtap mode bridge"), "{shown}");
    };
    let vm = place.serve(2, &options);
    is_shown(&vm);
    assert!(place.net.far.pings(&addresses(2)[0], 3));
    place.net.quit(2, vm);
    assert_eq!(place.net.host.links(), ["lower"], "after the power-off");

    let vm = place.serve(2, &options);
    is_shown(&vm);
    terminate(vm);
    assert_eq!(place.net.host.links(), ["lower"], "after SIGTERM twice");

    // Without a name it gets a free one.
    let vm = place.serve(2, &["--macvtap", "lower,netns=host"]);
    assert_eq!(place.net.host.links(), ["lower", "mvt0"]);
    place.net.quit(2, vm);
});

guest_test!(leaked_macvtap_alone_is_listed_so_and_deleted_by_gc, || {
    let place = Place::new();
    let dead = place.serve(2, &["--macvtap", "lower,netns=host,name=dead"]);
    let live = place.serve(3, &["--macvtap", "lower,netns=host,name=live"]);
    place.net.host.macvtap("users", "lower", "bridge");
    // Their indexes are random, and so is `ip`'s order.
    let links = || {
        let mut links = place.net.host.links();
        links.sort();
        links
    };
    let pid = dead.pid();
    kill(dead);
    assert_eq!(
        links(),
        ["dead", "live", "lower", "users"],
        "none deletes it"
    );

    let listing = succeeds(place.minivmm(&["net", "list"]));
    let line = |name: &str| {
        let word = format!("macvtap {name} ");
        let found = listing.lines().find(|line| line.contains(&word));
        found.unwrap_or_else(|| panic!("no {name} in {listing}"))
    };
    let leaked = "minivmm net gc";
    assert!(line("dead").contains(leaked), "{listing}");
    assert!(line("dead").contains(&format!("(pid {pid})")), "{listing}");
    assert!(!line("live").contains(leaked), "{listing}");
    assert!(!line("users").contains("owner"), "{listing}");
    let json = succeeds(place.minivmm(&["net", "list", "lower", "--json"]));
    assert_eq!(json.matches("\"leaked\": true").count(), 1, "{json}");

    let deleted = succeeds(place.minivmm(&["net", "gc"]));
    assert!(deleted.starts_with("deleted dead (macvtap)"), "{deleted}");
    assert_eq!(deleted.lines().count(), 1, "{deleted}");
    assert_eq!(links(), ["live", "lower", "users"]);
    assert_eq!(succeeds(place.minivmm(&["net", "gc"])), "");
    assert!(place.net.far.pings(&addresses(3)[0], 3), "the live one");
    place.net.quit(3, live);
    assert_eq!(links(), ["lower", "users"]);
});

guest_test!(leaked_macvtap_is_deleted_by_the_next_start, || {
    let place = Place::new();
    let spec = format!("lower,netns=host,name=guest0,mac={MAC}");
    kill(place.serve(2, &["--macvtap", &spec]));
    assert_eq!(place.net.host.links(), ["lower", "guest0"]);
    // Its name and its MAC address would be taken.
    let vm = place.serve(2, &["--macvtap", &spec]);
    vm.wait_for_log("deleted guest0 of an ended process");
    assert!(place.net.far.pings(&addresses(2)[0], 3));
    place.net.quit(2, vm);
    assert_eq!(place.net.host.links(), ["lower"]);
});

// Keys.

guest_test!(keys_show_on_the_link_and_in_the_guest, || {
    let place = Place::new();
    let spec = "lower,netns=host,name=guest0,mtu=1300,txqueuelen=700,bcqueuelen=2000,mode=vepa";
    let vm = place.serve(2, &["--macvtap", spec]);
    let shown = place.net.host.ip("-d link show dev guest0");
    for (word, value) in [
        ("mtu", "1300"),
        ("qlen", "700"),
        ("bcqueuelen", "2000"),
        ("mode", "vepa"),
    ] {
        let values: Vec<_> = shown.split_whitespace().collect();
        let has = values.windows(2).any(|pair| pair == [word, value]);
        assert!(has, "no {word} {value} in {shown}");
    }
    assert!(place.net.far.pings(&addresses(2)[0], 3));
    place.net.quit(2, vm);

    let guest = place.guest(2, "mode=info");
    let args = with(&guest, &["--macvtap", "lower,mtu=1300"]);
    let console = guest::succeed(Vm::spawn(place.minivmm(&args)));
    assert!(console.contains(" mtu=1300"), "{console}");
    for (key, text) in [
        ("mtu=9000", "9000"),
        ("txqueuelen=0", "not 0"),
        ("bcqueuelen=0", "1 or more"),
    ] {
        let spec = format!("lower,{key}");
        let args = with(&guest, &["--macvtap", &spec]);
        is_refused(place.minivmm(&args), FAILED, &["`lower`", text]);
    }
    let args = with(&guest, &["--macvtap", "lower,queues=2"]);
    let console = guest::succeed(Vm::spawn(place.minivmm(&args)));
    assert!(console.contains("NIC 0"), "{console}");
    let args = with(&guest, &["--macvtap", "lower,queues=32"]);
    is_refused(place.minivmm(&args), USAGE, &["1 to 31 queues"]);
});

guest_test!(senders_of_source_mode_show_on_the_link, || {
    let place = Place::new();
    let sources = "source-mac=02:00:00:00:33:0a,source-mac=02:00:00:00:33:0b";
    let spec = format!("lower,netns=host,name=src0,mode=source,{sources}");
    let open = ["net", "open", &spec, "--"];
    let show = ["ip", "-d", "link", "show", "dev", "src0"];
    let output = run(place.minivmm(&[&open[..], &show].concat()));
    let shown = output.stdout;
    for words in [
        "mode source",
        "remotes (2)",
        "02:00:00:00:33:0a",
        "02:00:00:00:33:0b",
    ] {
        assert!(shown.contains(words), "no {words} in {shown}");
    }
    let log = output.stderr;
    assert!(!log.contains("list is empty"), "{log}");
    let spec = format!("lower,{sources}");
    let args = ["net", "open", &spec, "--", "true"];
    is_refused(place.minivmm(&args), USAGE, &["needs mode=source"]);
});

guest_test!(passthru_gives_the_lower_its_mac_back, || {
    let place = Place::new();
    let host = &place.net.host;
    let own = host.mac("lower");
    let vm = place.serve(2, &["--macvtap", "lower,mode=passthru,netns=host,name=p0"]);
    assert_eq!(host.mac("p0"), own, "in passthru it is the lower's");
    assert!(place.net.far.pings(&addresses(2)[0], 3));
    host.ip(&format!("link set p0 address {MAC}"));
    assert_eq!(host.mac("lower"), MAC, "in passthru the lower's follows");
    terminate(vm);
    assert_eq!(host.links(), ["lower"]);
    assert_eq!(host.mac("lower"), own);

    let guest = place.guest(2, "mode=info");
    let spec = format!("lower,mode=passthru,mac={MAC}");
    let args = with(&guest, &["--macvtap", &spec]);
    is_refused(place.minivmm(&args), FAILED, &["passthru", MAC]);
    assert_eq!(host.mac("lower"), own);
});

guest_test!(lower_in_another_namespace_carries_the_guest, || {
    let place = Place::new();
    let elsewhere = Netns::new();
    let lower = place.net.host.path();
    let start = |keys: &str| {
        let spec = format!("lower,lower-netns={}{keys}", lower.display());
        let guest = place.guest(2, "mode=echo");
        let vm = place.until_it_serves(Vm::spawn(minivmm(
            &elsewhere,
            &with(&guest, &["--macvtap", &spec]),
        )));
        assert!(place.net.far.pings(&addresses(2)[0], 3));
        vm
    };
    place.net.quit(2, start(""));
    let vm = start(",netns=host,name=guest0");
    assert_eq!(elsewhere.links(), ["guest0"]);
    place.net.quit(2, vm);
    assert!(elsewhere.links().is_empty());
    assert_eq!(place.net.host.links(), ["lower"]);

    let guest = place.guest(2, "mode=info");
    let args = with(&guest, &["--macvtap", "lower,lower-netns=/run/netns/none"]);
    is_refused(minivmm(&elsewhere, &args), FAILED, &["/run/netns/none"]);
});
