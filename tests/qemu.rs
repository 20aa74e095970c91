//! `minivmm qemu`, with Debian's QEMU: with its translator natively, for which no KVM is needed, and with KVM and
//! vhost-net where Linux guests run, here or in the lab.

mod harness;
#[path = "qemu/kvm.rs"]
mod kvm;
mod lab;
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
use std::time::{Duration, Instant};

use harness::assets::{assets, cache_dir, lock};
use harness::linux::initrd;
use harness::netns::{Netns, is_root};
use harness::site::{Site, address, pings};
use harness::skip;
use harness::vm::{Vm, binary, copy_program};
use rustix::process::{Pid, Signal, kill_process};
use vmm::probe::{Privileged, probe};

const SECOND: Duration = Duration::from_secs(1);
/// From start to the prompt of our init; 5 s alone, more beside other tests.
const BOOT: Duration = Duration::from_secs(120);
/// For a kernel that runs by translation: on a loaded machine its test of the timer can fail, and it panics then.
const STEADY: &str = "no_timer_check";
/// The reference client of QMP, from PyPI.
const QMP_CLIENT: &str = "qemu.qmp==0.0.3";

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

/// Leave to run guests by translation, of which a machine can run few at a time within their limits.
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
    vm.wait_for("GUEST ready\n", BOOT);
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

/// The QEMU that a minivmm or a script runs with its NICs; a trial or a look at its version has none.
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
    eventually(BOOT, "QEMU runs", || {
        qemu = qemu_of(pid);
        // Between fork and exec the line is still minivmm's own.
        qemu.is_some_and(|qemu| {
            fs::read_to_string(format!("/proc/{qemu}/comm"))
                .is_ok_and(|comm| comm.starts_with("qemu"))
        })
    });
    qemu.expect("it was found")
}

/// Waits until `what` holds.
fn eventually(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        thread::sleep(SECOND / 20);
    }
}

/// Runs minivmm to an end that comes soon; its status, stdout and stderr.
fn outcome(mut command: Command) -> Output {
    command.stdin(Stdio::null());
    command.output().expect("minivmm starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

tcg_test!(kernel_guest_has_the_macvtaps_mac_and_powers_off, || {
    let site = Site::new();
    let args = ["--macvtap", "wire,mac=02:aa:00:00:00:0b", "--accel", "auto"];
    let mut vm = site.boot(&[&args[..], &["--cpus", "2", "--memory", "400M"]].concat());
    assert_eq!(
        vm.run("cat /sys/class/net/eth0/address").trim(),
        "02:aa:00:00:00:0b"
    );
    assert_eq!(vm.run("nproc").trim(), "2");
    let cmdline = vm.run("cat /proc/cmdline");
    assert!(cmdline.starts_with("console=ttyS0 reboot=panic_warm panic=-1"));
    assert!(site.host.links() == ["wire"], "{:?}", site.host.links());
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
    assert!(site.peer.pings("192.168.77.11", 3));
    vm.send("1 poweroff -f\n");
    assert_eq!(vm.wait_exit(20 * SECOND).code(), Some(0));
    assert!(vm.log().contains("powered off"), "{}", vm.log());
    // That it takes long is not left unsaid.
    let warned = vm.log().contains("by emulation (TCG)");
    assert_eq!(warned, !kvm_is_native(), "{}", vm.log());
    assert!(site.mac_is_free("02:aa:00:00:00:0b"));
});

tcg_test!(options_of_the_native_monitor_switch_with_one_word, || {
    let site = Site::new();
    let mut command = site.host.command(binary());
    command.args(["-q", "qemu", "--accel", "tcg", "--macvtap", "wire"]);
    command.args(["--host-link", "192.168.78.9/24", "--transport", "pci"]);
    command.args(["--cmdline", STEADY]);
    command.arg("--kernel").arg(assets().bzimage());
    command.arg("--initrd").arg(initrd()).stdin(Stdio::piped());
    let mut vm = ready(command);
    assert!(!vm.log().contains("info"), "{}", vm.log());
    vm.run("ip link set eth0 up && ip addr add 192.168.78.11/24 dev eth0");
    assert!(pings(&mut vm, "192.168.78.9"), "{}", vm.transcript());
    vm.send("1 poweroff -f\n");
    assert_eq!(vm.wait_exit(20 * SECOND).code(), Some(0));
    assert_eq!(site.host.links(), ["wire"], "the host's link is deleted");

    let output = outcome(site.qemu(["--kernel", "k", "--transport", "mmio"]));
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr).contains("virtio_pci"),
        "{}",
        text(&output.stderr)
    );
});

