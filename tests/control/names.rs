//! Names, and who finds whom by them.

use rustix::process::Signal;

use crate::harness::guest_test;
use crate::host::Host;
use crate::tiny::{POWER_OFF, Tiny};

guest_test!(vm_is_found_while_it_runs_and_leaves_nothing, || {
    let host = Host::new();
    assert_eq!(host.show(&["ps"]), "no VM runs\n");
    let mut web = host.start(&["--name", "web"]);
    let mut unnamed = host.start(&[]);
    let found = host.ps();
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!(found[0]["name"], "web");
    assert_eq!(found[0]["pid"], web.pid());
    assert_eq!(found[1]["name"], "vm1");
    assert!(found[0]["kernel"].as_str().unwrap().ends_with("/Echo"));
    assert_eq!(found[0]["qmp"][0], "/run/minivmm/vms/web/qmp.sock");

    let table = host.show(&["ps", "vm1"]);
    let lines: Vec<_> = table.lines().collect();
    let [head, line] = lines[..] else {
        panic!("{table}")
    };
    assert!(head.starts_with("NAME  PID"), "{table}");
    assert!(
        line.starts_with(&format!("vm1   {}", unnamed.pid())),
        "{table}"
    );

    for vm in [&mut web, &mut unnamed] {
        vm.send(POWER_OFF);
        assert_eq!(vm.wait_exit().code(), Some(0));
    }
    assert_eq!(host.show(&["ps"]), "no VM runs\n");
    assert!(host.left().is_empty(), "{:?}", host.left());
});

guest_test!(name_in_use_is_refused_with_its_holder, || {
    let host = Host::new();
    let vm = host.start(&["--name", "web"]);
    let kernel = host.kernel(Tiny::Greeter);
    let (status, log) = host.fail(&["--kernel", &kernel, "--name", "web"]);
    let holder = format!("the name web is in use by the VM of pid {}", vm.pid());
    assert!(status == 1 && log.contains(&holder), "{log}");
    assert!(log.contains("choose another one with --name"), "{log}");

    let (status, log) = host.fail(&["ps", "wbe"]);
    assert!(status == 1 && log.contains("these run: web"), "{log}");
});

guest_test!(name_of_a_killed_vm_is_free_again, || {
    let host = Host::new();
    for way in ["ps", "start"] {
        let mut vm = host.start(&["--name", "web"]);
        vm.signal(Signal::KILL);
        vm.wait_exit();
        assert!(host.left().contains(&"web".to_owned()), "{way}");
        if way == "ps" {
            assert!(host.ps().is_empty());
            assert!(host.left().is_empty(), "{:?}", host.left());
        }
    }
    let vm = host.start(&["--name", "web"]);
    assert_eq!(host.ps()[0]["pid"], vm.pid());
});

guest_test!(failed_start_leaves_nothing, || {
    let host = Host::new();
    let (status, log) = host.fail(&["--kernel", "/no/such/kernel", "--name", "web"]);
    assert!(status == 1 && log.contains("/no/such/kernel"), "{log}");
    assert!(host.left().is_empty(), "{:?}", host.left());
});

guest_test!(
    vm_that_can_have_no_directory_runs_on_unless_it_was_given_a_name,
    || {
        let host = Host::new();
        // In place of the directory of all VMs.
        std::fs::write(host.runtime.directory.path().join("vms"), "").unwrap();
        std::fs::create_dir(host.runtime.directory.path().join("0")).unwrap();
        std::fs::write(host.runtime.directory.path().join("0/vms"), "").unwrap();
        let kernel = host.kernel(Tiny::Greeter);
        let output = host.run(&["--kernel", &kernel]);
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(
            output.status.success() && log.contains("warn: this VM has no name"),
            "{log}"
        );
        assert_eq!(output.stdout, b"hi\n");
        let (status, log) = host.fail(&["--kernel", &kernel, "--name", "web"]);
        assert!(
            status == 1 && log.contains("cannot make the directory"),
            "{log}"
        );
    }
);
