//! Ways to a network: queues that others have opened, programs without rights, macvtaps that `ip
//! link` shows, keys, and the host's own access to its guests. Each with the freestanding test
//! guest on this machine's `/dev/kvm`, in namespaces that the test makes.
//!
//! - `descriptors`: queues that others have opened
//! - `open`: `minivmm net open`
//! - `programs`, `terminal`: what its programs get, and what of root's they do not
//! - `links`: macvtaps that `ip link` shows, keys, lowers in other namespaces
//! - `host_link`: the host's own access
//! - `shared`: one NIC for one interface
//! - this file: what they share, and how subcommands answer
//!
//! An ordinary user's `/dev/kvm` is a node of the test's own in a private mount namespace: the
//! machine's is left alone.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

#[path = "access/descriptors.rs"]
mod descriptors;
mod harness;
#[path = "access/host_link.rs"]
mod host_link;
#[path = "access/links.rs"]
mod links;
#[path = "access/open.rs"]
mod open;
#[path = "access/programs.rs"]
mod programs;
#[path = "access/shared.rs"]
mod shared;
#[path = "access/terminal.rs"]
mod terminal;

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;

use harness::elf::elf;
use harness::eventually;
use harness::guest::{self, Net, PEER, addresses};
use harness::guest_test;
use harness::netns::skip::leave_out;
use harness::netns::{self, Netns, root_test};
use harness::process::is_running;
use harness::vm::{Vm, binary, copy_program};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open};
use tempfile::TempDir;

/// The exit status of what could not be done, and that of a wrong command line.
const FAILED: i32 = 1;
const USAGE: i32 = 2;

/// The MAC address where a test chooses one.
const MAC: &str = "02:00:00:00:33:01";

/// An ordinary user of the test's own, in two groups.
const USER: &str = "access-test";
const USER_ID: u32 = 42_420;

/// Opens /dev/kvm to all and makes [`USER`] known, in the mount namespace of `ip netns exec`.
const AS_ON_A_DESKTOP: &str = r#"
cd "$FILES"
mount -t tmpfs -o mode=755 none dev
cp -a /dev/kvm dev/kvm
chmod 666 dev/kvm
mount --bind dev/kvm /dev/kvm
mount --bind passwd /etc/passwd
mount --bind group /etc/group
exec "$@"
"#;

/// A network, and what a user without rights can read: minivmm and the guest.
struct Place {
    net: Net,
    files: TempDir,
}

