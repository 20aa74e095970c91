//! `--dry-run`: the script makes the same guest, and deletes what it has made.

use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};

use super::harness::assets::assets;
use super::harness::linux::initrd;
use super::harness::site::{Site, address, pings};
use super::harness::vm::Vm;
use super::{STEADY, descendants, outcome, tcg_test, text};

/// When dropped, kills what a shell has started: it would live on when a failed test kills the
/// shell.
struct KillChildren(u32);

impl Drop for KillChildren {
    fn drop(&mut self) {
        for child in descendants(self.0) {
            if let Some(pid) = Pid::from_raw(child as i32) {
                // It may have ended just now.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

tcg_test!(script_of_a_dry_run_makes_the_same_guest, || {
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
    assert!(script.lines().count() < 40, "{script}");

    let mut shell = site.host.command("sh");
    shell.args(["-c", &script]).stdin(Stdio::piped());
    let mut vm = Vm::spawn(shell);
    let _guard = KillChildren(vm.pid());
    vm.wait_for("GUEST ready\n");
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
    // The host's own link, by which the guests reach it.
    let addresses = site.host.ip("-o address show");
    assert!(addresses.contains("192.168.78.9/24"), "{addresses}");
    vm.send("1 poweroff -f\n");
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert_eq!(
        site.host.links(),
        ["wire"],
        "the script has deleted its links"
    );
});

tcg_test!(dry_run_finds_links_by_their_alternative_names, || {
    let site = Site::new();
    site.host.macvtap("mvt0", "wire", "bridge");
    for (link, name) in [
        ("wire", "the-wire-of-my-guests"),
        ("mvt0", "tap-of-my-guest"),
    ] {
        site.host
            .ip(&format!("link property add dev {link} altname {name}"));
    }
    let script = |link: &str| {
        let output = outcome(site.qemu(["--dry-run", "--macvtap", link, "--", "-M", "q35"]));
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    // sysfs has the macvtap by its own name alone.
    assert!(script("tap-of-my-guest").contains("/sys/class/net/mvt0/ifindex"));
    // ip-link(8) finds links by all of theirs.
    assert!(script("the-wire-of-my-guests").contains("ip link add link the-wire-of-my-guests"));
});
