//! What the programs of `minivmm net open` get besides the queue: a user's rights and nothing of
//! root's.

use super::*;

/// Has every capability, in the sets that outlive a change of user too.
const WITH_AMBIENT: [&str; 5] = [
    "setpriv",
    "--inh-caps=+chown,+dac_override,+setgid,+setuid,+setpcap,+net_admin,+net_raw,+sys_admin,+mknod",
    "--ambient-caps=+chown,+dac_override,+setgid,+setuid,+setpcap,+net_admin,+net_raw,+sys_admin,+mknod",
    "--securebits=+no_setuid_fixup",
    "--",
];
/// The same as an ordinary user.
const NOBODY_WITH_AMBIENT: [&str; 7] = [
    "setpriv",
    "--reuid=nobody",
    "--regid=nogroup",
    "--clear-groups",
    "--inh-caps=+chown,+dac_override,+setgid,+setuid,+setpcap,+net_admin,+net_raw,+sys_admin,+mknod",
    "--ambient-caps=+chown,+dac_override,+setgid,+setuid,+setpcap,+net_admin,+net_raw,+sys_admin,+mknod",
    "--",
];
const SETS: [&str; 5] = ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"];
const NONE: &str = "0000000000000000";

guest_test!(program_of_a_user_never_has_a_capability, || {
    let place = Place::new();
    let status = ["--", "cat", "/proc/self/status"];
    for netns in ["private", "host"] {
        let spec = format!("lower,netns={netns}");
        for (way, user) in [
            (&WITH_AMBIENT[..], &["--user", USER][..]),
            (&NOBODY_WITH_AMBIENT, &["--user", USER]),
            (&NOBODY_WITH_AMBIENT, &[]),
        ] {
            let args = [&[spec.as_str()], user, &status].concat();
            let shown = succeeds(place.open_by(way, &args));
            for set in SETS {
                assert_eq!(after(&shown, set), NONE, "{set} {args:?} {shown}");
            }
            assert_eq!(after(&shown, "NoNewPrivs:"), "1", "{shown}");
        }
    }
});

guest_test!(program_inherits_only_the_descriptors_passed_to_it, || {
    let place = Place::new();
    let way = [
        "bash",
        "-c",
        "exec 3</etc/passwd 10</etc/passwd 251</etc/passwd; exec \"$@\"",
        "bash",
    ];
    let script = "for fd in 3 4 5 10 251; do [ -e /proc/$$/fd/$fd ] && echo has $fd; done; :";
    for netns in ["private", "host"] {
        let spec = format!("lower,netns={netns}");
        let args = [&spec, "--user", USER, "--", "sh", "-c", script];
        // The queue, the socket that watches, and the lock of its record.
        let shown = succeeds(place.open_by(&way, &args));
        assert_eq!(shown, "has 3\nhas 4\nhas 5\n");
    }
});

guest_test!(program_does_not_mistake_the_queue_for_its_socket, || {
    let place = Place::new();
    for netns in ["private", "host"] {
        let spec = format!("lower,netns={netns}");
        // LISTEN_PID is right where minivmm becomes the program.
        let way = [
            "sh",
            "-c",
            "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=web exec \"$@\"",
            "sh",
        ];
        let shown = succeeds(place.open_by(&way, &[&spec, "--user", USER, "--", "env"]));
        assert!(shown.contains("MINIVMM_NET_FDS=3\n"), "{shown}");
        assert!(!shown.contains("LISTEN_"), "{shown}");
    }
});