impl Place {
    fn new() -> Self {
        let files = TempDir::new().unwrap();
        let path = |name: &str| files.path().join(name);
        fs::set_permissions(files.path(), fs::Permissions::from_mode(0o755)).unwrap();
        copy_program(binary(), path("minivmm"));
        fs::copy(elf(), path("guest")).unwrap();
        fs::create_dir(path("dev")).unwrap();
        let add = |file: &str, lines: String| {
            let known = fs::read_to_string(format!("/etc/{file}")).unwrap();
            fs::write(path(file), known + &lines).unwrap();
        };
        add(
            "passwd",
            format!("{USER}:x:{USER_ID}:{USER_ID}::/:/bin/sh\n"),
        );
        add(
            "group",
            format!(
                "{USER}:x:{USER_ID}:\n{USER}-more:x:{}:{USER}\n",
                USER_ID + 1
            ),
        );
        Self {
            net: Net::new(),
            files,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// minivmm on the network's host.
    fn minivmm(&self, args: &[&str]) -> Command {
        minivmm(&self.net.host, args)
    }

    /// minivmm, where `/dev/kvm` is open to all and [`USER`] exists.
    fn minivmm_on_a_desktop(&self, args: &[&str]) -> Command {
        let mut command = self.net.host.command("sh");
        command
            .args(["-ec", AS_ON_A_DESKTOP, "sh"])
            .arg(self.path("minivmm"))
            .args(args)
            .env("FILES", self.files.path())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command
    }

    /// `minivmm net open ARGS` there, started by way of another program.
    fn open_by(&self, way: &[&str], args: &[&str]) -> Command {
        let minivmm = self.path("minivmm");
        let mut command = self.net.host.command("sh");
        command
            .args(["-ec", AS_ON_A_DESKTOP, "sh"])
            .args(way)
            .arg(minivmm)
            .args(["net", "open"])
            .args(args)
            .env("FILES", self.files.path())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command
    }

    /// A macvtap `name`, as a user would make it; returns its node, of the test's own. (`/dev/tapN`
    /// could be another's.)
    fn macvtap(&self, name: &str) -> PathBuf {
        self.net.host.macvtap(name, "lower", "bridge");
        // Its multicast filter is for the host's own groups, and the guest's IPv6 needs others.
        self.net
            .host
            .ip(&format!("link set {name} allmulticast on"));
        let show = format!("cat /sys/class/net/{name}/tap*/dev");
        let shown = self.net.host.exec(&["sh", "-c", &show]);
        let numbers = String::from_utf8(shown.stdout).unwrap();
        let (major, minor) = numbers.trim().split_once(':').unwrap();
        let node = self.path(name);
        let made = Command::new("mknod")
            .arg(&node)
            .args(["c", major, minor])
            .status();
        assert!(made.unwrap().success());
        node
    }

    /// The arguments that run the guest with this number.
    fn guest(&self, number: u8, options: &str) -> Vec<String> {
        let kernel = self.path("guest").to_str().unwrap().to_owned();
        let line = guest_line(number, options);
        ["--kernel", &kernel, "--memory", "128M", "--cmdline", &line]
            .map(str::to_owned)
            .to_vec()
    }

    /// Starts a guest that serves, by these further arguments.
    fn serve(&self, number: u8, args: &[&str]) -> Vm {
        let guest = self.guest(number, "mode=echo");
        self.until_it_serves(Vm::spawn(self.minivmm(&with(&guest, args))))
    }

    fn until_it_serves(&self, mut vm: Vm) -> Vm {
        vm.wait_for("READY echo\n");
        // An earlier guest with its address had another MAC address, and this one is silent until
        // it is asked.
        for neighbour in [&self.net.far, &self.net.host] {
            neighbour.ip("neigh flush all");
        }
        vm
    }

    /// minivmm with a redirection of a shell's for its descriptors; `inherited` is its stdin before
    /// that.
    fn redirected(&self, redirection: &str, inherited: impl Into<Stdio>, args: &[&str]) -> Command {
        let script = format!("exec \"$@\" {redirection} 0</dev/null");
        let mut command = self.net.host.command("sh");
        command.args(["-ec", &script, "sh"]).arg(binary());
        command.args(args).env_remove("RUST_LOG").stdin(inherited);
        command
    }

    /// Whether another interface can come up with [`MAC`], as soon as what the kernel does on its
    /// own is done.
    fn mac_gets_free(&self) -> bool {
        let host = &self.net.host;
        eventually(|| {
            host.ip(&format!(
                "link add link lower name probe address {MAC} type macvlan mode bridge"
            ));
            let is_free = host
                .exec(&["ip", "link", "set", "probe", "up"])
                .status
                .success();
            host.ip("link del probe");
            is_free
        })
    }
}

fn minivmm(netns: &Netns, args: &[&str]) -> Command {
    let mut command = netns.command(binary());
    command
        .args(args)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null());
    command
}

fn with<'a>(first: &'a [String], then: &[&'a str]) -> Vec<&'a str> {
    first
        .iter()
        .map(String::as_str)
        .chain(then.iter().copied())
        .collect()
}

/// The guest's command line: its addresses and its own options.
fn guest_line(number: u8, options: &str) -> String {
    let [ip, ip6] = addresses(number);
    let options = options
        .split_whitespace()
        .map(|option| format!("guest.{option} "));
    options.collect::<String>() + &format!("guest.ip={ip}/24 guest.ip6={ip6}/64")
}

/// What a run of minivmm gave.
#[derive(Debug)]
struct Run {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

fn run(command: Command) -> Run {
    finish(Vm::spawn(command))
}

fn finish(mut vm: Vm) -> Run {
    let status = vm.wait_exit();
    Run {
        status,
        stdout: vm.console(),
        stderr: vm.log(),
    }
}

/// A run that must succeed; returns what it wrote on stdout. Errors and warnings it must not have.
#[track_caller]
fn succeeds(command: Command) -> String {
    let run = run(command);
    assert_eq!(run.status.code(), Some(0), "{run:?}");
    for word in ["error: ", "warn: "] {
        assert!(!run.stderr.contains(word), "{run:?}");
    }
    run.stdout
}

/// A run that must be refused: with this status, with these texts in one error on stderr, and
/// nothing on stdout.
#[track_caller]
fn is_refused(command: Command, status: i32, texts: &[&str]) {
    let shown = format!("{command:?}");
    let run = run(command);
    assert_eq!(run.status.code(), Some(status), "{shown}: {run:?}");
    assert_eq!(run.stdout, "", "{shown}");
    for text in texts {
        assert!(run.stderr.contains(text), "no {text:?}: {shown}: {run:?}");
    }
    let errors = run.stderr.lines().filter(|line| line.contains("error: "));
    assert_eq!(errors.count(), 1, "{shown}: {run:?}");
}

/// Waits for minivmm's end after two SIGTERMs, since the test guest does not know the power button.
fn terminate(mut vm: Vm) {
    vm.signal(Signal::TERM);
    vm.wait_for_log("power button");
    vm.signal(Signal::TERM);
    let status = vm.wait_exit();
    assert_eq!(status.code(), Some(128 + 15), "{}", vm.transcript());
}

fn kill(mut vm: Vm) {
    vm.signal(Signal::KILL);
    assert_eq!(vm.wait_exit().signal(), Some(9));
}

/// The value after `word`, in `ip`'s and in our own listings.
fn after<'a>(text: &'a str, word: &str) -> &'a str {
    let mut words = text.split_whitespace().skip_while(|found| *found != word);
    let value = words.nth(1);
    value.unwrap_or_else(|| panic!("no {word} in {text}"))
}

/// The MAC address that the guest's NIC says it has.
fn mac_in_guest(console: &str) -> &str {
    let line = console.lines().find(|line| line.starts_with("NIC 0 "));
    let mut words = line.unwrap_or_else(|| panic!("{console}")).split(' ');
    words.find_map(|word| word.strip_prefix("mac=")).unwrap()
}

// Exit status and streams.

guest_test!(subcommands_answer_on_stdout_and_complain_on_stderr, || {
    let place = Place::new();
    assert_eq!(succeeds(place.minivmm(&["net", "gc"])), "");
    let vm = place.serve(2, &["--macvtap", "lower"]);
    assert_eq!(place.net.datagram(&addresses(2)[0], b"hello"), b"hello");
    // The list shows the address a moment later.
    let listing = || succeeds(place.minivmm(&["net", "list", "lower"]));
    let own = format!("guest of pid {}", vm.pid());
    let is_listed = eventually(|| {
        let listing = listing();
        listing.contains(&own) && listing.contains(&addresses(2)[0])
    });
    assert!(is_listed, "{}", listing());
    let json = succeeds(place.minivmm(&["net", "list", "--json"]));
    serde_json::from_str::<serde_json::Value>(&json).unwrap();
    place.net.quit(2, vm);
    assert!(!listing().contains(&own), "{}", listing());

    is_refused(
        place.minivmm(&["net", "list", "nolink"]),
        FAILED,
        &["nolink"],
    );
    let run_of_net = run(place.minivmm(&["net"]));
    assert_eq!(run_of_net.status.code(), Some(USAGE), "{run_of_net:?}");
    assert!(run_of_net.stderr.contains("Usage"), "{run_of_net:?}");
    assert_eq!(run_of_net.stdout, "");
    is_refused(place.minivmm(&["net", "frob"]), USAGE, &["frob"]);
    is_refused(place.minivmm(&["net", "gc", "--json"]), USAGE, &["--json"]);
    for help in [&["net", "--help"][..], &["net", "open", "--help"]] {
        assert!(succeeds(place.minivmm(help)).contains("Usage"));
    }
    let run = run(place.minivmm(&["doctor", "nolink"]));
    assert_eq!(run.status.code(), Some(FAILED), "{run:?}");
    assert!(run.stdout.contains("nolink"), "{run:?}");
});