tcg_test!(two_guests_talk_and_one_has_several_queues, || {
    let site = Site::new();
    let several = [
        "--macvtap",
        "wire,queues=2",
        "--cpus",
        "2",
        "--accel",
        "tcg",
    ];
    let (mut a, mut b) = thread::scope(|scope| {
        let a = scope.spawn(|| site.boot(&several));
        let b = site.boot(&["--macvtap", "wire", "--accel", "tcg"]);
        (a.join().expect("the first guest boots"), b)
    });
    let queues = a.run("ls -d /sys/class/net/eth0/queues/rx-* | wc -l");
    assert_eq!(queues.trim(), "2");
    let vectors = a.run("grep -c virtio /proc/interrupts");
    // The configuration's, and two for each pair of queues; the control queue's comes with its first use.
    assert!(vectors.trim().parse::<u32>().unwrap() >= 5, "{vectors}");
    address(&mut a, "eth0", 11);
    address(&mut b, "eth0", 12);
    assert!(pings(&mut a, "192.168.77.12"), "{}", a.transcript());
    assert!(pings(&mut b, "192.168.77.11"));
    // Several flows, so that each of the queues gets some.
    for _ in 0..8 {
        assert!(pings(&mut a, "192.168.77.3"));
    }
});

tcg_test!(kernel_guest_ends_as_in_the_native_monitor, || {
    let site = Site::new();
    for (command, status, words) in [
        ("reboot -f", 0, "asked for a reboot"),
        ("echo c >/proc/sysrq-trigger", 4, "panicked"),
    ] {
        let mut vm = site.boot(&["--accel", "tcg"]);
        assert_eq!(vm.run("ls /sys/class/net").trim(), "lo");
        vm.send(&format!("1 {command}\n"));
        let code = vm.wait_exit(20 * SECOND).code();
        assert_eq!(code, Some(status), "{command}\n{}", vm.transcript());
        assert!(vm.log().contains(words), "{}", vm.log());
    }
});

tcg_test!(signals_press_the_power_button_and_a_second_one_ends, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("console");
    let console = format!("file:{}", file.display());
    let read = || fs::read_to_string(&file).unwrap_or_default();
    let (kernel, initrd) = (assets().bzimage(), initrd());
    let mut command = site.qemu(["--accel", "tcg", "--console", &console, "--kernel"]);
    command.arg(&kernel).arg("--initrd").arg(&initrd);
    command.args(["--cmdline", STEADY]);
    let mut vm = Vm::spawn(command);
    eventually(BOOT, "the guest boots", || read().contains("GUEST ready"));
    vm.signal(Signal::QUIT);
    assert_eq!(vm.wait_exit(20 * SECOND).code(), Some(0));
    assert!(read().contains("GUEST power button"), "{}", read());
    assert_eq!(vm.console(), "", "the console is in the file");

    let mut vm = site.boot(&["--accel", "tcg"]);
    vm.run("killall head");
    for signal in [Signal::HUP, Signal::INT] {
        vm.signal(signal);
        thread::sleep(2 * SECOND);
        assert_eq!(vm.has_ended(), signal == Signal::INT, "{}", vm.transcript());
    }
    assert_eq!(vm.wait_exit(20 * SECOND).code(), Some(130));
    assert!(vm.log().contains("signal 1: pressing"), "{}", vm.log());

    let mut vm = site.boot(&["--accel", "tcg"]);
    vm.signal(Signal::TERM);
    assert_eq!(vm.wait_exit(20 * SECOND).code(), Some(0));
});

