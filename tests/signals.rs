//! What minivmm makes of the signals and limits that it was started with: services, nohup and
//! shells without job control leave some ignored or blocked.
//!
//! The guests are a few instructions each (`harness/tiny.rs`), and QEMU is a script.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;
#[path = "harness/session.rs"]
mod session;
#[path = "harness/tiny.rs"]
mod tiny;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use harness::AT_ONCE;
use harness::kvm_test;
use harness::netns::{Netns, is_root};
use harness::vm::{Vm, binary};
use nix::sys::signal::{SigHandler, SigSet, signal};
use rustix::process::{Resource, Rlimit, setrlimit};
use session::minivmm;
use tempfile::TempDir;
use tiny::{POWER_OFF, Tiny};

type Nix = nix::sys::signal::Signal;
type Signal = rustix::process::Signal;

/// All signals whose state matters here.
const ALL: [Nix; 7] = [
    Nix::SIGHUP,
    Nix::SIGINT,
    Nix::SIGQUIT,
    Nix::SIGTERM,
    Nix::SIGCHLD,
    Nix::SIGUSR1,
    Nix::SIGXFSZ,
];

/// Starts `command` with these signals ignored and blocked, and no others of [`ALL`], whatever this
/// test was started with.
fn with_signals(command: &mut Command, ignored: &'static [Nix], blocked: &'static [Nix]) {
    let mask: SigSet = blocked.iter().copied().collect();
    let settle = move || {
        for one in ALL {
            let handler = match ignored.contains(&one) {
                true => SigHandler::SigIgn,
                false => SigHandler::SigDfl,
            };
            // SAFETY: neither runs code of this process.
            unsafe { signal(one, handler) }?;
        }
        Ok(mask.thread_set_mask()?)
    };
    // SAFETY: it makes system calls alone.
    unsafe { command.pre_exec(settle) };
}

/// Starts `command` with this soft limit.
fn with_limit(command: &mut Command, resource: Resource, soft: u64) {
    let limit = move || {
        let found = rustix::process::getrlimit(resource);
        let (current, maximum) = (Some(soft), found.maximum);
        Ok(setrlimit(resource, Rlimit { current, maximum })?)
    };
    // SAFETY: it makes system calls alone.
    unsafe { command.pre_exec(limit) };
}

kvm_test!(signals_that_are_ignored_at_the_start_stay_ignored, || {
    let (mut command, _directory) = minivmm(Tiny::Echo);
    with_signals(&mut command, &ALL, &[]);
    command.stdin(Stdio::piped());
    let mut vm = Vm::spawn(command);
    vm.wait_for("ready\n");
    // One presses the power button, and two end.
    for signal in [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM] {
        vm.signal(signal);
        vm.signal(signal);
    }
    vm.send("on");
    vm.wait_for("on");
    vm.send(POWER_OFF);
    let ended = vm.wait_exit().code();
    assert_eq!(ended, Some(0), "{}", vm.log());
    assert!(!vm.log().contains("signal"), "{}", vm.log());
});

kvm_test!(signals_that_are_blocked_at_the_start_arrive, || {
    let (mut command, _directory) = minivmm(Tiny::Echo);
    with_signals(&mut command, &[], &ALL);
    command.stdin(Stdio::null());
    let mut vm = Vm::spawn(command);
    vm.wait_for("ready\n");
    vm.signal(Signal::TERM);
    vm.wait_for_log("power button");
    vm.signal(Signal::TERM);
    assert_eq!(
        vm.wait_exit_within(AT_ONCE).code(),
        Some(143),
        "{}",
        vm.log()
    );
});

kvm_test!(guest_that_does_not_power_off_is_ended_in_its_time, || {
    let (mut command, _directory) = minivmm(Tiny::Echo);
    command.args(["--stop-timeout", "1"]).stdin(Stdio::null());
    let mut vm = Vm::spawn(command);
    vm.wait_for("ready\n");
    vm.signal(Signal::TERM);
    let ended = vm.wait_exit_within(AT_ONCE).code();
    assert_eq!(ended, Some(143), "{}", vm.log());
    assert!(vm.log().contains("within 1 s"), "{}", vm.log());
});

