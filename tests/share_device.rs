//! Shares, by the freestanding guest: files of the host's through the device, and the end of its server.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use harness::elf::elf;
use harness::guest::Transport::{self, Mmio, Pci};
use harness::guest::{power_off, succeed};
use harness::process::{children, is_running};
use harness::vm::{Vm, binary};
use harness::{PATIENCE, eventually, images, kvm_test};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use vmm::Guest;
use vmm::config::{Config, ConsoleTarget};
use vmm::service::Service;

/// A directory with the file that the guest reads.
fn directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("hello"), "of the host").unwrap();
    directory
}

fn share(directory: &TempDir, end: &str) -> String {
    format!("{}:src{end}", directory.path().display())
}

fn start(transport: Transport, share: &str, options: &str) -> Vm {
    let mut command = images::command(transport, &[], options);
    command.args(["--share", share]);
    Vm::spawn(command)
}

/// The guest reads until its server is gone, and finds errors then: for what was on its way, for what
/// follows, and after a reset of the device.
#[track_caller]
fn assert_errors(vm: Vm) {
    let console = succeed(vm);
    let errors = "OK share-reads during=-5 after=-5 anew=-5\n";
    assert!(console.contains(errors), "{console}");
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(pid as i32).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

kvm_test!(files_of_a_share_are_read_and_written, || {
    for transport in [Mmio, Pci] {
        let directory = directory();
        let console = succeed(start(transport, &share(&directory, ""), "mode=share"));
        for text in ["TAG src\n", "READ of the host\n", "OK share"] {
            assert!(console.contains(text), "{console}");
        }
        let made = fs::read_to_string(directory.path().join("made"));
        assert_eq!(made.unwrap(), "written by the guest");
    }
});

kvm_test!(files_of_a_read_only_share_are_only_read, || {
    let directory = directory();
    let console = power_off(start(Pci, &share(&directory, ":ro"), "mode=share"));
    assert!(console.contains("READ of the host\n"), "{console}");
    let refused = format!("FAIL share create: error -{}\n", libc::EROFS);
    assert!(console.contains(&refused), "{console}");
    assert!(!directory.path().join("made").exists());
});

kvm_test!(guest_whose_file_server_is_killed_gets_errors, || {
    for transport in [Mmio, Pci] {
        let (directory, place) = (directory(), tempfile::tempdir().unwrap());
        let [events, socket] = ["events", "qmp"].map(|name| place.path().join(name));
        let mut command = images::command(transport, &[], "mode=share-reads");
        command.args(["--share", &share(&directory, "")]);
        command
            .arg("--events")
            .arg(&events)
            .arg("--qmp")
            .arg(&socket);
        let mut vm = Vm::spawn(command);
        vm.wait_for("READS 50\n");
        let mut qmp = BufReader::new(UnixStream::connect(&socket).unwrap());
        qmp.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
        let capabilities = br#"{"execute": "qmp_capabilities"}"#;
        qmp.get_ref().write_all(capabilities).unwrap();
        // The greeting and the reply: it gets events now.
        for _ in 0..2 {
            qmp.read_line(&mut String::new()).unwrap();
        }
        let [server] = children(vm.pid())[..] else {
            panic!("{:?}", children(vm.pid()));
        };
        kill(server);
        vm.wait_for_log("share0: the guest gets errors (EIO) from now on");
        let mut messages = String::new();
        qmp.read_to_string(&mut messages).unwrap();
        assert_errors(vm);
        let lines = fs::read_to_string(events).unwrap();
        for (text, name) in [
            (lines, "share-failed"),
            (messages, "X_MINIVMM_SHARE_FAILED"),
        ] {
            let mut events = text.lines().filter_map(|line| {
                let event: Value = serde_json::from_str(line).unwrap();
                (event["event"] == name).then_some(event)
            });
            let event = events.next().unwrap_or_else(|| panic!("{text}"));
            // QMP has the keys in an object of their own.
            let data = event.get("data").unwrap_or(&event);
            assert_eq!(data["device"], "share0");
            assert_eq!(data["tag"], "src");
            assert_eq!(data["reason"], "the file server is gone");
            assert_eq!(events.next(), None);
        }
    }
});

kvm_test!(monitor_that_is_killed_leaves_no_file_server, || {
    let directory = directory();
    let mut vm = start(Pci, &share(&directory, ""), "mode=share-reads");
    vm.wait_for("READS 50\n");
    let [outer] = children(vm.pid())[..] else {
        panic!("{:?}", children(vm.pid()));
    };
    let [inner] = children(outer)[..] else {
        panic!("{:?}", children(outer));
    };
    vm.signal(Signal::KILL);
    vm.wait_exit();
    assert!(eventually(|| !is_running(outer) && !is_running(inner)));
});

/// A server that minivmm has not started, and that keeps no record of requests for it.
fn serve(directory: &Path, socket: &Path) -> impl FnOnce() -> Service + use<> {
    let listener = UnixListener::bind(socket).unwrap();
    let mut command = Command::new(binary());
    command.arg("file-server").arg(directory);
    let record = memfd_create(c"record", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&record, fileserver::RECORD as u64).unwrap();
    move || {
        let (connection, _) = listener.accept().unwrap();
        let (_, ready) = io::pipe().unwrap();
        let placed = vec![(3, connection.into()), (4, record), (5, ready.into())];
        Service::start("the server", command, placed).unwrap()
    }
}

kvm_test!(server_on_a_socket_serves_and_its_end_gives_errors, || {
    let (directory, place) = (directory(), tempfile::tempdir().unwrap());
    let socket = place.path().join("socket");
    let serve = serve(directory.path(), &socket);
    let value = format!("socket={},tag=src", socket.display());
    let mut vm = start(Pci, &value, "mode=share-reads");
    let service = serve();
    vm.wait_for("READS 50\n");
    assert!(children(vm.pid()).is_empty());
    drop(service);
    assert_errors(vm);
});

kvm_test!(pauses_of_a_guest_that_reads_lose_no_request, || {
    let directory = directory();
    let console = directory.path().join("console");
    let mut config = Config::new(elf().to_owned());
    config.memory = "128M".parse().unwrap();
    config.console = ConsoleTarget::File(console.clone());
    config.shares = vec![share(&directory, "").parse().unwrap()];
    config.file_server = Some(binary());
    config.cmdline = "guest.mode=share-reads".into();
    let guest = Guest::start(config).unwrap();
    let reads = || {
        let shown = fs::read_to_string(&console).unwrap_or_default();
        assert!(!shown.contains("END"), "{shown}");
        shown.matches("READS ").count()
    };
    for _ in 0..5 {
        let before = reads();
        assert!(eventually(|| reads() > before));
        guest.pause().unwrap();
        guest.resume().unwrap();
    }
    let before = reads();
    assert!(eventually(|| reads() > before));
    guest.end();
    guest.wait().unwrap();
});