tcg_test!(nothing_is_left_when_either_process_is_killed, || {
    let site = Site::new();
    let mac = "02:aa:00:00:00:0c";
    for (placement, victim, user) in [
        ("private", "minivmm", "root"),
        ("private", "minivmm", "nobody"),
        ("private", "qemu", "root"),
        ("host", "qemu", "root"),
        ("host", "minivmm", "nobody"),
    ] {
        let nic = format!("wire,mac={mac},netns={placement}");
        let args = ["--macvtap", &nic, "--", "-M", "q35", "-nodefaults", "-S"];
        let mut command = site.qemu(args);
        command.args(["-display", "none", "-accel", "tcg", "-serial", "stdio"]);
        // The kernel forgets at a change of user what QEMU is to die with.
        command.args(["-runas", user]);
        let mut vm = Vm::spawn(command);
        let qemu = wait_for_qemu(vm.pid());
        let is_users = || {
            let status = fs::read_to_string(format!("/proc/{qemu}/status")).unwrap_or_default();
            status.contains("\nUid:\t0\t") == (user == "root")
        };
        eventually(BOOT, "QEMU has its user", is_users);
        assert!(!site.mac_is_free(mac), "in use while QEMU runs");
        let links = site.host.links().len();
        assert_eq!(links, if placement == "host" { 2 } else { 1 });
        if victim == "qemu" {
            kill_process(Pid::from_raw(qemu as i32).unwrap(), Signal::KILL).unwrap();
            assert_eq!(vm.wait_exit(20 * SECOND).code(), Some(137));
            assert!(vm.log().contains("killed by signal 9"), "{}", vm.log());
        } else {
            vm.signal(Signal::KILL);
            vm.wait_exit(20 * SECOND);
        }
        let gone = || !Path::new(&format!("/proc/{qemu}")).exists();
        eventually(20 * SECOND, "QEMU has ended", gone);
        if (placement, victim) == ("host", "minivmm") {
            // The next start deletes it, or this command.
            assert_eq!(site.host.links().len(), 2);
            let gc = site
                .host
                .exec(&[&binary().display().to_string(), "net", "gc"]);
            assert!(gc.status.success(), "{}", text(&gc.stderr));
            assert!(text(&gc.stdout).contains("deleted"), "{}", text(&gc.stdout));
        }
        eventually(20 * SECOND, "the macvtap is gone", || site.mac_is_free(mac));
        assert_eq!(site.host.links(), ["wire"]);
    }
});

tcg_test!(signals_reach_a_qemu_of_args_alone, || {
    let site = Site::new();
    // QEMU ends by the first three itself, and calls that a success.
    for (signal, code) in [
        (Signal::TERM, 0),
        (Signal::HUP, 0),
        (Signal::INT, 0),
        (Signal::QUIT, 131),
    ] {
        let mut command = site.qemu(["--macvtap", "wire", "--", "-M", "q35", "-nodefaults", "-S"]);
        command.args(["-display", "none", "-accel", "tcg", "-monitor", "stdio"]);
        let mut vm = Vm::spawn(command);
        vm.wait_for("(qemu)", BOOT);
        // The prompt comes before QEMU is ready for signals, the answer after.
        vm.send("info status\n");
        vm.wait_for("VM status", BOOT);
        vm.signal(signal);
        assert_eq!(vm.wait_exit(20 * SECOND).code(), Some(code), "{signal:?}");
        let words = match signal {
            Signal::QUIT => "killed by signal 3".to_owned(),
            _ => format!("terminating on signal {}", signal.as_raw()),
        };
        assert!(vm.log().contains(&words), "{}", vm.log());
    }
});

