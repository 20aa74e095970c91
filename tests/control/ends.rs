//! `stop` and `kill`.

use rustix::process::Signal;

use crate::harness::guest_test;
use crate::host::Host;
use crate::tiny::Tiny;

guest_test!(stop_waits_until_the_guest_has_powered_off, || {
    let host = Host::new();
    let mut vm = host.start_with(Tiny::Button, "ready\n", &["--name", "web"]);
    host.show(&["stop", "web"]);
    assert!(host.left().is_empty(), "{:?}", host.left());
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert!(vm.log().contains("the guest powered off"), "{}", vm.log());
});

guest_test!(stop_ends_a_guest_that_takes_no_notice, || {
    let host = Host::new();
    let mut vms = ["web", "db"].map(|name| host.start(&["--name", name]));
    let output = host.run(&["stop", "web", "db", "--timeout", "1"]);
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{log}");
    assert!(log.contains("web did not power off within 1 s"), "{log}");
    assert!(host.left().is_empty(), "{:?}", host.left());
    for vm in &mut vms {
        vm.wait_exit();
    }
});

guest_test!(kill_ends_at_once_and_by_force_what_does_not_answer, || {
    let host = Host::new();
    let mut sound = host.start(&["--name", "sound"]);
    let mut stopped = host.start(&["--name", "stopped"]);
    stopped.signal(Signal::STOP);
    host.show(&["kill", "sound", "stopped"]);
    assert!(host.left().is_empty(), "{:?}", host.left());
    sound.wait_exit();
    assert!(!stopped.wait_exit().success());
});

guest_test!(unknown_name_stops_nothing, || {
    let host = Host::new();
    let _vm = host.start(&["--name", "web"]);
    for command in ["stop", "kill"] {
        let (status, log) = host.fail(&[command, "web", "db"]);
        assert!(
            status == 1 && log.contains("no VM is called db: these run: web"),
            "{log}"
        );
    }
    host.await_state("running");
});
