//! `--dry-run`: the script makes the same guest, and ends like the run.

use std::path::Path;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};

use super::harness::assets::assets;
use super::harness::linux::initrd;
use super::harness::site::{Site, address, pings};
use super::harness::vm::Vm;
use super::{BOOT, SECOND, STEADY, children, eventually, here, outcome, text, wait_for_qemu};

/// When dropped, kills what a shell has started: it would live on when a failed test kills the shell.
struct KillChildren(u32);

impl Drop for KillChildren {
    fn drop(&mut self) {
        for child in children(self.0) {
            if let Some(pid) = Pid::from_raw(child as i32) {
                // It may have ended just now.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

#[test]
fn script_of_a_dry_run_makes_the_same_guest() {
    let Some(_permit) = here() else { return };
    let site = Site::new();
    let (kernel, initrd) = (assets().bzimage(), initrd());
    let macs = ["02:aa:00:00:00:0d", "02:aa:00:00:00:0e"];
    let nics = macs.map(|mac| format!("wire,mac={mac},queues=2"));
    let mut command = site.qemu([
        "--dry-run",
        "--macvtap",
        &nics[0],
        "--macvtap",
        &nics[1],
        "--accel",
        "tcg",
        "--cpus",
        "2",
        "--host-link",
        "192.168.78.9/24",
    ]);
    command
        .arg("--kernel")
        .arg(&kernel)
        .arg("--initrd")
        .arg(&initrd);
    command.args(["--cmdline", &format!("{STEADY} it's='quoted $HOME'")]);
    let output = outcome(command);
    let script = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(site.host.links(), ["wire"], "nothing is done");

    let mut shell = site.host.command("sh");
    shell.args(["-c", &script]).stdin(Stdio::piped());
    let mut vm = Vm::spawn(shell);
    let _guard = KillChildren(vm.pid());
    vm.wait_for("GUEST ready\n", BOOT);
    for (n, mac) in macs.iter().enumerate() {
        let found = vm.run(&format!("cat /sys/class/net/eth{n}/address"));
        assert_eq!(found.trim(), *mac);
        let queues = vm.run(&format!("ls -d /sys/class/net/eth{n}/queues/rx-* | wc -l"));
        assert_eq!(queues.trim(), "2");
    }
    let cmdline = vm.run("cat /proc/cmdline");
    assert!(cmdline.contains("it's='quoted $HOME'"), "{cmdline}");
    for (n, address_of) in [("eth0", 11), ("eth1", 12)] {
        address(&mut vm, n, address_of);
        assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
        vm.run(&format!("ip link set {n} down"));
    }
    assert_eq!(site.host.links().len(), 4);
    // The host's own link, over which it is heard.
    let addresses = site.host.ip("-o address show");
    assert!(addresses.contains("192.168.78.9/24"), "{addresses}");
    vm.send("1 poweroff -f\n");
    assert_eq!(vm.wait_exit(20 * SECOND).code(), Some(0));
    assert_eq!(
        site.host.links(),
        ["wire"],
        "the script has deleted its links"
    );
}

/// The script for a QEMU on `wire` that runs no guest.
fn idle_script(site: &Site) -> String {
    let args = "--dry-run --macvtap wire -- -M q35 -accel tcg -nodefaults -display none -S";
    let output = outcome(site.qemu(args.split_whitespace()));
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn signal_to_the_script_ends_qemu_at_once_and_leaves_nothing() {
    let Some(_permit) = here() else { return };
    let site = Site::new();
    let script = idle_script(&site);
    for (shell, signal, code) in [
        ("sh", Signal::TERM, 143),
        ("bash", Signal::TERM, 143),
        ("sh", Signal::HUP, 129),
    ] {
        let mut command = site.host.command(shell);
        command.args(["-c", &script]).stdin(Stdio::piped());
        let mut vm = Vm::spawn(command);
        let _guard = KillChildren(vm.pid());
        let qemu = wait_for_qemu(vm.pid());
        vm.signal(signal);
        assert_eq!(vm.wait_exit(20 * SECOND).code(), Some(code), "{shell}");
        let gone = || !Path::new(&format!("/proc/{qemu}")).exists();
        eventually(20 * SECOND, "QEMU has ended", gone);
        assert_eq!(site.host.links(), ["wire"], "{shell}");
    }
}

#[test]
fn lower_link_that_is_down_is_refused_by_the_run_and_by_the_script() {
    let Some(_permit) = here() else { return };
    let site = Site::new();
    let script = idle_script(&site);
    site.host.down("wire");
    let mut shell = site.host.command("sh");
    shell.args(["-c", &script]);
    let run = site.qemu("--macvtap wire -- -M q35 -display none -S".split_whitespace());
    for command in [shell, run] {
        let output = outcome(command);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        assert!(
            text(&output.stderr).contains("is down"),
            "{}",
            text(&output.stderr)
        );
        assert_eq!(site.host.links(), ["wire"]);
    }
}