/// UEFI's code, and a copy of its variables, which the guest writes. Newer packages have the larger ones alone.
fn firmware(dir: &Path) -> (PathBuf, PathBuf) {
    let file =
        |name: &str, size: &str| PathBuf::from(format!("/usr/share/OVMF/OVMF_{name}{size}.fd"));
    let size = ["_4M", ""]
        .into_iter()
        .find(|size| file("CODE", size).exists());
    let size = size.expect("the package ovmf is installed");
    let path = dir.join("vars.fd");
    fs::copy(file("VARS", size), &path).expect("the package ovmf is installed");
    (file("CODE", size), path)
}

tcg_test!(classic_command_works_with_macvtap_lines_replaced, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| dir.path().join(name).display().to_string();
    let disk = at("disk.qcow2");
    let mut image = Command::new("qemu-img");
    let made = image.args(["create", "-q", "-f", "qcow2", &disk, "64M"]);
    assert!(made.status().expect("qemu-img is there").success());
    let (code, vars) = firmware(dir.path());
    // Of the original, -enable-kvm and -cpu host are what the translator cannot do.
    let args = format!(
        "--macvtap wire,bus=pcie.0,addr=0x4,id=nic2,mac=02:aa:00:00:00:0e -- \
         -M q35 -accel tcg -cpu max -smp 2 -m 512M -nodefaults \
         -drive if=pflash,format=raw,readonly=on,file={} -drive if=pflash,format=raw,file={} \
         -serial mon:stdio -chardev socket,id=qmp,path={},server=on,wait=off -mon chardev=qmp,mode=control \
         -netdev user,id=net0,hostfwd=tcp:127.0.0.1:2222-:22 \
         -device virtio-net-pci,netdev=net0,bus=pcie.0,addr=0x3,mac=52:54:00:00:00:01,romfile= \
         -device virtio-scsi-pci,id=scsi0 -drive if=none,id=hd,format=qcow2,file={disk} \
         -device scsi-hd,drive=hd,bus=scsi0.0 -device virtio-gpu-pci -display vnc=unix:{} \
         -device qemu-xhci -device usb-tablet \
         -kernel {} -initrd {}",
        code.display(),
        vars.display(),
        at("qmp"),
        at("vnc"),
        assets().bzimage().display(),
        initrd().display(),
    );
    let append = format!("console=ttyS0 {STEADY}");
    let args = args.split_whitespace().chain(["-append", &append]);
    let mut vm = ready(site.qemu(args));

    // Each NIC is where it was put.
    for (slot, mac) in [("3", "52:54:00:00:00:01"), ("4", "02:aa:00:00:00:0e")] {
        let found = vm.run(&format!(
            "cat /sys/bus/pci/devices/0000:00:0{slot}.0/virtio*/net/*/address"
        ));
        assert_eq!(found.trim(), mac);
    }
    let ids = vm.run("cat /sys/bus/pci/devices/*/device");
    for (id, what) in [
        ("0x1048", "virtio-scsi"),
        ("0x1050", "virtio-gpu"),
        ("0x000d", "xHCI"),
    ] {
        // A disk controller on an ordinary PCI slot is transitional, with the older id.
        let found = ids.contains(id) || (id == "0x1048" && ids.contains("0x1004"));
        assert!(found, "{what} in {ids}");
    }
    vm.run("[ -d /sys/firmware/efi ] || dmesg | grep -q 'efi: EFI v'");
    let name = |vm: &mut Vm, slot: &str| {
        let list = format!("ls /sys/bus/pci/devices/0000:00:0{slot}.0/virtio*/net");
        vm.run(&list).trim().to_owned()
    };
    let (user, macvtap) = (name(&mut vm, "3"), name(&mut vm, "4"));

    // The macvtap, and user networking with its forwarded port on the host's loopback.
    address(&mut vm, &macvtap, 11);
    assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
    vm.run(&format!(
        "ip link set {user} up && ip addr add 10.0.2.15/24 dev {user}"
    ));
    vm.run("(while :; do echo hello from the guest | nc -l -p 22; done) >/dev/null 2>&1 &");
    let greeting = || {
        site.host.enter(|| {
            let mut stream = TcpStream::connect("127.0.0.1:2222").ok()?;
            stream.set_read_timeout(Some(5 * SECOND)).ok()?;
            let mut text = String::new();
            stream.write_all(b"\n").ok()?;
            stream.read_to_string(&mut text).ok()?;
            Some(text)
        })
    };
    eventually(BOOT, "the forwarded port answers", || {
        greeting().is_some_and(|text| text.contains("hello from the guest"))
    });

    // The screen is shown: VNC's server greets with its version (RFC 6143, 7.1.1).
    let mut screen = UnixStream::connect(at("vnc")).expect("QEMU listens");
    screen.set_read_timeout(Some(BOOT)).expect("no zero");
    let mut banner = [0; 12];
    screen.read_exact(&mut banner).expect("the server greets");
    assert!(banner.starts_with(b"RFB 003."), "{banner:?}");

    let answer = qmp(
        &site.host,
        &at("qmp"),
        &["query-status", "query-block", "quit"],
    );
    assert!(answer.contains("running"), "{answer}");
    assert!(answer.contains("qcow2"), "{answer}");
    assert_eq!(
        vm.wait_exit(20 * SECOND).code(),
        Some(0),
        "{}",
        vm.transcript()
    );
    assert!(site.mac_is_free("02:aa:00:00:00:0e"));
});