guest_test!(user_is_a_name_or_a_number_with_or_without_a_group, || {
    let place = Place::new();
    let (id, more) = (USER_ID, USER_ID + 1);
    let groups = format!("{USER}:{USER}-more");
    for (user, expected) in [
        ("65534", "65534 65534 65534 nobody /nonexistent".to_owned()),
        ("nobody", "65534 65534 65534 nobody /nonexistent".to_owned()),
        // In two groups, known by name.
        (&id.to_string(), format!("{id} {id} {id} {more} {USER} /")),
        // The group that is chosen is the first one.
        (&groups, format!("{id} {more} {more} {USER} /")),
        (
            &format!("{USER}:65534"),
            format!("{id} 65534 65534 {more} {USER} /"),
        ),
        // In no file.
        ("4711", "4711 4711 4711 4711 /".to_owned()),
        ("4711:4712", "4711 4712 4712 4711 /".to_owned()),
    ] {
        let script = "echo $(id -u) $(id -g) $(id -G) $USER $HOME";
        let args = ["lower", "--user", user, "--", "sh", "-c", script];
        let shown = succeeds(place.open_by(&["env"], &args));
        assert_eq!(shown.trim(), expected, "{user}");
    }
    // The kernel takes the last for "leave it as it is", which is root here.
    for user in [
        "no-such-user",
        "nobody:no-such-group",
        "4294967295",
        "1:4294967295",
        "-1",
        "",
    ] {
        let user = format!("--user={user}");
        let args = ["lower", &user, "--", "true"];
        is_refused(place.open_by(&["env"], &args), FAILED, &["there is no "]);
    }
});

guest_test!(caller_of_sudo_is_believed_by_root_alone, || {
    let place = Place::new();
    let args = ["lower", "--", "id", "-u"];
    let sudo = format!("SUDO_USER={USER}");
    let by_sudo = succeeds(place.open_by(&["env", &sudo], &args));
    assert_eq!(by_sudo.trim(), USER_ID.to_string());
    let way = [&["env", &sudo][..], &NOBODY_WITH_AMBIENT].concat();
    assert_eq!(succeeds(place.open_by(&way, &args)).trim(), "65534");
});

guest_test!(program_that_cannot_be_run_gives_a_shells_status, || {
    let place = Place::new();
    for netns in ["private", "host"] {
        let spec = format!("lower,mac={MAC},netns={netns}");
        for (program, status, text) in [
            ("/no/such/program", 127, "No such file"),
            ("no-such-program", 127, "No such file"),
            ("/etc/passwd", 126, "Permission denied"),
        ] {
            let texts = [&format!("cannot run {program:?}")[..], text];
            let args = ["net", "open", &spec, "--user", "nobody", "--", program];
            // In a directory that the user may not search it might be.
            let mut minivmm = place.minivmm(&args);
            minivmm.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
            is_refused(minivmm, status, &texts);
            assert_eq!(place.net.host.links(), ["lower"]);
            assert!(place.mac_gets_free(), "{args:?}");
        }
    }
});

guest_test!(guest_runs_without_the_socket_that_watches, || {
    let place = Place::new();
    let program = place.path("minivmm");
    for redirection in ["4<&-", "4</dev/null"] {
        let guest = place.guest(2, "mode=info");
        let script = format!("exec \"$@\" {redirection}");
        let inner = with(&guest, &["--macvtap", "fd=3"]);
        let program = [program.to_str().unwrap()];
        let outer = ["lower", "--", "sh", "-c", &script, "sh"];
        let args = [&outer[..], &program, &inner].concat();
        let mut vm = Vm::spawn(place.open_by(&["env"], &args));
        assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
        vm.wait_for_log("cannot watch macvtap0");
    }
});

/// A program that starts another one, prints its pid, and waits for it.
const WRAPPER: &str = "sh -c 'trap \"\" HUP; echo pid=$$; exec sleep 1000' & wait";

guest_test!(netns_host_program_and_its_children_end_with_us, || {
    let place = Place::new();
    for signal in [Signal::TERM, Signal::KILL] {
        let spec = format!("lower,mac={MAC},netns=host");
        let args = [&spec, "--user", USER, "--", "sh", "-c", WRAPPER];
        let mut vm = Vm::spawn(place.open_by(&["env"], &args));
        vm.wait_for("pid=");
        let pid: u32 = vm.wait_for("\n").trim().parse().unwrap();
        vm.signal(signal);
        let ended = eventually(|| !is_running(pid));
        if !ended {
            let _ = rustix::process::kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL);
        }
        assert!(ended, "after {signal:?}");
        vm.wait_exit();
        succeeds(place.minivmm(&["net", "gc"]));
        assert!(place.mac_gets_free(), "after {signal:?}");
    }
});
