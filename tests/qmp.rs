//! QMP, by its own client and by hostile ones.
//!
//! - `commands.py`: each command and event, with QEMU's client, on minivmm and on QEMU
//! - `sockets`: which sockets are served
//! - `hostile`: clients that do everything wrong

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;
#[path = "qmp/hostile.rs"]
mod hostile;
#[path = "harness/session.rs"]
mod session;
#[path = "qmp/sockets.rs"]
mod sockets;
#[path = "harness/tiny.rs"]
mod tiny;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use harness::guest::{Net, addresses};
use harness::images::Images;
use harness::memory::held_memory;
use harness::vm::{Vm, binary};
use harness::{PATIENCE, eventually, guest_test, kvm_test, qmp};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::{Value, json};
use session::{by_shell, minivmm};
use tempfile::TempDir;
use tiny::{POWER_OFF, Tiny};

/// A client that has negotiated.
#[derive(Debug)]
struct Client(BufReader<UnixStream>);

impl Client {
    #[track_caller]
    fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut client = Self(BufReader::new(stream));
        assert!(client.message()["QMP"].is_object());
        assert_eq!(client.execute("qmp_capabilities"), json!({"return": {}}));
        client
    }

    #[track_caller]
    fn message(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// The answer to a command.
    #[track_caller]
    fn execute(&mut self, command: &str) -> Value {
        let command = json!({"execute": command}).to_string();
        self.0.get_mut().write_all(command.as_bytes()).unwrap();
        loop {
            let message = self.message();
            if message["event"].is_null() {
                return message;
            }
        }
    }

    /// Waits for an event.
    #[track_caller]
    fn event(&mut self, name: &str) -> Value {
        loop {
            let message = self.message();
            if message["event"] == name {
                return message;
            }
        }
    }
}

fn with_stdin(mut command: Command) -> Command {
    command.stdin(Stdio::piped());
    command
}

/// Every command and event, by QEMU's own client.
#[track_caller]
fn go_through(socket: &Path, name: &str) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/qmp/commands.py");
    let mut python = Command::new("python3");
    python.env("PYTHONPATH", qmp::library());
    let output = python.arg(script).arg(socket).arg(name).output();
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
    let name = format!("native{}", std::process::id());
    command.args(["--name", &name]);
    let mut vm = Vm::spawn({
        command.arg("--qmp").arg(&socket);
        command
    });
    vm.wait_for("READY echo\n");
    go_through(&socket, &name);
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
    assert!(!socket.exists());
});

// What holds for minivmm's answers holds for QEMU's.
guest_test!(same_script_passes_on_qemu, || {
    let (net, images) = (Net::new(), Images::new());
    let socket = images.path("qmp");
    let mut command = net.host.command(binary());
    command.arg("qemu").arg("--qmp").arg(&socket);
    let name = format!("qemu{}", std::process::id());
    command.args(["--name", &name]);
    command.args(["--macvtap", "lower", "--"]);
    command.args("-M q35 -accel tcg -nodefaults -display none -m 128M -smp 2".split(' '));
    command.args(["-name", &name, "-device", "virtio-balloon-pci"]);
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
    go_through(&socket, &name);
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
    assert!(!socket.exists());
});