/// Sends commands by the client of PyPI; its answers as text.
fn qmp(netns: &Netns, socket: &str, commands: &[&str]) -> String {
    const CLIENT: &str = "
import asyncio, sys
from qemu.qmp import QMPClient
async def main():
    client = QMPClient('test')
    await client.connect(sys.argv[1])
    for command in sys.argv[2:]:
        print(command, await client.execute(command))
    try:
        await client.disconnect()
    except (EOFError, ConnectionError):
        pass # after a quit QEMU may be gone first
asyncio.run(main())
";
    let library = cache_dir().join("qemu.qmp");
    {
        let _lock = lock("qemu.qmp.lock");
        if !library.exists() {
            let temp = cache_dir().join("qemu.qmp.new");
            let mut pip = Command::new("python3");
            pip.args(["-m", "pip", "install", "-q", "--no-deps"]);
            pip.args(["--root-user-action=ignore", "--target"]);
            // Of a download that was cut short.
            let _ = fs::remove_dir_all(&temp);
            let status = pip.arg(&temp).arg(QMP_CLIENT).status();
            assert!(status.expect("python3 is there").success(), "{pip:?}");
            fs::rename(&temp, &library).expect("the cache can be written");
        }
    }
    let mut python = netns.command("python3");
    python
        .env("PYTHONPATH", &library)
        .args(["-c", CLIENT, socket]);
    let output = python.args(commands).output().expect("python3 starts");
    let answers = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{answers}");
    answers
}

tcg_test!(uefi_firmware_reaches_its_shell_with_the_macvtap_nic, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    // The firmware first tries what has a boot index, and then its shell: no network boot, which takes minutes to fail.
    let (code, vars) = firmware(dir.path());
    let disk = dir.path().join("empty");
    fs::write(&disk, vec![0; 1 << 20]).expect("a file in the temporary directory");
    let args = format!(
        "--macvtap wire,mac=02:aa:00:00:00:0f,romfile= -- -M q35 -accel tcg -m 256M -nodefaults -display none \
         -drive if=pflash,format=raw,readonly=on,file={} -drive if=pflash,format=raw,file={} \
         -drive if=none,id=empty,format=raw,file={} -device virtio-blk-pci,drive=empty,bootindex=1 -serial stdio",
        code.display(),
        vars.display(),
        disk.display(),
    );
    let mut vm = Vm::spawn(site.qemu(args.split_whitespace()));
    vm.wait_for("Shell>", BOOT);
    vm.send("connect -r\r");
    vm.wait_for("Shell>", BOOT);
    vm.send("ifconfig -l\r");
    vm.wait_for("02:AA:00:00:00:0F", BOOT);
    vm.send("reset -s\r");
    assert_eq!(
        vm.wait_exit(20 * SECOND).code(),
        Some(0),
        "{}",
        vm.transcript()
    );
});

