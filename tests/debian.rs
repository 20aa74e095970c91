//! A Debian that debootstrap has installed on a disk: it boots with its own kernel and initrd, has
//! its address by DHCP, and powers off.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;
mod lab;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use harness::debian::{debian, partition};
use harness::disk::{check_ext4, copy_sparse, debugfs, qemu_img};
use harness::eventually;
use harness::lab_test;
use harness::site::{LEASED, LEASED_TO, Site};
use harness::vm::{Vm, binary};
use vmm::config::{Config, ConsoleTarget};
use vmm::{Exit, Guest, RunState};

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

// A signal gives a guest ten seconds to power off, which may be too few in the lab. A program that
// uses the library gives it as many as it likes.
lab_test!(debian_on_a_qcow2_disk_ends_by_its_power_button, || {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("debian.qcow2");
    let backing = debian().disk();
    let before = sum(&backing);
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    qemu_img(&create, &[&backing, &disk]);
    let site = Site::new();
    let _server = site.serve_dhcp();
    let console = dir.path().join("console");
    let mut config = Config::new(debian().kernel());
    config.initrd = Some(debian().initrd());
    config.cmdline = "root=/dev/vda1 qcow2-disk".into();
    config.console = ConsoleTarget::File(console.clone());
    let image = format!("{},backing={}", disk.display(), backing.display());
    config.disks.push(image.parse().unwrap());
    config
        .nics
        .push(format!("wire,mac={LEASED_TO}").parse().unwrap());
    let guest = site.host.enter(|| Guest::start(config)).unwrap();
    let shown = || String::from_utf8_lossy(&fs::read(&console).unwrap()).replace('\r', "");
    for step in STEPS {
        assert!(eventually(|| shown().contains(step)), "{}", shown());
    }
    assert!(site.peer.pings(LEASED, 100), "{}", shown());
    guest.press_power_button();
    assert!(
        eventually(|| guest.state() == RunState::Ended),
        "{}",
        shown()
    );
    assert_eq!(guest.wait().unwrap(), Exit::PowerOff, "{}", shown());
    qemu_img(&["check", "-q"], &[&disk]);
    let raw = dir.path().join("debian.raw");
    qemu_img(&["convert", "-O", "raw"], &[&disk, &raw]);
    examine(&raw, "qcow2-disk");
    assert_eq!(sum(&backing), before, "the backing file has changed");
});

/// Fails unless the file system of a raw disk is whole and has what the guest wrote.
fn examine(disk: &Path, booted_by: &str) {
    let partition = partition(disk);
    check_ext4(&partition);
    let cmdline = debugfs(&partition, "cat /root/booted-by");
    assert!(cmdline.contains(booted_by), "{cmdline}");
}

/// A sum over a whole file, by which one sees whether it has changed.
fn sum(path: &Path) -> u64 {
    let bytes = fs::read(path).unwrap();
    let words = bytes.chunks_exact(8).map(|chunk| {
        let word = chunk.try_into().expect("eight bytes");
        u64::from_le_bytes(word)
    });
    words.fold(0, |sum, word| sum.rotate_left(5).wrapping_add(word))
}
