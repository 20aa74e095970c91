//! What `minivmm doctor` finds, and `net list` beside it.

use std::os::unix::fs::PermissionsExt;

use super::*;

/// A line of `doctor` with its status and message.
fn check<'a>(checks: &'a Value, name: &str) -> &'a Value {
    find(checks, "check", &name.into()).unwrap_or_else(|| panic!("no {name} in {checks:#}"))
}

/// What `doctor` says, as JSON, and its exit status. The text must be the same, one line a check.
fn doctor(netns: &Netns, link: Option<&str>) -> (Option<i32>, Value) {
    let args: Vec<&str> = std::iter::once("doctor").chain(link).collect();
    let (status, text) = minivmm(netns, &args);
    let (json_status, json) = minivmm(netns, &[&args[..], &["--json"]].concat());
    assert_eq!(status, json_status);
    let checks: Value = serde_json::from_str(&json).unwrap_or_else(|e| panic!("{e}: {json}"));
    let all = checks.as_array().expect("an array");
    assert_eq!(text.lines().count(), all.len(), "{text}\n{checks:#}");
    for (line, check) in text.lines().zip(all) {
        let (status, name) = (
            check["status"].as_str().expect("a string"),
            check["check"].as_str().expect("a string"),
        );
        // Nodes are one directory for all namespaces: those of other tests come and go in between.
        let begin = match name {
            "device nodes" => String::new(),
            _ => format!("{status:4}  {name}: "),
        };
        assert!(line.starts_with(&begin), "{line:?} is not {check}");
        assert!(["ok", "warn", "fail"].contains(&status), "{check}");
        if status != "ok" {
            println!("{line}");
        }
    }
    let fails = all.iter().any(|check| check["status"] == "fail");
    assert_eq!(status, Some(i32::from(fails)), "{text}");
    (status, checks)
}

/// Fails unless the check has the status, and its message and remedy have these words.
fn expect(checks: &Value, name: &str, status: &str, message: &str, remedy: &str) {
    let found = check(checks, name);
    let has = |key: &str, words: &str| found[key].as_str().unwrap_or_default().contains(words);
    assert!(
        found["status"] == status && has("message", message) && has("remedy", remedy),
        "expected {status}, {message:?} and {remedy:?} in {found:#}"
    );
}

guest_test!(doctor_finds_a_sound_host_and_link_sound, || {
    let net = Net::new();
    let (status, checks) = doctor(&net.host, None);
    assert_eq!(status, Some(0), "{checks:#}");
    expect(&checks, "links", "ok", "lower", "");
    expect(&checks, "macvtap driver", "ok", "", "");
    expect(&checks, "privileges", "ok", "", "");
    for name in ["kvm", "vhost-net", "device nodes", "leaked links"] {
        check(&checks, name);
    }
    let (status, checks) = doctor(&net.host, Some("lower"));
    assert_eq!(status, Some(0), "{checks:#}");
    for name in [
        "link",
        "wifi",
        "membership",
        "uppers",
        "state",
        "carrier",
        "mtu",
        "vlans",
        "macvtaps",
        "duplicate MACs",
        "vepa",
        "running guests",
        "leaked links",
    ] {
        expect(&checks, name, "ok", "", "");
    }
});

root_test!(doctor_says_what_is_amiss_with_a_link_and_the_remedy, || {
    let net = Net::new();
    let host = &net.host;
    let fails = |link: &str| {
        let (status, checks) = doctor(host, Some(link));
        assert_eq!(status, Some(1), "{link}: {checks:#}");
        checks
    };
    expect(&fails("lo"), "link", "fail", "loopback", "choose");
    let remedy = "network namespace";
    expect(&fails("nosuch"), "link", "fail", "`nosuch`", remedy);

    net.far.down("wire");
    let (_, checks) = doctor(host, Some("lower"));
    expect(&checks, "carrier", "warn", "no carrier", "cable");
    host.down("lower");
    let remedy = "ip link set lower up";
    expect(&fails("lower"), "state", "fail", "is down", remedy);
    // A macvtap on a macvlan goes straight onto what is under it.
    host.ip("link add link lower name mv0 type macvlan mode bridge");
    expect(&fails("mv0"), "state", "fail", "`lower` is down", remedy);
    host.up("lower");
    net.far.up("wire");
    let (status, checks) = doctor(host, Some("mv0"));
    assert_eq!(status, Some(0), "{checks:#}");
    host.ip("link delete mv0");

    host.ip("link set lower mtu 1000");
    let (_, checks) = doctor(host, Some("lower"));
    expect(&checks, "mtu", "warn", "1000", "mtu 1500");
    host.ip("link set lower mtu 1500");

    host.bridge("br0", &["lower"]);
    let remedy = "`br0`";
    expect(&fails("lower"), "membership", "fail", "bridge", remedy);
    host.ip("link delete br0");

    if host.add_if_supported("link lower name ipv0 type ipvlan") {
        expect(&fails("lower"), "uppers", "fail", "ipv0", "ip link delete");
        expect(&fails("ipv0"), "link", "fail", "ipvlan", "without ipvlan");
    }
});

