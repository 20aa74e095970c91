//! Ends: killed processes, signals, refusals and failures of QEMU, and what is left of each.

use super::*;

tcg_test!(nothing_is_left_when_either_process_is_killed, || {
    let site = Site::new();
    let mac = "02:aa:00:00:00:0c";
    for (placement, victim, user) in [
        ("private", "minivmm", "root"),
        ("private", "minivmm", "nobody"),
        ("private", "qemu", "root"),
        ("host", "qemu", "root"),
        ("host", "minivmm", "nobody"),
    ] {
        let nic = format!("wire,mac={mac},netns={placement}");
        let args = ["--macvtap", &nic, "--", "-M", "q35", "-nodefaults", "-S"];
        let mut command = site.qemu(args);
        command.args(["-display", "none", "-accel", "tcg", "-serial", "stdio"]);
        if user != "root" {
            // The kernel forgets at a change of user what QEMU is to die with.
            command.args(["-runas", user]);
        }
        let mut vm = Vm::spawn(command);
        let qemu = wait_for_qemu(vm.pid());
        let is_users = || {
            let status = fs::read_to_string(format!("/proc/{qemu}/status")).unwrap_or_default();
            status.contains("\nUid:\t0\t") == (user == "root")
        };
        assert!(eventually(is_users), "QEMU does not take its user");
        assert!(!site.mac_is_free(mac), "in use while QEMU runs");
        let links = site.host.links().len();
        assert_eq!(links, if placement == "host" { 2 } else { 1 });
        if victim == "qemu" {
            kill_process(Pid::from_raw(qemu as i32).unwrap(), Signal::KILL).unwrap();
            let status = vm.wait_exit();
            assert_eq!(status.code(), Some(137), "{}", vm.log());
            assert!(vm.log().contains("killed by signal 9"), "{}", vm.log());
        } else {
            vm.signal(Signal::KILL);
            vm.wait_exit();
        }
        let gone = || !Path::new(&format!("/proc/{qemu}")).exists();
        assert!(eventually(gone), "QEMU lives on");
        if (placement, victim) == ("host", "minivmm") {
            // The next start deletes it, or this command.
            assert_eq!(site.host.links().len(), 2);
            let gc = site
                .host
                .exec(&[&binary().display().to_string(), "net", "gc"]);
            assert!(gc.status.success(), "{}", text(&gc.stderr));
            assert!(text(&gc.stdout).contains("deleted"), "{}", text(&gc.stdout));
        }
        assert!(eventually(|| site.mac_is_free(mac)), "the macvtap is left");
        assert_eq!(site.host.links(), ["wire"]);
    }
});

tcg_test!(signals_reach_a_qemu_of_args_alone, || {
    let site = Site::new();
    // QEMU ends by the first three itself, and calls that a success.
    for (signal, code) in [
        (Signal::TERM, 0),
        (Signal::HUP, 0),
        (Signal::INT, 0),
        (Signal::QUIT, 131),
    ] {
        let mut command = site.qemu(["--macvtap", "wire", "--", "-M", "q35", "-nodefaults", "-S"]);
        command.args(["-display", "none", "-accel", "tcg", "-monitor", "stdio"]);
        let mut vm = Vm::spawn(command);
        vm.wait_for("(qemu)");
        // The prompt comes before QEMU is ready for signals, the answer after.
        vm.send("info status\n");
        vm.wait_for("VM status");
        vm.signal(signal);
        assert_eq!(vm.wait_exit().code(), Some(code), "{signal:?}");
        let words = match signal {
            Signal::QUIT => "killed by signal 3".to_owned(),
            _ => format!("terminating on signal {}", signal.as_raw()),
        };
        assert!(vm.log().contains(&words), "{}", vm.log());
    }
});

