//! One NIC for one interface: who gets it when several want it, and until when.

use super::*;

/// What is said to who comes second.
const REFUSED: &str = "a part of its frames";

/// Waits until all of `vms` but one have been refused, and returns that one.
#[track_caller]
fn only_one_stays(mut vms: Vec<Vm>) -> Vm {
    let one_is_left = eventually(|| {
        vms.retain_mut(|vm| {
            let has_ended = vm.has_ended();
            if has_ended {
                assert_eq!(vm.wait_exit().code(), Some(FAILED));
                assert!(vm.log().contains(REFUSED), "{}", vm.transcript());
            }
            !has_ended
        });
        vms.len() == 1
    });
    assert!(one_is_left, "{} of them run", vms.len());
    vms.pop().expect("not all are refused")
}

guest_test!(one_of_many_starters_gets_an_existing_macvtap, || {
    let place = Place::new();
    let node = place.macvtap("mine");
    let redirection = format!("3<>{}", node.display());
    let guest = place.guest(2, "mode=echo");
    let by_name = with(&guest, &["--macvtap", "mine"]);
    let by_descriptor = with(&guest, &["--macvtap", "fd=3"]);
    let say_and_stay = ["sh", "-c", "echo READY echo; exec sleep 600"];
    let open = [
        &["net", "open", "mine", "--user", "nobody", "--"][..],
        &say_and_stay,
    ]
    .concat();
    for count in [4, 8, 4, 8, 4, 8] {
        let start = |n: usize| match n % 4 {
            0 | 1 => place.minivmm(&by_name),
            2 => place.redirected(&redirection, Stdio::null(), &by_descriptor),
            _ => place.minivmm(&open),
        };
        let vms = (0..count).map(|n| Vm::spawn(start(n))).collect();
        let mut vm = only_one_stays(vms);
        vm.wait_for("READY echo\n");
        // The kernel alone releases the winner's claim.
        kill(vm);
    }
    assert_eq!(place.net.host.links(), ["lower", "mine"]);
});

