//! QMP, by its own client and by hostile ones.
//!
//! - `commands.py`: each command and event, with QEMU's client, on minivmm and on QEMU

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use harness::guest::{Net, addresses};
use harness::images::Images;
use harness::vm::{Vm, binary};
use harness::{eventually, guest_test, qmp};

/// Every command and event, by QEMU's own client.
#[track_caller]
fn go_through(socket: &Path, cpus: u32, memory: u64) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/qmp/commands.py");
    let mut python = Command::new("python3");
    python.env("PYTHONPATH", qmp::library());
    python.arg(script).arg(socket);
    let output = python.args([cpus.to_string(), memory.to_string()]).output();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
}

guest_test!(each_command_and_event_is_as_qemus_client_expects, || {
    let (net, images) = (Net::new(), Images::new());
    let socket = images.path("qmp");
    let [ip, _] = addresses(2);
    let mut command = net.command();
    command.args(["--cpus", "2", "--balloon", "--macvtap", "lower"]);
    command.arg("--disk").arg(images.raw("raw"));
    let qcow2 = images.qcow2("a.qcow2", None);
    command.arg(format!("--disk={},readonly=on", qcow2.display()));
    command.args(["--cmdline", &format!("guest.mode=echo guest.ip={ip}/24")]);
    let mut vm = Vm::spawn({
        command.arg("--qmp").arg(&socket);
        command
    });
    vm.wait_for("READY echo\n");
    go_through(&socket, 2, 128 << 20);
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
    assert!(!socket.exists());
});

// What holds for minivmm's answers holds for QEMU's.
guest_test!(same_script_passes_on_qemu, || {
    let (net, images) = (Net::new(), Images::new());
    let socket = images.path("qmp");
    let mut command = net.host.command(binary());
    command.arg("qemu").arg("--qmp").arg(&socket);
    command.args(["--macvtap", "lower", "--"]);
    command.args("-M q35 -accel tcg -nodefaults -display none -m 128M -smp 2".split(' '));
    command.args(["-device", "virtio-balloon-pci"]);
    for (disk, format, image, readonly) in [
        ("disk0", "raw", images.raw("raw"), "off"),
        ("disk1", "qcow2", images.qcow2("a.qcow2", None), "on"),
    ] {
        let image = image.display();
        let drive = format!("if=none,id={disk},format={format},file={image},readonly={readonly}");
        let device = format!("virtio-blk-pci,drive={disk}");
        command.args(["-drive", &drive, "-device", &device]);
    }
    command.stdin(Stdio::null());
    let mut vm = Vm::spawn(command);
    assert!(eventually(|| UnixStream::connect(&socket).is_ok()));
    go_through(&socket, 2, 128 << 20);
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
    assert!(!socket.exists());
});
