//! With KVM and vhost-net, here or in the lab.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::process::Signal;

use super::harness::assets::assets;
use super::harness::linux::{boot_command, initrd};
use super::harness::site::{Site, address, pings};
use super::harness::skip;
use super::{Permit, lab, outcome, text, wait_for_qemu};

/// A test where Linux guests run by KVM; a lab of its own is a guest by translation too.
macro_rules! kvm_guest_test {
    ($name:ident, $body:expr) => {
        #[test]
        fn $name() {
            let _permit = (lab::place() == lab::Place::Lab).then(Permit::get);
            lab::test(stringify!($name), $body);
        }
    };
}

/// vhost-net is not only open but moves frames: QEMU does not fall back, and the kernel has a
/// worker for it.
fn assert_vhost_runs(qemu: u32, log: &str) {
    assert!(!log.contains("could not be initialized"), "{log}");
    let worker = format!("vhost-{qemu}");
    // A task of QEMU's since Linux 6.4, a thread of the kernel's before.
    let tasks = [format!("/proc/{qemu}/task"), "/proc".into()];
    let entries = tasks
        .iter()
        .flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten());
    let mut names = entries.filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok());
    assert!(
        names.any(|name| name.trim() == worker),
        "no thread {worker}"
    );
}

kvm_guest_test!(guest_runs_by_kvm_with_vhost_net, || {
    let site = Site::new();
    let mut command = site.qemu(["--macvtap", "wire,queues=2", "--cpus", "2", "-v"]);
    command.arg("--kernel").arg(assets().bzimage());
    command.arg("--initrd").arg(initrd());
    let mut vm = boot_command(command);
    let log = vm.log();
    assert!(!log.contains("TCG"), "auto takes KVM\n{log}");
    if Path::new("/dev/vhost-net").exists() {
        assert!(log.contains("fds=3:4,vhost=on,vhostfds=5:6"), "{log}");
        let qemu = wait_for_qemu(vm.pid());
        let open = fs::read_dir(format!("/proc/{qemu}/fd")).expect("QEMU runs");
        let links = open
            .flatten()
            .filter_map(|fd| fs::read_link(fd.path()).ok());
        let vhost = links.filter(|link| link == Path::new("/dev/vhost-net"));
        assert_eq!(vhost.count(), 2);
        assert_vhost_runs(qemu, &log);
    } else {
        assert_ne!(lab::place(), lab::Place::InsideLab, "the lab has vhost-net");
        skip::not_tested("vhost-net, which this host lacks");
    }
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
    assert!(site.peer.pings("192.168.77.11", 3));
    vm.send("1 echo c >/proc/sysrq-trigger\n");
    assert_eq!(vm.wait_exit().code(), Some(4), "{}", vm.transcript());
});

kvm_guest_test!(classic_command_runs_by_kvm, || {
    let site = Site::new();
    let has_vhost = Path::new("/dev/vhost-net").exists();
    let vhost = if has_vhost { "on" } else { "off" };
    let args = format!(
        "-v --macvtap wire,vhost={vhost},bus=pcie.0,addr=0x4,id=nic2,romfile= -- \
         -M q35 -enable-kvm -cpu host -smp 2 -m 512M -nodefaults -display none -serial mon:stdio \
         -device virtio-scsi-pci,id=scsi0 -kernel {} -initrd {} -append console=ttyS0",
        assets().bzimage().display(),
        initrd().display(),
    );
    let mut vm = boot_command(site.qemu(args.split_whitespace()));
    if has_vhost {
        assert!(vm.log().contains("vhost=on,vhostfd=4"), "{}", vm.log());
        assert_vhost_runs(wait_for_qemu(vm.pid()), &vm.log());
    }
    vm.run("ls /sys/bus/pci/devices/0000:00:04.0/virtio*/net/eth0");
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
    // It is passed on, and QEMU ends by it.
    vm.signal(Signal::TERM);
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
});

kvm_guest_test!(auto_takes_the_translator_where_qemu_fails_with_kvm, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let fake = dir.path().join("qemu-without-kvm");
    let script = "#!/bin/sh\ncase \"$*\" in\n--version) echo 'QEMU emulator version 7.2.22' ;;\n\
     *'-accel kvm'*) echo 'no KVM in this one' >&2; exit 1 ;;\n*) echo \"runs with $*\" ;;\nesac\n";
    fs::write(&fake, script).expect("a file in the temporary directory");
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).expect("it is ours");
    let args = format!("--accel auto --qemu {} -- -M q35", fake.display());
    let output = outcome(site.qemu(args.split_whitespace()));
    let log = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{log}");
    assert!(log.contains("by emulation (TCG)"), "{log}");
    assert!(
        log.contains("QEMU fails with KVM: no KVM in this one"),
        "{log}"
    );
    assert!(
        text(&output.stdout).contains("-accel tcg"),
        "{}",
        text(&output.stdout)
    );
});
