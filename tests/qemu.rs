//! `minivmm qemu`, with Debian's QEMU: with its translator natively, for which no KVM is needed, and with KVM and
//! vhost-net where Linux guests run, here or in the lab.
//!
//! - `native`: the options of the native monitor
//! - `machines`: machines that QEMU alone can be
//! - `ends`: ends, refusals and failures
//! - `control`: QMP, served by minivmm
//! - `kvm`: with KVM and vhost-net
//! - `script`: `--dry-run`
//! - `terminal`: the terminal at each end
//! - `wrapper`: scripts in QEMU's place
//! - this file: what they share

#[path = "qemu/control.rs"]
mod control;
#[path = "qemu/ends.rs"]
mod ends;
mod harness;
#[path = "qemu/kvm.rs"]
mod kvm;
mod lab;
#[path = "qemu/machines.rs"]
mod machines;
#[path = "qemu/native.rs"]
mod native;
#[path = "qemu/script.rs"]
mod script;
#[path = "qemu/terminal.rs"]
mod terminal;
#[path = "qemu/wrapper.rs"]
mod wrapper;

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::Duration;

use harness::assets::assets;
use harness::linux::initrd;
use harness::netns::{Netns, is_root};
use harness::site::{Site, address, pings};
use harness::skip;
use harness::vm::{Vm, binary, copy_program};
use harness::{AT_ONCE, PATIENCE, eventually};
use rustix::process::{Pid, Signal, kill_process};
use vmm::probe::{Privileged, probe};

const SECOND: Duration = Duration::from_secs(1);
/// For a kernel that runs by translation: on a loaded machine its test of the timer can fail, and
/// it panics then.
const STEADY: &str = "no_timer_check";

impl Site {
    /// `minivmm qemu ARGS` in the host's namespace.
    fn qemu<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.host.command(binary());
        command.arg("qemu").args(args).stdin(Stdio::piped());
        command
    }

    /// Boots the native monitor's guest in QEMU, and waits for its prompt.
    fn boot(&self, args: &[&str]) -> Vm {
        let (kernel, initrd) = (assets().bzimage(), initrd());
        let mut command = self.qemu(["--kernel".as_ref(), kernel.as_os_str()]);
        command.arg("--initrd").arg(initrd).args(args);
        command.args(["--cmdline", STEADY]);
        ready(command)
    }

    /// Whether a macvlan with this address comes up: not while another link has the address.
    fn mac_is_free(&self, mac: &str) -> bool {
        self.host.ip(&format!(
            "link add link wire name probe address {mac} type macvlan mode private"
        ));
        let up = self.host.exec(&["ip", "link", "set", "probe", "up"]);
        self.host.ip("link del probe");
        up.status.success()
    }
}

/// Leave to run guests by translation, of which a machine can run few at a time within their
/// limits.
struct Permit;

static PERMITS: Mutex<u32> = Mutex::new(2);
static RETURNED: Condvar = Condvar::new();

impl Permit {
    fn get() -> Self {
        let free = PERMITS.lock().expect("no holder panics");
        let mut free = RETURNED
            .wait_while(free, |free| *free == 0)
            .expect("no holder panics");
        *free -= 1;
        Self
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *PERMITS.lock().expect("no holder panics") += 1;
        RETURNED.notify_one();
    }
}

/// A test whose guests run by translation.
macro_rules! tcg_test {
    ($name:ident, $body:expr) => {
        #[test]
        fn $name() {
            $crate::by_translation($body);
        }
    };
}
use tcg_test;

/// Runs a test's body with root and a [`Permit`], and not a second time inside the lab.
fn by_translation(body: impl FnOnce()) {
    if lab::place() != lab::Place::InsideLab && is_root() {
        let _permit = Permit::get();
        body();
    }
}

/// Whether this machine's KVM runs a stock Linux.
fn kvm_is_native() -> bool {
    matches!(probe(), Ok(Privileged::Native))
}

/// Starts a command whose guest has our init, and waits for its prompt.
fn ready(command: Command) -> Vm {
    let mut vm = Vm::spawn(command);
    vm.wait_for("GUEST ready\n");
    vm
}

/// The processes that `pid` and its descendants have started, parents first.
fn descendants(pid: u32) -> Vec<u32> {
    let parent = |path: PathBuf| {
        let status = fs::read_to_string(path.join("status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        line.and_then(|text| text.trim().parse::<u32>().ok())
    };
    let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let children: Vec<u32> = entries
        .filter(|entry| parent(entry.path()) == Some(pid))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    let below = children.iter().flat_map(|child| descendants(*child));
    children.iter().copied().chain(below).collect()
}

/// The QEMU that a minivmm or a script runs with its NICs; a trial or a look at its version has
/// none.
fn qemu_of(pid: u32) -> Option<u32> {
    let has_nics = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        text(&line).contains("id=macvtap0")
    };
    descendants(pid).into_iter().find(has_nics)
}

/// Waits for [`qemu_of`].
fn wait_for_qemu(pid: u32) -> u32 {
    let mut qemu = None;
    assert!(
        eventually(|| {
            qemu = qemu_of(pid);
            // Between fork and exec the line is still minivmm's own.
            qemu.is_some_and(|qemu| {
                fs::read_to_string(format!("/proc/{qemu}/comm"))
                    .is_ok_and(|comm| comm.starts_with("qemu"))
            })
        }),
        "QEMU does not run"
    );
    qemu.expect("it was found")
}

/// Runs minivmm to an end that comes soon; its status, stdout and stderr.
fn outcome(mut command: Command) -> Output {
    command.stdin(Stdio::null());
    command.output().expect("minivmm starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
