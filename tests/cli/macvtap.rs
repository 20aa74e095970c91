//! Interfaces and keys that cannot be.

use super::*;

/// Asserts that the namespace's minivmm refuses `--macvtap VALUE` with this status and these texts,
/// and that there are no more links and device nodes than before.
#[track_caller]
fn assert_no_macvtap(host: &Netns, value: &str, status: i32, texts: &[&str]) {
    let files = Files::new();
    let (links, nodes) = (host.links(), tap_nodes());
    assert_refused(
        inside(host, &files.boot(&["--macvtap", value])),
        status,
        texts,
    );
    assert_eq!(host.links(), links, "--macvtap {value} left a link");
    // Other tests' guests come and go meanwhile: what stays is ours.
    let nothing_left = || tap_nodes().difference(&nodes).next().is_none();
    assert!(
        eventually(nothing_left),
        "--macvtap {value} left one of {:?}, before there was {nodes:?}",
        tap_nodes()
    );
}

#[test]
fn macvtap_value_that_makes_no_sense_is_refused() {
    let key = "keys are mode, mac, mtu";
    assert_bad_values(
        "--macvtap",
        &[
            ("", "empty"),
            (&"x".repeat(128), "128 bytes, and the kernel allows 127"),
            (
                "eth7,name=abcdefghijklmnop",
                "16 bytes, and the kernel allows 15",
            ),
            ("eth7,name=all", "cannot be the name of a new interface"),
            ("a/b", "cannot be the name"),
            ("eth7,colour=red", key),
            ("eth7,mode", "KEY=VALUE"),
            (
                "eth7,mode=hub",
                "choose bridge, vepa, private, passthru or source",
            ),
            ("eth7,mode=vepa,mode=vepa", "twice"),
            ("eth7,mac=01:00:5e:00:00:01", "multicast"),
            ("eth7,mac=ff:ff:ff:ff:ff:ff", "multicast"),
            ("eth7,mac=00:00:00:00:00:00", "choose another"),
            ("eth7,mac=52:54", "like 52:54:00:12:34:56"),
            ("eth7,mac=52:54:00:12:34:5g", "like 52:54:00:12:34:56"),
        ],
    );
}

#[test]
fn macvtaps_beyond_the_machines_places_are_refused() {
    let files = Files::new();
    for (transport, max, rng) in [("mmio", 18, "off"), ("pci", 31, "off"), ("pci", 31, "on")] {
        let mut args = vec!["--macvtap=nosuch0"; max + usize::from(rng == "off")];
        args.extend(["--transport", transport, "--rng", rng]);
        let words = [max + 1, max].map(|number| number.to_string());
        let words = [&*words[0], &*words[1], "--rng off"];
        assert_refused(files.boot(&args), FAILED, &words);
    }
}

guest_test!(macvtap_on_unknown_interface_is_refused_with_a_list, || {
    let host = Netns::new();
    assert_no_macvtap(
        &host,
        "eno1",
        FAILED,
        &["macvtap", "no network interface `eno1`"],
    );
    host.wire("eno1");
    assert_no_macvtap(&host, "eno2", FAILED, &["`eno2`", "did you mean `eno1`?"]);
});

guest_test!(macvtap_on_unfit_interface_is_refused_with_remedy, || {
    let host = Netns::new();
    assert_no_macvtap(
        &host,
        "lo",
        FAILED,
        &["`lo`", "loopback", "choose an Ethernet"],
    );

    host.wire("wire");
    host.down("wire");
    let remedy = "ip link set wire up";
    assert_no_macvtap(&host, "wire", FAILED, &["`wire` is down", remedy]);

    host.up("wire");
    host.bridge("br0", &["wire"]);
    let remedy = "ip link set wire nomaster";
    assert_no_macvtap(
        &host,
        "wire",
        FAILED,
        &["bridge `br0`", "use `br0` instead", remedy],
    );
});

guest_test!(macvtap_with_a_taken_mac_is_refused_with_who_has_it, || {
    let host = Netns::new();
    host.wire("wire");
    let value = format!("wire,mac={}", host.mac("wire"));
    assert_no_macvtap(
        &host,
        &value,
        FAILED,
        &["of `wire` itself", "choose another"],
    );

    host.macvlan("sibling", &host, "wire");
    let value = format!("wire,mac={}", host.mac("sibling"));
    assert_no_macvtap(
        &host,
        &value,
        FAILED,
        &["taken", "`sibling`", "choose another"],
    );

    // Another guest's macvtap is in a namespace that no path leads to.
    let files = Files::new();
    let running = files.path("running");
    Tiny::Echo.write(&running);
    let value = "wire,mac=52:54:00:12:34:56";
    let command = minivmm(["--kernel", &text(&running), "--macvtap", value]);
    let mut guest = Vm::spawn(inside(&host, &command));
    guest.wait_for("ready\n");
    assert_no_macvtap(
        &host,
        value,
        FAILED,
        &["taken", "another VM's", "choose another"],
    );
    guest.signal(Signal::KILL);
    guest.wait_exit();

    // Free again, as soon as the kernel has cleaned up after the killed one.
    let again = || run(inside(&host, &files.boot(&["--macvtap", value])));
    let freed = (0..50).any(|_| {
        thread::sleep(Duration::from_millis(20));
        again().status == Some(0)
    });
    assert!(freed, "{:?}", again());
});

guest_test!(machine_with_all_that_it_can_have_runs, || {
    let host = Netns::new();
    host.wire("wire");
    let files = Files::new();
    let most = [&["--cpus=254"], &["--macvtap=wire"; 18][..]].concat();
    let guest = run(inside(&host, &files.boot(&most)));
    assert_eq!(
        (guest.status, guest.stdout.as_str()),
        (Some(0), "hi\n"),
        "{guest:?}"
    );
});

guest_test!(second_macvtap_that_fails_takes_the_first_away, || {
    let host = Netns::new();
    host.wire("wire");
    let files = Files::new();
    let mac = "52:54:00:ab:cd:ef";
    let nic = format!("--macvtap=wire,mac={mac}");
    assert_refused(
        inside(&host, &files.boot(&[&nic, "--macvtap=lo"])),
        FAILED,
        &["`lo`"],
    );
    // The address is free again, for a guest too.
    let guest = run(inside(&host, &files.boot(&[&nic])));
    assert_eq!(
        (guest.status, guest.stdout.as_str()),
        (Some(0), "hi\n"),
        "{guest:?}"
    );
    assert!(guest.stderr.contains(mac), "{guest:?}");
    assert_eq!(host.links().len(), 2, "{:?}", host.links());
});
