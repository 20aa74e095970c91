//! The console of a running VM: those who attach to it, and leave.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::harness::vm::Vm;
use crate::harness::{eventually, guest_test};
use crate::host::Host;
use crate::session::Session;
use crate::tiny::POWER_OFF;

impl Host {
    /// Starts `minivmm console` with pipes for its stdin and stdout.
    fn attach(&self, name: &str) -> Vm {
        let mut command = self.runtime.minivmm(&["console", name]);
        command.stdin(Stdio::piped());
        Vm::spawn(command)
    }

    /// Starts it on a terminal, which then shows what was said.
    fn attach_terminal(&self, name: &str) -> Session {
        let command = self.runtime.minivmm(&["console", name]);
        let mut session = Session::start((command, TempDir::new().unwrap()));
        session.wait_for("ready");
        session
    }
}

guest_test!(readers_of_the_console_see_all_and_write, || {
    let host = Host::new();
    let mut vm = host.start(&["--name", "web"]);
    let socket = host.runtime.directory.path().join("vms/web/console.sock");
    let mode = fs::metadata(socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (mut one, mut two) = (host.attach("web"), host.attach("web"));
    for reader in [&mut one, &mut two] {
        reader.wait_for("ready\n");
    }
    // The end of its input is not that of the console.
    two.close_stdin();
    one.send("from one");
    for reader in [&mut one, &mut two, &mut vm] {
        reader.wait_for("from one");
    }
    vm.send("from stdin");
    for reader in [&mut one, &mut two] {
        reader.wait_for("from stdin");
    }
    let dump = host.show(&["console", "web", "--dump"]);
    assert_eq!(dump, "ready\nfrom onefrom stdin");
    one.send(&format!("last words{POWER_OFF}"));
    assert_eq!(vm.wait_exit().code(), Some(0));
    for reader in [&mut one, &mut two] {
        let status = reader.wait_exit();
        assert_eq!(status.code(), Some(0), "{}", reader.transcript());
        assert!(
            reader.console().ends_with("last words"),
            "{}",
            reader.transcript()
        );
        assert!(reader.log().contains("web has ended"), "{}", reader.log());
    }
});

guest_test!(console_in_a_file_has_readers_too, || {
    let host = Host::new();
    let file = host.runtime.directory.path().join("console.log");
    let target = format!("file:{}", file.display());
    let kernel = host.kernel(crate::tiny::Tiny::Echo);
    let args = ["--kernel", &kernel, "--name", "web", "--console", &target];
    let mut vm = Vm::spawn(host.runtime.minivmm(&args));
    assert!(eventually(|| !host.ps().is_empty()), "{}", vm.log());
    // Also while the VM is only starting.
    let mut reader = host.attach("web");
    reader.wait_for("ready\n");
    reader.send(&format!("abc{POWER_OFF}"));
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert_eq!(reader.wait_exit().code(), Some(0));
    assert_eq!(reader.console(), "ready\nabc");
    assert_eq!(fs::read_to_string(file).unwrap(), "ready\nabc");
});

guest_test!(vm_without_a_console_is_named, || {
    let host = Host::new();
    let kernel = host.kernel(crate::tiny::Tiny::Prompt);
    let args = ["--kernel", &kernel, "--name", "web", "--console", "none"];
    let vm = Vm::spawn(host.runtime.minivmm(&args));
    assert!(eventually(|| !host.ps().is_empty()), "{}", vm.log());
    let (status, log) = host.fail(&["console", "web"]);
    assert!(status == 1 && log.contains("web has no console"), "{log}");
    let (status, log) = host.fail(&["console", "wbe"]);
    assert!(status == 1 && log.contains("no VM is called wbe"), "{log}");
});

guest_test!(terminal_attaches_and_leaves_and_the_guest_runs_on, || {
    let host = Host::new();
    let mut vm = host.start(&["--name", "web"]);
    let mut session = host.attach_terminal("web");
    session.assert_raw();
    session.type_keys("abc\x01\x01");
    session.wait_for("abc\x01");
    vm.wait_for("abc\x01");
    session.type_keys("\x01h");
    session.wait_for("Ctrl-A d ");
    session.type_keys("\x01d");
    session.assert_ends(0);
    assert!(
        session.shown().contains("web runs on"),
        "{}",
        session.shown()
    );
    // And once more, until the guest ends.
    let mut session = host.attach_terminal("web");
    session.type_keys(POWER_OFF);
    session.assert_ends(0);
    assert!(
        session.shown().contains("web has ended"),
        "{}",
        session.shown()
    );
    assert_eq!(vm.wait_exit().code(), Some(0));
});

guest_test!(terminal_is_restored_when_a_signal_ends_the_reader, || {
    let host = Host::new();
    let mut vm = host.start(&["--name", "web"]);
    for signal in [Signal::TERM, Signal::HUP] {
        let mut session = host.attach_terminal("web");
        session.assert_raw();
        session.signal(signal);
        assert!(eventually(|| session.child.try_wait().unwrap().is_some()));
        let after = crate::session::settings(&session.terminal);
        assert_eq!(after, session.before, "{signal:?}");
    }
    vm.send("still here");
    vm.wait_for("still here");
});