kvm_test!(file_size_limit_ends_no_guest_and_leaves_no_file, || {
    let (mut command, directory) = minivmm(Tiny::Greeter);
    let file = directory.path().join("console");
    with_signals(&mut command, &[], &[]);
    with_limit(&mut command, Resource::Fsize, 0);
    command.arg(format!("--console=file:{}", file.display()));
    command
        .env("XDG_RUNTIME_DIR", directory.path())
        .stdin(Stdio::null());
    let mut vm = Vm::spawn(command);
    let pid = vm.pid();
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.log());
    assert!(vm.log().contains("powered off"), "{}", vm.log());
    let user = rustix::process::geteuid().as_raw();
    for registry in [
        Path::new("/run/minivmm"),
        &Path::new("/run/minivmm").join(user.to_string()),
        &directory.path().join("minivmm"),
    ] {
        let left = registry.join(format!("{pid}.new"));
        assert!(!left.exists(), "{left:?}");
    }
});

kvm_test!(open_files_are_limited_by_the_hard_limit, || {
    let (mut command, _directory) = minivmm(Tiny::Echo);
    // Each vCPU takes one.
    command.args(["--cpus", "100"]).stdin(Stdio::piped());
    with_limit(&mut command, Resource::Nofile, 64);
    let mut vm = Vm::spawn(command);
    vm.wait_for("ready\n");
    vm.send(POWER_OFF);
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.log());
});

/// The ways to start another program, each of which runs `script`.
fn starters(script: &str) -> Vec<Starter> {
    let mut all = vec![Starter::qemu(script)];
    if is_root() {
        all.extend(["private", "host"].map(|placement| Starter::open(placement, script)));
    }
    all
}

/// A way to start another program.
struct Starter {
    command: Command,
    _directory: TempDir,
    _netns: Option<Netns>,
}

impl Starter {
    fn qemu(script: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("qemu");
        let version = "[ \"$1\" != --version ] || exec echo 'QEMU emulator version 7.2.22'";
        // A shell writes it: a program that this process has had open for writing may be busy.
        let write = format!("cat >'{}'", path.display());
        let text = format!("#!/bin/sh\n{version}\n{script}\n");
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{write} <<'END'\n{text}END\n")]);
        assert!(shell.status().unwrap().success());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new(binary());
        command.arg("qemu").arg("--qemu").arg(path);
        Self {
            command,
            _directory: directory,
            _netns: None,
        }
    }

    fn open(placement: &str, script: &str) -> Self {
        let netns = Netns::new();
        netns.wire("lower");
        let mut command = netns.command(binary());
        let spec = format!("lower,netns={placement}");
        command.args(["net", "open", &spec, "--", "sh", "-c", script]);
        Self {
            command,
            _directory: TempDir::new().unwrap(),
            _netns: Some(netns),
        }
    }
}

/// Runs a command to its end.
fn outcome(mut command: Command) -> Output {
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command.output().unwrap()
}

#[test]
fn status_of_a_program_is_passed_on_where_sigchld_is_ignored() {
    for mut starter in starters("exit 7") {
        with_signals(&mut starter.command, &[Nix::SIGCHLD], &[]);
        let output = outcome(starter.command);
        assert_eq!(output.status.code(), Some(7), "{output:?}");
    }
}

#[test]
fn program_gets_the_signals_and_limits_that_minivmm_was_given() {
    let script = "grep -e ^SigBlk -e ^SigIgn /proc/self/status; ulimit -S -n";
    let given = |mut command: Command| {
        with_signals(&mut command, &[Nix::SIGHUP], &[Nix::SIGUSR1, Nix::SIGTERM]);
        with_limit(&mut command, Resource::Nofile, 321);
        let output = outcome(command);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let mut plain = Command::new("sh");
    plain.args(["-c", script]);
    let expected = given(plain);
    assert!(expected.ends_with("\n321\n"), "{expected}");
    for starter in starters(script) {
        assert_eq!(given(starter.command), expected);
    }
}
