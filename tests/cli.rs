//! Bad input: a clear error, the right exit status, and nothing left. And the help.
//!
//! A message must name what was tried, on what, why not and, where there is one, the remedy. Each
//! test runs the program as a user would and looks at all of that.
//!
//! - `disk`, `initramfs`, `kernel`, `limits`, `kvm`, `macvtap`, `share`: what may be wrong with each
//! - this file: what they share, the console, and the help
//!
//! Not here: Wi-Fi. No machine without such a NIC can provoke it; the net crate tests it with a
//! sysfs of its own.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

#[path = "cli/disk.rs"]
mod disk;
mod harness;
#[path = "cli/initramfs.rs"]
mod initramfs;
#[path = "cli/kernel.rs"]
mod kernel;
#[path = "cli/kvm.rs"]
mod kvm;
#[path = "cli/limits.rs"]
mod limits;
#[path = "cli/macvtap.rs"]
mod macvtap;
#[path = "cli/share.rs"]
mod share;
#[path = "harness/tiny.rs"]
mod tiny;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use harness::eventually;
use harness::netns::{self, Netns, root_test};
use harness::vm::{Vm, binary, copy_program};
use harness::{guest_test, kvm_test};
use rustix::process::Signal;
use tempfile::TempDir;
use tiny::Tiny;

/// The exit status of a guest that could not be started, and that of a wrong command line.
const FAILED: i32 = 1;
const USAGE: i32 = 2;