tcg_test!(refusals_say_what_is_wrong_and_leave_nothing, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (script, old) = (dir.path().join("text"), dir.path().join("qemu-old"));
    fs::write(&script, "#!/bin/sh\necho QEMU emulator version 4.1.0\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    copy_program(&script, &old);
    let too_old = format!("--qemu {} --macvtap wire -- -M q35", old.display());
    let cases = [
        (
            "--macvtap wire -- -netdev user,id=macvtap0",
            "the id macvtap0 is that of a --macvtap",
        ),
        (
            "--macvtap wire -- -netdev tap,id=x,fd=3",
            "file descriptor 3 is one of those that minivmm gives to QEMU: use 4",
        ),
        (
            "--macvtap wire,mac=52:54:00:12:34:57 -- -device e1000e,netdev=macvtap0,mac=52:54:00:12:34:56",
            "but the macvtap's MAC address is 52:54:00:12:34:57",
        ),
        (
            "--macvtap wire -- -device e1000e,netdev=macvtap0,mac=52:54:00:12:34:56",
            "give --macvtap the same mac=52:54:00:12:34:56",
        ),
        (
            "--macvtap wire,id=nic2 -- -set device.nic2.mac=52:54:00:12:34:56",
            "give it to --macvtap as mac=",
        ),
        (
            "--macvtap wire -- -device e1000e,netdev=macvtap0",
            "without a usable mac=",
        ),
        ("--macvtap wire -- -daemonize", "-daemonize"),
        ("--macvtap wire --accel tcg -- -enable-kvm", "choose one"),
        (
            "--qemu /no/such/qemu --macvtap wire -- -M q35",
            "name a QEMU with --qemu",
        ),
        (too_old.as_str(), "is QEMU 4.1: 4.2 or newer is needed"),
        ("--macvtap none -- -M q35", "none"),
        ("--macvtap fd=9 -- -M q35", "fd 9 is not open"),
    ];
    for (args, expected) in cases {
        let output = outcome(site.qemu(args.split_whitespace()));
        let log = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args}: {log}");
        assert!(log.contains(expected), "{args}: {log}");
        // It says so when it makes a NIC.
        assert!(!log.contains("NIC on"), "{args}: {log}");
    }
    if !Path::new("/dev/vhost-net").exists() {
        let output = outcome(site.qemu(["--macvtap", "wire,vhost=on", "--", "-M", "q35"]));
        assert!(text(&output.stderr).contains("modprobe vhost_net"));
    }
    let mut command = site.host.command("env");
    command.arg(format!("PATH={}", dir.path().display()));
    command
        .arg(binary())
        .args(["qemu", "--macvtap", "wire", "--", "-M", "q35"]);
    let output = outcome(command);
    let log = text(&output.stderr);
    assert!(log.contains("no qemu-system-x86_64 in PATH"), "{log}");
    let output = outcome(site.qemu(["--macvtap", "wire,script=no", "--", "-M", "q35"]));
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert_eq!(site.host.links(), ["wire"]);
});

tcg_test!(failure_of_qemu_is_shown_with_a_hint_and_its_status, || {
    let site = Site::new();
    let args = "--macvtap wire -- -M q35 -display none -drive if=pflash,format=raw,file=/none/OVMF_CODE.fd";
    let output = outcome(site.qemu(args.split_whitespace()));
    let log = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("Could not open '/none/OVMF_CODE.fd'"), "{log}");
    assert!(log.contains("apt install ovmf"), "{log}");

    let args = "--macvtap wire -- -M q35 -display none -accel tcg -bios OVMF_that_is_not_there.fd";
    let output = outcome(site.qemu(args.split_whitespace()));
    let log = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("apt install ovmf"), "{log}");

    // Where the KVM lacks a register that this model of processor has.
    let args =
        "--macvtap wire -- -M q35 -display none -accel kvm -cpu host -nodefaults -S -monitor stdio";
    let mut command = site.qemu(args.split_whitespace());
    command.stdin(Stdio::null());
    let mut vm = Vm::spawn(command);
    thread::sleep(2 * SECOND);
    if !vm.has_ended() {
        vm.signal(Signal::TERM);
    }
    vm.wait_exit();
    if vm.log().contains("failed to set MSR") {
        assert!(vm.log().contains("-arch-capabilities"), "{}", vm.log());
    } else {
        skip::not_tested("the hint for a register that KVM lacks, since this one has all");
    }

    // The user's own tap, which is none.
    let args = "--macvtap wire -- -M q35 -display none -accel tcg -netdev tap,id=own,fd=0";
    let log = text(&outcome(site.qemu(args.split_whitespace())).stderr);
    assert!(log.contains("is no tap queue"), "{log}");
});