/// A disk's first sector: reads the second by the BIOS and writes its text to the first serial port.
const BOOT_SECTOR: &[u8] = &[
    0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, // ds and es are 0
    0xbb, 0x00, 0x7e, 0xb8, 0x01, 0x02, // to 0x7e00, read one sector,
    0xb9, 0x02, 0x00, 0xb6, 0x00, 0xcd, 0x13, // the second of cylinder and head 0
    0xbe, 0x00, 0x7e, // from 0x7e00 on
    0xac, 0x84, 0xc0, 0x74, 0x06, // a byte, until it is 0,
    0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf5, // to port 0x3f8
    0xf4, 0xeb, 0xfd, // and halt
];

tcg_test!(guest_boots_from_its_qcow2_disk, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| dir.path().join(name).display().to_string();
    let mut sectors = vec![0; 1 << 20];
    sectors[..BOOT_SECTOR.len()].copy_from_slice(BOOT_SECTOR);
    sectors[510..512].copy_from_slice(&[0x55, 0xaa]);
    let words = b"read from the qcow2 disk\n";
    sectors[512..512 + words.len()].copy_from_slice(words);
    fs::write(at("raw"), sectors).expect("a file in the temporary directory");
    let mut image = Command::new("qemu-img");
    image.args([
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        &at("raw"),
        &at("qcow2"),
    ]);
    assert!(image.status().expect("qemu-img is there").success());
    let args = format!(
        "--macvtap wire,romfile= -- -M q35 -accel tcg -m 64M -nodefaults -display none -serial stdio \
         -device virtio-scsi-pci -drive if=none,id=hd,format=qcow2,file={} -device scsi-hd,drive=hd,bootindex=0",
        at("qcow2"),
    );
    let mut vm = Vm::spawn(site.qemu(args.split_whitespace()));
    vm.wait_for("read from the qcow2 disk", BOOT);
    vm.signal(Signal::TERM);
    assert_eq!(vm.wait_exit(20 * SECOND).code(), Some(0), "{}", vm.log());
});

tcg_test!(refusals_say_what_is_wrong_and_leave_nothing, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (script, old) = (dir.path().join("text"), dir.path().join("qemu-old"));
    fs::write(&script, "#!/bin/sh\necho QEMU emulator version 4.1.0\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    copy_program(&script, &old);
    let too_old = format!("--qemu {} --macvtap wire -- -M q35", old.display());
    let cases = [
        (
            "--macvtap wire -- -netdev user,id=macvtap0",
            "the id macvtap0 is that of a --macvtap",
        ),
        (
            "--macvtap wire -- -netdev tap,id=x,fd=3",
            "file descriptor 3 is one of those that minivmm gives to QEMU: use 4",
        ),
        (
            "--macvtap wire,mac=52:54:00:12:34:57 -- -device e1000e,netdev=macvtap0,mac=52:54:00:12:34:56",
            "but the macvtap's MAC address is 52:54:00:12:34:57",
        ),
        (
            "--macvtap wire -- -device e1000e,netdev=macvtap0,mac=52:54:00:12:34:56",
            "give --macvtap the same mac=52:54:00:12:34:56",
        ),
        (
            "--macvtap wire,id=nic2 -- -set device.nic2.mac=52:54:00:12:34:56",
            "give it to --macvtap as mac=",
        ),
        (
            "--macvtap wire -- -device e1000e,netdev=macvtap0",
            "without a usable mac=",
        ),
        ("--macvtap wire -- -daemonize", "-daemonize"),
        ("--macvtap wire --accel tcg -- -enable-kvm", "choose one"),
        (
            "--qemu /no/such/qemu --macvtap wire -- -M q35",
            "name a QEMU with --qemu",
        ),
        (too_old.as_str(), "is QEMU 4.1: 4.2 or newer is needed"),
        ("--macvtap none -- -M q35", "none"),
        ("--macvtap fd=9 -- -M q35", "fd 9 is not open"),
    ];
    for (args, expected) in cases {
        let output = outcome(site.qemu(args.split_whitespace()));
        let log = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args}: {log}");
        assert!(log.contains(expected), "{args}: {log}");
        // It says so when it makes a NIC.
        assert!(!log.contains("NIC on"), "{args}: {log}");
    }
    if !Path::new("/dev/vhost-net").exists() {
        let output = outcome(site.qemu(["--macvtap", "wire,vhost=on", "--", "-M", "q35"]));
        assert!(text(&output.stderr).contains("modprobe vhost_net"));
    }
    let mut command = site.host.command("env");
    command.arg(format!("PATH={}", dir.path().display()));
    command
        .arg(binary())
        .args(["qemu", "--macvtap", "wire", "--", "-M", "q35"]);
    let output = outcome(command);
    let log = text(&output.stderr);
    assert!(log.contains("no qemu-system-x86_64 in PATH"), "{log}");
    let output = outcome(site.qemu(["--macvtap", "wire,script=no", "--", "-M", "q35"]));
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert_eq!(site.host.links(), ["wire"]);
});