guest_test!(guests_of_two_pid_namespaces_are_both_known, || {
    let place = Place::new();
    place.macvtap("mine");
    let command = |number: u8, macvtap: &str| {
        let guest = place.guest(number, "mode=echo");
        let mut command = place.net.host.command("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
        command
            .arg(binary())
            .args(with(&guest, &["--macvtap", macvtap]));
        command.env_remove("RUST_LOG").stdin(Stdio::null());
        command
    };
    let start = |number, macvtap| place.until_it_serves(Vm::spawn(command(number, macvtap)));
    let first = start(2, "lower");
    let second = start(3, "mine");
    let listed = || {
        let listing = succeeds(place.minivmm(&["net", "list", "lower"]));
        listing.matches("guest of pid 1,").count()
    };
    assert_eq!(listed(), 2);
    is_refused(command(4, "mine"), FAILED, &["mine (", "(pid 1)", REFUSED]);
    place.net.quit(2, first);
    assert_eq!(listed(), 1);
    is_refused(command(4, "mine"), FAILED, &["mine (", "(pid 1)", REFUSED]);
    place.net.quit(3, second);
    assert_eq!(listed(), 0);
});

guest_test!(macvtap_is_in_use_while_a_child_has_its_queue, || {
    let place = Place::new();
    place.macvtap("mine");
    let script = "sleep 600 >/dev/null 2>&1 & echo child=$!; wait";
    let open = [
        "net", "open", "mine", "--user", "nobody", "--", "sh", "-c", script,
    ];
    let mut vm = Vm::spawn(place.minivmm(&open));
    vm.wait_for("child=");
    let child: i32 = vm.wait_for("\n").trim().parse().unwrap();
    let child = pidfd_open(Pid::from_raw(child).unwrap(), PidfdFlags::empty()).unwrap();
    vm.signal(Signal::KILL);
    vm.wait_exit();
    let guest = place.guest(2, "mode=info");
    let args = with(&guest, &["--macvtap", "mine"]);
    is_refused(place.minivmm(&args), FAILED, &["mine (", REFUSED]);
    let listing = succeeds(place.minivmm(&["net", "list", "lower"]));
    assert!(listing.contains("program of pid"), "{listing}");
    rustix::process::pidfd_send_signal(&child, Signal::KILL).unwrap();
    let has_started = eventually(|| {
        let run = run(place.minivmm(&args));
        run.status.code() == Some(0)
    });
    assert!(has_started);
});

guest_test!(of_two_minivmm_in_one_net_open_one_gets_the_nic, || {
    let place = Place::new();
    place.macvtap("mine");
    let program = place.path("minivmm");
    let guest = place.guest(2, "mode=echo");
    let inner = with(&guest, &["--macvtap", "fd=3"]);
    // A shell between does not matter.
    let script = "\"$0\" \"$@\" & \"$0\" \"$@\" & wait";
    for (spec, user) in [("lower", USER), ("mine", USER), ("mine", "root")] {
        let open = [
            "net", "open", spec, "--user", user, "--", "sh", "-c", script,
        ];
        let args = [&open[..], &[program.to_str().unwrap()], &inner].concat();
        let vm = place.until_it_serves(Vm::spawn(place.minivmm_on_a_desktop(&args)));
        vm.wait_for_log(REFUSED);
        assert_eq!(vm.log().matches(REFUSED).count(), 1, "{}", vm.transcript());
        assert!(
            place.net.far.pings(&addresses(2)[0], 3),
            "{}",
            vm.transcript()
        );
        let listing = succeeds(place.minivmm(&["net", "list", "lower"]));
        assert_eq!(listing.matches(" of pid ").count(), 1, "{listing}");
        let says = format!("(says user {USER_ID})");
        assert_eq!(listing.contains(&says), user == USER, "{listing}");
        place.net.quit(2, vm);
    }
});

guest_test!(nic_that_cannot_be_recorded_is_warned_of, || {
    let place = Place::new();
    place.macvtap("mine");
    // `ip netns exec` has made a mount namespace.
    let read_only = "mkdir -p /run/minivmm; mount -t tmpfs -o ro none /run/minivmm; exec \"$@\"";
    for (macvtap, effect) in [("lower", "does not show it"), ("mine", REFUSED)] {
        let guest = place.guest(2, "mode=info");
        let mut command = place.net.host.command("sh");
        command.args(["-ec", read_only, "sh"]).arg(binary());
        command
            .args(with(&guest, &["--macvtap", macvtap]))
            .stdin(Stdio::null());
        command.env_remove("RUST_LOG").env_remove("XDG_RUNTIME_DIR");
        let run = run(command);
        assert_eq!(run.status.code(), Some(0), "{run:?}");
        let warnings: Vec<_> = run
            .stderr
            .lines()
            .filter(|line| line.contains("warn: "))
            // The VM itself has no place either.
            .filter(|line| !line.contains("this VM has no name"))
            .collect();
        let [warning] = warnings[..] else {
            panic!("{run:?}")
        };
        for text in ["cannot be recorded", effect, "Read-only file system"] {
            assert!(warning.contains(text), "no {text:?} in {warning}");
        }
    }
});

guest_test!(list_shows_current_names_and_mtus, || {
    let place = Place::new();
    let host = &place.net.host;
    let vm = place.serve(2, &["--macvtap", "lower"]);
    let say = ["sh", "-c", "echo up; exec sleep 600"];
    let open = ["net", "open", "lower", "--user", "nobody", "--"];
    let mut program = Vm::spawn(place.minivmm(&[&open[..], &say].concat()));
    program.wait_for("up\n");
    host.ip("link set lower mtu 1300");
    host.down("lower");
    host.ip("link set lower name wan0");
    host.up("wan0");
    let listing = || succeeds(place.minivmm(&["net", "list", "wan0"]));
    let is_listed = || {
        let text = listing();
        let nics: Vec<_> = text
            .lines()
            .filter(|line| line.contains(" on wan0  "))
            .collect();
        nics.len() == 2 && nics.iter().all(|nic| nic.contains("  mtu 1300  "))
    };
    assert!(eventually(is_listed), "{}", listing());
    // A macvtap's follows its lower's down alone. A guest's is watched, so that this is known of
    // it.
    host.ip("link set wan0 mtu 1200");
    host.ip("link set wan0 mtu 1500");
    let is_listed = || {
        let text = listing();
        text.lines()
            .any(|line| line.contains(" on wan0  ") && line.contains("  mtu 1200  "))
    };
    assert!(eventually(is_listed), "{}", listing());
    kill(program);
    kill(vm);
});