/// What a run of minivmm gave.
#[derive(Debug)]
struct Run {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Runs a command to its end, which must come.
fn run(mut command: Command) -> Run {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
    if !eventually(|| child.try_wait().unwrap().is_some()) {
        let _ = child.kill();
        let output = child.wait_with_output().unwrap();
        panic!("{command:?} did not end: {output:?}");
    }
    let output = child.wait_with_output().unwrap();
    Run {
        status: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The refusal that a run must end with: this status, each of these texts in the message, and
/// nothing on stdout.
#[track_caller]
fn assert_refused(command: Command, status: i32, texts: &[&str]) {
    let shown = format!("{command:?}");
    let run = run(command);
    assert_eq!(run.status, Some(status), "{shown}: {run:?}");
    assert_eq!(run.stdout, "", "{shown}");
    for text in texts {
        assert!(
            run.stderr.contains(text),
            "{shown} does not say {text:?}:\n{}",
            run.stderr
        );
    }
    // One message, in one line: clap adds a line about --help.
    let lines = run.stderr.lines().filter(|line| line.contains("error: "));
    assert_eq!(lines.count(), 1, "{shown}:\n{}", run.stderr);
    assert!(!run.stderr.contains("panicked"), "{shown}:\n{}", run.stderr);
}

fn minivmm<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(binary());
    command.args(args).env_remove("RUST_LOG");
    command
}

/// A directory of the test's with a kernel, `guest`, that greets and powers off.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        let files = Self(TempDir::new().unwrap());
        // For the tests that run as user nobody.
        fs::set_permissions(files.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Tiny::Greeter.write(&files.path("guest"));
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The path of a file with this content.
    fn file(&self, name: &str, content: &[u8]) -> String {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        text(&path)
    }

    fn guest(&self) -> String {
        text(&self.path("guest"))
    }

    /// minivmm with the guest and these arguments.
    fn boot(&self, args: &[&str]) -> Command {
        let guest = self.guest();
        minivmm(["--kernel", &guest].iter().chain(args))
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// The device nodes of all macvtaps.
fn tap_nodes() -> BTreeSet<String> {
    let names = fs::read_dir("/dev").unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names
        .filter(|name| {
            name.strip_prefix("tap")
                .is_some_and(|n| n.parse::<u32>().is_ok())
        })
        .collect()
}

/// Has `command` run in a namespace.
fn inside(netns: &Netns, command: &Command) -> Command {
    let mut moved = netns.command(command.get_program());
    moved.args(command.get_args()).env_remove("RUST_LOG");
    moved
}

/// Asserts that each value of `option` is refused as a wrong command line, with the option, the
/// value and this text.
#[track_caller]
fn assert_bad_values(option: &str, cases: &[(&str, &str)]) {
    let files = Files::new();
    for (value, why) in cases {
        let argument = format!("{option}={value}");
        assert_refused(
            files.boot(&[&argument]),
            USAGE,
            &[option, &format!("'{value}'"), why],
        );
    }
}

// ---- console ----

#[test]
fn console_that_makes_no_sense_is_refused() {
    let choice = "stdio, none and file:PATH";
    assert_bad_values(
        "--console",
        &[("telnet", choice), ("file:", choice), ("", choice)],
    );
}

kvm_test!(console_file_that_cannot_be_written_is_refused, || {
    let files = Files::new();
    for (path, why) in [("/nosuch/log", "No such file"), ("/proc", "directory")] {
        assert_refused(
            files.boot(&["--console", &format!("file:{path}")]),
            FAILED,
            &["console", path, why],
        );
    }
});

kvm_test!(console_file_that_is_a_boot_file_is_refused_and_kept, || {
    let files = Files::new();
    let before = fs::read(files.path("guest")).unwrap();
    std::os::unix::fs::symlink(files.path("guest"), files.path("link")).unwrap();
    for name in ["guest", "link"] {
        let path = text(&files.path(name));
        let console = format!("--console=file:{path}");
        assert_refused(files.boot(&[&console]), FAILED, &["console", &path]);
    }
    assert_eq!(fs::read(files.path("guest")).unwrap(), before);
});

kvm_test!(files_of_two_uses_are_refused_and_kept, || {
    let files = Files::new();
    let before = fs::read(files.path("guest")).unwrap();
    let (guest, log) = (files.guest(), files.file("log", b"kept\n"));
    let on_guest = format!("--macvtap=nosuch0,pcap={guest}");
    let on_log = format!("--macvtap=nosuch0,pcap={log}");
    let console = format!("--console=file:{log}");
    for (args, written, read) in [
        (&[&on_guest][..], "capture", "is the kernel too"),
        (&[&on_log, &console], "capture", "is the console too"),
        (&[&on_log, &on_log], "capture", "capture too"),
    ] {
        let args: Vec<_> = args.iter().map(|text| text.as_str()).collect();
        assert_refused(files.boot(&args), FAILED, &[written, read]);
    }
    let console = format!("--console=file:{guest}");
    let mut qemu = minivmm(["qemu", "--qemu=/bin/false", "--kernel", &guest]);
    qemu.arg(console);
    assert_refused(qemu, FAILED, &["the console cannot", "is the kernel too"]);
    assert_eq!(fs::read(files.path("guest")).unwrap(), before);
    assert_eq!(fs::read_to_string(log).unwrap(), "kept\n");
});

kvm_test!(console_file_that_has_the_log_is_refused, || {
    let files = Files::new();
    let log = files.file("log", b"before\n");
    let mut command = files.boot(&[&format!("--console=file:{log}")]);
    let stderr = File::options().append(true).open(&log).unwrap();
    let status = command.stdin(Stdio::null()).stderr(stderr).status();
    assert_eq!(status.unwrap().code(), Some(FAILED));
    let text = fs::read_to_string(log).unwrap();
    assert!(text.starts_with("before\n"), "{text}");
    assert!(text.contains("which is the log too"), "{text}");
});

kvm_test!(fifo_without_a_reader_is_awaited_with_a_warning, || {
    let files = Files::new();
    let fifo = files.path("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    for (option, status, written) in [
        ("--console=file:", 0, "hi\n"),
        ("--macvtap=nosuch0,pcap=", FAILED, ""),
    ] {
        let mut command = files.boot(&[&format!("{option}{}", fifo.display())]);
        command.stdin(Stdio::null());
        let mut vm = Vm::spawn(command);
        vm.wait_for_log("waiting for a program to open the FIFO");
        assert_eq!(fs::read_to_string(&fifo).unwrap(), written);
        assert_eq!(vm.wait_exit().code(), Some(status), "{}", vm.log());
    }
});

kvm_test!(console_file_of_a_start_that_fails_is_kept, || {
    let files = Files::new();
    let log = files.file("console.log", b"of the last run\n");
    let console = format!("--console=file:{log}");
    let command = files.boot(&[&console, "--macvtap=nosuch0"]);
    assert_refused(command, FAILED, &["nosuch0"]);
    assert_eq!(fs::read_to_string(log).unwrap(), "of the last run\n");
});

kvm_test!(console_file_gets_what_the_guest_writes, || {
    let files = Files::new();
    let log = files.file("console.log", b"what was here before is gone\n");
    let guest = run(files.boot(&["--console", &format!("file:{log}")]));
    assert_eq!(
        (guest.status, guest.stdout.as_str()),
        (Some(0), ""),
        "{guest:?}"
    );
    assert_eq!(fs::read_to_string(log).unwrap(), "hi\n");
});

kvm_test!(console_on_a_full_disk_is_warned_of_once, || {
    let files = Files::new();
    let guest = run(files.boot(&["--console=file:/dev/full"]));
    assert_eq!(guest.status, Some(0), "{guest:?}");
    assert!(guest.stderr.contains("the guest powered off"), "{guest:?}");
    let warning = "cannot write the console to \"/dev/full\"";
    assert_eq!(guest.stderr.matches(warning).count(), 1, "{guest:?}");
    assert!(guest.stderr.contains("No space left"), "{guest:?}");
    let lost = "3 bytes of the console are lost";
    assert!(guest.stderr.contains(lost), "{guest:?}");
});

kvm_test!(console_none_leaves_stdout_empty, || {
    let guest = run(Files::new().boot(&["--console=none", "-qqq"]));
    let Run {
        status,
        stdout,
        stderr,
    } = guest;
    assert_eq!(
        (status, stdout.as_str(), stderr.as_str()),
        (Some(0), "", "")
    );
});

// ---- tests that are skipped ----

/// What a test does that cannot run here, twice; run by the test below.
#[test]
#[ignore = "a child of skipped_tests_are_reported_and_fail_in_ci"]
fn left_out_child() {
    harness::skip::leave_out("reason one");
    harness::skip::leave_out("reason one");
    harness::skip::leave_out("reason two");
}

#[test]
fn skipped_tests_are_reported_and_fail_in_ci() {
    let child = |ci: bool| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "left_out_child"]);
        command.env_remove("CI").env_remove("RUST_TEST_NOCAPTURE");
        if ci {
            command.env("CI", "true");
        }
        run(command)
    };
    let skipped = child(false);
    assert_eq!(skipped.status, Some(0), "{skipped:?}");
    for reason in ["NOT TESTED: reason one", "NOT TESTED: reason two"] {
        let times = skipped.stderr.matches(reason).count();
        assert_eq!(times, 1, "{reason}: {skipped:?}");
    }
    let failed = child(true);
    assert_eq!(failed.status, Some(101), "{failed:?}");
    assert!(failed.stdout.contains("reason one"), "{failed:?}");
}

// ---- help ----

#[test]
fn help_shows_groups_examples_and_exit_codes_in_100_columns() {
    let help = run(minivmm(["--help"]));
    assert_eq!((help.status, help.stderr.as_str()), (Some(0), ""));
    for part in [
        "Usage: minivmm",
        "Guest:",
        "Network:",
        "Log:",
        "Examples:",
        "Exit status:",
        "--macvtap eno1",
        "Ctrl-A x",
    ] {
        assert!(help.stdout.contains(part), "no {part:?}:\n{}", help.stdout);
    }
    for code in ["0", "1", "2", "3", "4", "128+N"] {
        let explained = |line: &str| line.trim_start().starts_with(&format!("{code}  "));
        assert!(
            help.stdout.lines().any(explained),
            "{code}:\n{}",
            help.stdout
        );
    }
    for line in help.stdout.lines() {
        assert!(line.chars().count() <= 100, "too wide: {line}");
    }
}

#[test]
fn help_ends_with_the_examples() {
    for (arguments, last) in [
        (
            &["--help"][..],
            "minivmm ps; minivmm console web; minivmm stop web\n",
        ),
        (
            &["qemu", "--help"],
            "netdev=macvtap0,mac=52:54:00:12:34:56 ...\n",
        ),
    ] {
        let help = run(minivmm(arguments)).stdout;
        let at = |part: &str| {
            help.find(part)
                .unwrap_or_else(|| panic!("no {part}:\n{help}"))
        };
        assert!(at("\nKeys of --macvtap") < at("\nExit status:"), "{help}");
        assert!(at("\nExit status:") < at("\nExamples:"), "{help}");
        assert!(help.ends_with(last), "{help}");
    }
}

kvm_test!(rust_log_overrules_the_options, || {
    let files = Files::new();
    let with = |value: &str, option: &str| {
        let mut command = files.boot(&[option]);
        command.env("RUST_LOG", value);
        let guest = run(command);
        assert_eq!((guest.status, guest.stdout.as_str()), (Some(0), "hi\n"));
        guest.stderr
    };
    assert_eq!(with("error", "-vv"), "");
    let log = with("vmm=info", "-qqq");
    assert!(log.contains("the guest powered off"), "{log:?}");
    // One part alone: another one's level stays what it is without a word about it.
    assert_eq!(with("boot=trace", "-q"), "");
});

#[test]
fn version_is_the_packages() {
    let version = run(minivmm(["--version"]));
    let expected = format!("minivmm {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!((version.status, version.stdout), (Some(0), expected));
}

#[test]
fn no_argument_is_refused_with_the_usage() {
    let none: [&str; 0] = [];
    assert_refused(
        minivmm(none),
        USAGE,
        &["--kernel <PATH>", "Usage: minivmm", "--help"],
    );
}