root_test!(doctor_warns_of_macvtaps_that_block_each_other, || {
    let net = Net::new();
    let host = &net.host;
    host.macvtap("vepa0", "lower", "vepa");
    let (_, checks) = doctor(host, Some("lower"));
    expect(&checks, "vepa", "ok", "", "");
    host.macvtap("vepa1", "lower", "vepa");
    let (_, checks) = doctor(host, Some("lower"));
    expect(&checks, "vepa", "warn", "`vepa0`", "mode bridge");
    // The remedy is a command that works.
    for link in ["vepa0", "vepa1"] {
        host.ip(&format!("link set {link} type macvtap mode bridge"));
    }
    let (_, checks) = doctor(host, Some("lower"));
    expect(&checks, "vepa", "ok", "", "");

    let mac = host.mac("vepa0");
    host.ip(&format!(
        "link add link lower name twin address {mac} type macvtap mode bridge"
    ));
    let (_, checks) = doctor(host, Some("lower"));
    expect(&checks, "duplicate MACs", "warn", &mac, "delete the one");

    for link in ["twin", "vepa0", "vepa1"] {
        host.ip(&format!("link delete {link}"));
    }
    host.macvtap("alone", "lower", "passthru");
    let (_, checks) = doctor(host, None);
    let remedy = "ip link delete alone";
    expect(&checks, "macvtaps", "warn", "passthru", remedy);
    // Another one on it could not be started.
    let (status, checks) = doctor(host, Some("lower"));
    assert_eq!(status, Some(1));
    expect(&checks, "macvtaps", "fail", "passthru", "end that");
    // It can be used itself.
    let (status, checks) = doctor(host, Some("alone"));
    assert_eq!(status, Some(0), "{checks:#}");
});

guest_test!(doctor_and_list_know_private_macvtaps, || {
    let net = Net::new();
    let mut vm = net.start_on("lower,mode=vepa", 2, "mode=hlt");
    vm.wait_for("OK hlt");
    let (_, checks) = doctor(&net.host, Some("lower"));
    expect(&checks, "vepa", "ok", "", "");
    let mut other = net.start_on(&format!("lower,mac={MAC}"), 3, "mode=hlt");
    other.wait_for("OK hlt");
    let (_, checks) = doctor(&net.host, Some("lower"));
    let own = format!("of pid {}`", vm.pid());
    expect(&checks, "vepa", "warn", &own, "bridge mode");
    // Down, it can have an address that is taken.
    net.host.ip(&format!(
        "link add link lower name twin address {MAC} type macvtap mode bridge"
    ));
    let (_, checks) = doctor(&net.host, Some("lower"));
    let remedy = "ip link set twin address";
    expect(&checks, "duplicate MACs", "warn", MAC, remedy);
    for (mut vm, lowers) in [(vm, 1), (other, 0)] {
        vm.signal(Signal::KILL);
        vm.wait_exit();
        let listing = show_json(&net.host, &["net", "list", "lower", "--json"]);
        let guests = listing["guests"].as_array().expect("an array");
        assert_eq!(guests.len(), lowers, "{listing}");
    }

    net.host.ip("link delete twin");
    // The kernel takes the macvtaps of the killed away in its own time.
    await_some("lower of its own", || {
        let add = "ip link add link lower name probe type macvlan mode passthru";
        let done = net.host.exec(&add.split(' ').collect::<Vec<_>>());
        done.status.success().then_some(())
    });
    net.host.ip("link delete probe");
    let mut vm = net.start_on("lower,mode=passthru", 2, "mode=hlt");
    vm.wait_for("OK hlt");
    let (_, checks) = doctor(&net.host, Some("lower"));
    let taker = format!("of pid {}` alone", vm.pid());
    expect(&checks, "macvtaps", "fail", &taker, "end that");
    let (_, checks) = doctor(&net.host, None);
    let remedy = format!("end the process {}", vm.pid());
    expect(&checks, "macvtaps", "warn", "passthru", &remedy);
});

