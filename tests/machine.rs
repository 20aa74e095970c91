//! What the machine does for a guest and how it reports a crash, shown by guests of a few
//! instructions, and by the freestanding test guest in little memory.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;
#[path = "harness/tiny.rs"]
mod tiny;

#[path = "machine/cpus.rs"]
mod cpus;
#[path = "machine/memory.rs"]
mod memory;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use harness::elf::elf;
use harness::guest::{self, Net};
use harness::vm::{Vm, binary};
use harness::{guest_test, kvm_test};
use tiny::Tiny;

/// Runs a guest to its end; returns minivmm's status.
fn run(guest: Tiny, args: &[&str]) -> (Option<i32>, Vm) {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("guest");
    guest.write(&kernel);
    let mut command = Command::new(binary());
    command.arg("--kernel").arg(kernel).args(args);
    command.stdin(Stdio::null()).env_remove("RUST_LOG");
    let mut vm = Vm::spawn(command);
    let status = vm.wait_exit().code();
    (status, vm)
}

kvm_test!(string_instructions_repeat_one_port, || {
    let (status, vm) = run(Tiny::Strings, &[]);
    assert_eq!(status, Some(0), "{}", vm.transcript());
    assert_eq!(vm.console(), "hi\n");
});

kvm_test!(guest_without_a_console_has_no_serial_port, || {
    for (console, end) in [("none", "powered off"), ("stdio", "asked for a reboot")] {
        let (status, vm) = run(Tiny::NoSerial, &["--console", console]);
        assert_eq!(status, Some(0), "{}", vm.transcript());
        assert!(vm.log().contains(end), "{console}: {}", vm.log());
    }
});

kvm_test!(crash_that_kvm_reports_shows_rip_and_instruction, || {
    let (status, vm) = run(Tiny::Unrunnable, &[]);
    let log = vm.log();
    assert_eq!(status, Some(3), "{log}");
    for part in [
        "the guest crashed: KVM internal error on vCPU 0",
        "(suberror ",
    ] {
        assert!(log.contains(part), "no {part:?}: {log}");
    }
    // An emulated KVM stops at the first instruction that it lacks; a real one goes on to where
    // there is no memory.
    let here = log.contains(" at RIP 0x200") && log.contains("instruction bytes f0 48 0f c7 0f b8");
    let hole = log.contains(" at RIP 0xdffff000");
    assert!(here || hole, "{log}");

    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
    let real = cpuinfo
        .split_whitespace()
        .any(|word| word == "svm" || word == "vmx");
    assert_eq!(log.contains("emulated in software"), !real, "{log}");
    assert!(real || here, "{log}");
});

kvm_test!(guest_with_the_least_memory_that_a_linux_gets_boots, || {
    let (status, vm) = run(Tiny::Greeter, &["--memory", "64M"]);
    assert_eq!(status, Some(0), "{}", vm.transcript());
    assert_eq!(vm.console(), "hi\n");
});

guest_test!(guest_with_64_mib_uses_its_network_nic, || {
    let net = Net::new();
    let mut command = net.host.command(binary());
    command.arg("--kernel").arg(elf());
    command.args(["--memory", "64M", "--macvtap", "lower", "--cmdline"]);
    command.arg(format!(
        "guest.mode=ping guest.ip=10.77.0.2/24 guest.peer={}",
        guest::PEER[0]
    ));
    command.stdin(Stdio::null());
    guest::succeed(Vm::spawn(command));
});
