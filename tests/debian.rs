//! A Debian that debootstrap has installed on a disk: it boots with its own kernel and initrd, has
//! its address by DHCP, and powers off.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;
mod lab;

use std::path::Path;
use std::process::Stdio;

use harness::debian::{debian, partition};
use harness::disk::{check_ext4, copy_sparse, debugfs};
use harness::lab_test;
use harness::site::{LEASED, LEASED_TO, Site};
use harness::vm::{Vm, binary};

/// What its console shows in turn. Each may take as long as the boot of a small guest.
const STEPS: [&str; 5] = [
    "Run /init as init process",
    "systemd[1]: ",
    " - Local File Systems.",
    " - Basic System.",
    "GUEST running\n",
];

lab_test!(debian_on_a_raw_disk_ends_by_systemctl_poweroff, || {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("debian.raw");
    copy_sparse(&debian().disk(), &disk).unwrap();
    let site = Site::new();
    let _server = site.serve_dhcp();
    let mut command = site.host.command(binary());
    command.arg("--kernel").arg(debian().kernel());
    command.arg("--initrd").arg(debian().initrd());
    command.args(["--cmdline", "root=/dev/vda1 raw-disk"]);
    command.args(["--macvtap", &format!("wire,mac={LEASED_TO}")]);
    command.arg("--disk");
    command.arg(format!("{},serial=debian-1", disk.display()));
    command.stdin(Stdio::piped());
    let mut vm = Vm::spawn(command);
    for step in STEPS {
        vm.wait_for(step);
    }
    vm.wait_for("GUEST ready\n");
    assert!(site.peer.pings(LEASED, 100), "{}", vm.transcript());
    assert!(vm.run("hostname -I").contains(LEASED));
    vm.run("test -b /dev/disk/by-id/virtio-debian-1");
    vm.start_command("systemctl poweroff");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
    examine(&disk, "raw-disk");
});

/// Fails unless the file system of a raw disk is whole and has what the guest wrote.
fn examine(disk: &Path, booted_by: &str) {
    let partition = partition(disk);
    check_ext4(&partition);
    let cmdline = debugfs(&partition, "cat /root/booted-by");
    assert!(cmdline.contains(booted_by), "{cmdline}");
}
