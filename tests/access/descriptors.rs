//! Queues that another process has opened.

use super::*;

guest_test!(macvtap_of_ip_link_works_by_descriptor_with_its_mac, || {
    let place = Place::new();
    let node = place.macvtap("mine");
    let redirection = format!("3<>{}", node.display());
    let start = |options: &str| {
        let guest = place.guest(2, options);
        let args = with(&guest, &["--macvtap", "fd=3"]);
        Vm::spawn(place.redirected(&redirection, Stdio::null(), &args))
    };
    let console = guest::succeed(start("mode=info"));
    assert_eq!(mac_in_guest(&console), place.net.host.mac("mine"));

    let vm = place.until_it_serves(start("mode=echo"));
    for ip in addresses(2) {
        assert!(place.net.far.pings(&ip, 3), "{ip}\n{}", vm.transcript());
        assert_eq!(place.net.datagram(&ip, b"through fd 3"), b"through fd 3");
    }
    place.net.quit(2, vm);
    assert_eq!(place.net.host.links(), ["lower", "mine"], "it was not ours");
});

guest_test!(user_runs_a_guest_with_kvm_and_a_descriptor_alone, || {
    let place = Place::new();
    let node = place.macvtap("mine");
    // By a user without any capability, to whom not even the node is open.
    let script = format!(
        "{} 3<>{}",
        AS_ON_A_DESKTOP.trim_end(),
        node.to_str().unwrap()
    );
    let mut command = place.net.host.command("sh");
    command.args(["-ec", &script, "sh", "setpriv"]);
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.args([
        "--inh-caps=-all",
        "--bounding-set=-all",
        "--no-new-privs",
        "--",
    ]);
    command.arg(place.path("minivmm"));
    command
        .args(place.guest(2, "mode=echo"))
        .args(["--macvtap", "fd=3"])
        .env("FILES", place.files.path())
        .stdin(Stdio::null());
    let vm = place.until_it_serves(Vm::spawn(command));
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    assert_eq!(after(&status, "Uid:"), "65534");
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(after(&status, set), "0000000000000000", "{set}");
    }
    for ip in addresses(2) {
        assert!(place.net.far.pings(&ip, 3), "{ip}\n{}", vm.transcript());
    }
    place.net.quit(2, vm);
});

guest_test!(descriptor_of_another_kind_is_refused_with_its_kind, || {
    let place = Place::new();
    let guest = place.guest(2, "mode=info");
    let args = with(&guest, &["--macvtap", "fd=3"]);
    let command =
        |redirection: &str, inherited: Stdio| place.redirected(redirection, inherited, &args);
    let nothing = Stdio::null;
    is_refused(
        command("3<&-", nothing()),
        FAILED,
        &["fd 3 is not open", "3<>/dev/tap"],
    );
    is_refused(
        command("3</etc/passwd", nothing()),
        FAILED,
        &["fd 3 is a file, not a macvtap queue"],
    );
    is_refused(
        command("3</dev/null", nothing()),
        FAILED,
        &["fd 3 is some other device"],
    );
    let (socket, _other_end) = UnixStream::pair().unwrap();
    is_refused(
        command("3<&0", OwnedFd::from(socket).into()),
        FAILED,
        &["fd 3 is a socket, not a macvtap queue"],
    );
    let tun = place.net.host.tun("", libc::IFF_TUN | libc::IFF_NO_PI);
    is_refused(
        command("3<&0", tun.into()),
        FAILED,
        &["fd 3 belongs to", "a tun", "use a macvtap or a tap"],
    );
});

guest_test!(descriptor_with_keys_or_twice_is_refused, || {
    let place = Place::new();
    let node = place.macvtap("mine");
    let node = node.display();
    let guest = place.guest(2, "mode=info");
    let refused = |redirection: &str, options: &[&str], status: i32, texts: &[&str]| {
        let args = with(&guest, options);
        is_refused(
            place.redirected(redirection, Stdio::null(), &args),
            status,
            texts,
        );
    };
    let one = format!("3<>{node}");
    for keys in [
        "fd=3,mode=bridge",
        "fd=3,mac=02:00:00:00:00:01",
        "fd=3,netns=host",
    ] {
        refused(&one, &["--macvtap", keys], USAGE, &["fd= excludes"]);
    }
    for bad in ["fd=", "fd=x", "fd=-1"] {
        refused(
            &one,
            &["--macvtap", bad],
            USAGE,
            &["not the number of a file descriptor"],
        );
    }
    let twice = ["--macvtap", "fd=3", "--macvtap", "fd=3"];
    refused(&one, &twice, FAILED, &["fd 3 is given twice"]);
    // A copy of the queue, and another queue of the same macvtap.
    let shared = ["--macvtap", "fd=3", "--macvtap", "fd=4"];
    for other in ["4<&3".to_owned(), format!("4<>{node}")] {
        let both = format!("{one} {other}");
        refused(&both, &shared, FAILED, &["two NICs", "on mine"]);
    }
    let by_name = ["--macvtap", "mine", "--macvtap", "mine"];
    refused("3<&-", &by_name, FAILED, &["two NICs are on mine"]);
    let both = ["--macvtap", "fd=3", "--macvtap", "mine"];
    refused(&one, &both, FAILED, &["two NICs are on mine"]);
});

guest_test!(macvtap_of_a_running_guest_is_refused_to_a_second, || {
    let place = Place::new();
    place.macvtap("mine");
    let vm = place.serve(2, &["--macvtap", "mine"]);
    let guest = place.guest(3, "mode=info");
    let texts = [
        "mine (",
        &format!("(pid {})", vm.pid()),
        "a part of its frames",
    ];
    let second = with(&guest, &["--macvtap", "mine"]);
    is_refused(place.minivmm(&second), FAILED, &texts);
    let open = ["net", "open", "mine", "--user", "nobody", "--", "true"];
    is_refused(place.minivmm(&open), FAILED, &texts);
    // The first one has had all of its frames back since.
    assert!(place.net.far.pings(&addresses(2)[0], 3));
    kill(vm);
    guest::succeed(Vm::spawn(place.minivmm(&second)));
});