guest_test!(stale_link_of_a_killed_monitor_is_shown_and_deleted, || {
    let net = Net::new();
    let mut vm = net.start_on("lower,netns=host,name=vm0", 2, "mode=hlt");
    vm.wait_for("OK hlt");
    let (_, checks) = doctor(&net.host, Some("lower"));
    expect(&checks, "leaked links", "ok", "", "");
    assert_eq!(show(&net.host, &["net", "gc"]), "", "a live one stays");

    vm.signal(Signal::KILL);
    vm.wait_exit();
    let (_, checks) = doctor(&net.host, Some("lower"));
    let pid = format!("pid {}", vm.pid());
    expect(&checks, "leaked links", "warn", &pid, "vm0");
    let text = show(&net.host, &["net", "list"]);
    assert!(
        text.contains(&format!("({pid}), which has ended: minivmm net gc")),
        "{text}"
    );
    let text = show(&net.host, &["net", "gc"]);
    assert!(text.starts_with("deleted vm0 (macvtap)"), "{text}");
    assert_eq!(net.host.links(), ["lower"]);
    let (_, checks) = doctor(&net.host, Some("lower"));
    expect(&checks, "leaked links", "ok", "", "");
});

root_test!(doctor_warns_of_a_node_of_another_namespaces_macvtap, || {
    let [one, other] = [Net::new(), Net::new()];
    // Interface indexes repeat across namespaces, the names of nodes in /dev do not.
    // Another run of this test may be under way.
    let index = 2_000_000 + std::process::id();
    for net in [&one, &other] {
        net.host.ip(&format!(
            "link add link lower name mt0 index {index} type macvtap mode bridge"
        ));
        net.host.up("mt0");
    }
    let misled = [&one, &other].map(|net| {
        let (_, checks) = doctor(&net.host, None);
        let found = check(&checks, "device nodes");
        let message = found["message"].as_str().expect("a string");
        message.contains(&format!("/dev/tap{index} is not `mt0`"))
            && found["remedy"]
                .as_str()
                .is_some_and(|text| text.contains("by their names"))
    });
    assert_eq!(
        misled.iter().filter(|misled| **misled).count(),
        1,
        "{misled:?}"
    );
});

root_test!(doctor_fails_without_a_usable_kvm, || {
    // In a mount namespace of its own, /dev/kvm is something else.
    let script = r#"mount --bind /dev/null /dev/kvm && exec "$0" doctor"#;
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script]).arg(vm::binary());
    let output = command.output().expect("unshare starts");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.starts_with("fail  kvm: "), "{text}");
    let script = r#"mount --bind /dev/null /dev/kvm && exec "$0" doctor --json"#;
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script]).arg(vm::binary());
    let output = command.output().expect("unshare starts");
    let checks: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    expect(&checks, "kvm", "fail", "KVM", "c 10 232");
});

// Root of a user namespace has all capabilities, and none that counts for devices or for other
// networks.
root_test!(user_namespace_is_named_by_doctor_and_the_start, || {
    let net = Net::new();
    let link = "ip link add v0 type veth peer name v1 && ip link set v0 up && ip link set v1 up";
    // In a network of its own nothing is missing until the device is to be opened.
    let own = format!("{link} && lower=v0");
    let devices = "CAP_SYS_ADMIN and CAP_MKNOD in the initial one";
    let network = "CAP_NET_ADMIN is needed in the one that owns it";
    // Group and user 65534, which is nobody outside.
    let nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups";
    // Where user nobody can start it.
    let directory = tempfile::tempdir().expect("a directory");
    let world = fs::Permissions::from_mode(0o755);
    fs::set_permissions(directory.path(), world).expect("it is ours");
    let program = directory.path().join("minivmm");
    vm::copy_program(vm::binary(), &program);
    for (unshare, prepare, missing) in [
        ("unshare -Ur", "lower=lower", network),
        ("unshare -Urn", &own, devices),
        (&format!("{nobody} unshare -Ur"), "lower=lower", network),
        (&format!("{nobody} unshare -Urn"), &own, devices),
        (&format!("{nobody} unshare -Urnm"), &own, devices),
    ] {
        let script = format!(
            r#"{prepare} || exit 99; "$0" net open $lower -- true; echo "start $?"; "$0" doctor $lower; echo "doctor $?""#
        );
        let mut words = unshare.split(' ');
        let mut command = net.host.command(words.next().expect("a word"));
        command
            .args(words)
            .args(["sh", "-c", &script])
            .arg(&program);
        let output = command.output().expect("it starts");
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(
            text.contains("start 1\n") && text.contains("doctor 1\n"),
            "{unshare}: {text}"
        );
        let error = text
            .lines()
            .find(|line| line.contains("error: "))
            .expect("an error");
        assert!(error.contains(missing), "{unshare}: {text}");
        assert!(
            !error.contains("/sys") && !error.contains("chown"),
            "{unshare}: {text}"
        );
        let line = text.lines().find(|line| line.contains("  privileges: "));
        let line = line.expect("a check");
        assert!(
            line.starts_with("fail") && line.contains(missing),
            "{unshare}: {text}"
        );
    }
});