tcg_test!(failure_of_qemu_is_shown_with_a_hint_and_its_status, || {
    let site = Site::new();
    let args = "--macvtap wire -- -M q35 -display none -drive if=pflash,format=raw,file=/none/OVMF_CODE.fd";
    let output = outcome(site.qemu(args.split_whitespace()));
    let log = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("Could not open '/none/OVMF_CODE.fd'"), "{log}");
    assert!(log.contains("apt install ovmf"), "{log}");

    let args = "--macvtap wire -- -M q35 -display none -accel tcg -bios OVMF_that_is_not_there.fd";
    let output = outcome(site.qemu(args.split_whitespace()));
    let log = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("apt install ovmf"), "{log}");

    // Where the KVM lacks a register that this model of processor has.
    let args =
        "--macvtap wire -- -M q35 -display none -accel kvm -cpu host -nodefaults -S -monitor stdio";
    let mut command = site.qemu(args.split_whitespace());
    command.stdin(Stdio::null());
    let mut vm = Vm::spawn(command);
    thread::sleep(2 * SECOND);
    if !vm.has_ended() {
        vm.signal(Signal::TERM);
    }
    vm.wait_exit(20 * SECOND);
    if vm.log().contains("failed to set MSR") {
        assert!(vm.log().contains("-arch-capabilities"), "{}", vm.log());
    } else {
        skip::not_tested("the hint for a register that KVM lacks, since this one has all");
    }

    // The user's own tap, which is none.
    let args = "--macvtap wire -- -M q35 -display none -accel tcg -netdev tap,id=own,fd=0";
    let log = text(&outcome(site.qemu(args.split_whitespace())).stderr);
    assert!(log.contains("is no tap queue"), "{log}");
});

tcg_test!(open_queue_and_a_device_of_the_users_are_taken, || {
    let site = Site::new();
    let mac = "02:aa:00:00:00:10";
    let (kernel, initrd) = (assets().bzimage(), initrd());
    let mut command = site.host.command(binary());
    command.args(["net", "open", &format!("wire,mac={mac}"), "--"]);
    command
        .arg(binary())
        .args(["qemu", "--accel", "tcg", "--macvtap", "fd=3", "--kernel"]);
    command.arg(kernel).arg("--initrd").arg(initrd);
    command.args(["--cmdline", STEADY]);
    let device = format!("virtio-net-pci,netdev=macvtap0,addr=0x9,mac={mac}");
    command
        .args(["--", "-device", &device])
        .stdin(Stdio::piped());
    let mut vm = ready(command);
    let found = vm.run("cat /sys/bus/pci/devices/0000:00:09.0/virtio*/net/eth0/address");
    assert_eq!(found.trim(), mac);
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
});
