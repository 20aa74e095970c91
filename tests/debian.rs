//! A Debian that debootstrap has installed on a disk: it boots with its own kernel and initrd, has
//! its address by DHCP, is reached by ssh, and powers off.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;
mod lab;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use harness::debian::{debian, partition};
use harness::disk::{check_ext4, copy_sparse, debugfs, qemu_img, run};
use harness::eventually;
use harness::initramfs::find;
use harness::lab_test;
use harness::site::{LEASED, LEASED_TO, Site};
use harness::vm::{Vm, binary};
use serde_json::Value;
use vmm::config::{Config, ConsoleTarget};
use vmm::{Exit, Guest, RunState};

/// What its console shows in turn. Each may take as long as the boot of a small guest.
const STEPS: [&str; 5] = [
    "Run /init as init process",
    "systemd[1]: ",
    " - Local File Systems.",
    " - Basic System.",
    "GUEST running\n",
];

lab_test!(debian_on_a_raw_disk_is_reached_every_way, || {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("debian.raw");
    copy_sparse(&debian().disk(), &disk).unwrap();
    let shared = dir.path().join("shared");
    let head = make_repository(&shared);
    let package = shared.join("minivmm-agent.deb");
    run(Command::new(binary())
        .args(["agent", "--deb", "-o"])
        .arg(&package));
    let (vsock, qmp) = (dir.path().join("vsock"), dir.path().join("qmp"));
    let site = Site::new();
    let _server = site.serve_dhcp();
    let mut command = site.host.command(binary());
    command.arg("--kernel").arg(debian().kernel());
    command.arg("--initrd").arg(debian().initrd());
    command.args(["--cmdline", "root=/dev/vda1 raw-disk"]);
    command.arg("--disk");
    command.arg(format!("{},serial=debian-1", disk.display()));
    command.args(["--user-net", "hostfwd=tcp::2222-:22"]);
    command.args(["--macvtap", &format!("wire,mac={LEASED_TO}")]);
    command
        .arg("--share")
        .arg(format!("{}:repo", shared.display()));
    command.arg("--vsock").arg(&vsock);
    command.arg("--qmp").arg(&qmp);
    command.stdin(Stdio::piped());
    let mut vm = Vm::spawn(command);
    for step in STEPS {
        vm.wait_for(step);
    }
    vm.wait_for("GUEST ready\n");
    assert!(site.peer.pings(LEASED, 100), "{}", vm.transcript());
    assert!(vm.run("hostname -I").contains(LEASED));
    vm.run("test -b /dev/disk/by-id/virtio-debian-1");

    // By the forwarded port, from the host and from none else's program, what is shared.
    let forwarded = ["-p", "2222"];
    let clone = "mount -t virtiofs repo /mnt && git clone -q /mnt/repo clone && cd clone && \
        git fsck && git rev-parse HEAD";
    assert_eq!(ssh(&site, &forwarded, clone).0, head, "{}", vm.transcript());
    assert_eq!(ssh(&site, &forwarded, "exit 42").1, Some(42));
    let by_vsock = format!("ProxyCommand={}", connect(&vsock));
    let script = "uname -n; exit 43";
    let expected = ("debian\n".to_owned(), Some(43));
    assert_eq!(
        ssh(&site, &["-o", &by_vsock], script),
        expected,
        "{}",
        vm.transcript()
    );
    assert_eq!(status(&qmp), "running");

    // By the agent, as soon as its package is installed.
    vm.run("PATH=/usr/sbin:/usr/bin:/sbin:/bin dpkg --install /mnt/minivmm-agent.deb");
    let active = || {
        let mut exec = Command::new(binary());
        exec.arg("exec").arg(&vsock);
        exec.args(["--", "systemctl", "is-active", "minivmm-agent"]);
        let output = exec.stdin(Stdio::null()).output().unwrap();
        println!("{output:?}");
        output.status.success() && output.stdout == b"active\n"
    };
    assert!(eventually(active), "{}", vm.transcript());

    vm.start_command("systemctl poweroff");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
    examine(&disk, "raw-disk");
});

/// Makes a repository with a commit at `shared/repo`; returns the commit's id as git shows it.
fn make_repository(shared: &Path) -> String {
    fs::create_dir(shared).unwrap();
    let git = |args: &[&str]| {
        run(Command::new(find("git", "git"))
            .args(args)
            .current_dir(shared))
    };
    git(&["init", "-q", "repo"]);
    for n in 0..100 {
        fs::write(shared.join(format!("repo/{n}")), n.to_string()).unwrap();
    }
    git(&["-C", "repo", "add", "."]);
    let user = ["-c", "user.name=host", "-c", "user.email=host@localhost"];
    git(&[&["-C", "repo"], &user[..], &["commit", "-q", "-m", "first"]].concat());
    let output = git(&["-C", "repo", "rev-parse", "HEAD"]);
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a script by root's ssh, a way to whose server is among the arguments. Returns what it wrote,
/// and its status.
fn ssh(site: &Site, way: &[&str], script: &str) -> (String, Option<i32>) {
    let mut command = site.host.command(find("ssh", "openssh-client"));
    command.args(["-F", "none", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"]);
    command.args([
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
    ]);
    command.arg("-i").arg(debian().ssh_key());
    command.args(way).args(["root@127.0.0.1", script]);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let wrote = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("ssh {way:?} {script:?}: {}\n{wrote}{said}", output.status);
    (wrote, output.status.code())
}

/// What connects stdin and stdout with the guest's port 22. The socket's answer, "OK" and a port,
/// precedes the server's version, as any line may.
fn connect(vsock: &Path) -> String {
    let socat = find("socat", "socat");
    let (socat, vsock) = (socat.display(), vsock.display());
    format!("sh -c '(echo CONNECT 22; exec cat) | {socat} -t 60 - UNIX-CONNECT:{vsock}'")
}

/// The state of the VM that QMP reports.
fn status(qmp: &Path) -> String {
    let mut socket = UnixStream::connect(qmp).unwrap();
    let requests = "{'execute': 'qmp_capabilities'} {'execute': 'query-status', 'id': 7}";
    socket
        .write_all(requests.replace('\'', "\"").as_bytes())
        .unwrap();
    let answers = BufReader::new(socket).lines().map(Result::unwrap);
    let answers = answers.map(|line| serde_json::from_str::<Value>(&line).unwrap());
    let answer = answers
        .into_iter()
        .find(|answer| answer["id"] == 7)
        .unwrap();
    answer["return"]["status"].as_str().unwrap().to_owned()
}

// A signal gives a guest ten seconds to power off, which may be too few in the lab. A program that
// uses the library gives it as many as it likes.
lab_test!(debian_on_a_qcow2_disk_ends_by_its_power_button, || {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("debian.qcow2");
    let backing = debian().disk();
    let before = sum(&backing);
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    qemu_img(&create, &[&backing, &disk]);
    let site = Site::new();
    let _server = site.serve_dhcp();
    let console = dir.path().join("console");
    let mut config = Config::new(debian().kernel());
    config.initrd = Some(debian().initrd());
    config.cmdline = "root=/dev/vda1 qcow2-disk".into();
    config.console = ConsoleTarget::File(console.clone());
    let image = format!("{},backing={}", disk.display(), backing.display());
    config.disks.push(image.parse().unwrap());
    config
        .nics
        .push(format!("wire,mac={LEASED_TO}").parse().unwrap());
    let guest = site.host.enter(|| Guest::start(config)).unwrap();
    let shown = || String::from_utf8_lossy(&fs::read(&console).unwrap()).replace('\r', "");
    for step in STEPS {
        assert!(eventually(|| shown().contains(step)), "{}", shown());
    }
    assert!(site.peer.pings(LEASED, 100), "{}", shown());
    guest.press_power_button();
    assert!(
        eventually(|| guest.state() == RunState::Ended),
        "{}",
        shown()
    );
    assert_eq!(guest.wait().unwrap(), Exit::PowerOff, "{}", shown());
    qemu_img(&["check", "-q"], &[&disk]);
    let raw = dir.path().join("debian.raw");
    qemu_img(&["convert", "-O", "raw"], &[&disk, &raw]);
    examine(&raw, "qcow2-disk");
    assert_eq!(sum(&backing), before, "the backing file has changed");
});

/// Fails unless the file system of a raw disk is whole and has what the guest wrote.
fn examine(disk: &Path, booted_by: &str) {
    let partition = partition(disk);
    check_ext4(&partition);
    let cmdline = debugfs(&partition, "cat /root/booted-by");
    assert!(cmdline.contains(booted_by), "{cmdline}");
}

/// A sum over a whole file, by which one sees whether it has changed.
fn sum(path: &Path) -> u64 {
    let bytes = fs::read(path).unwrap();
    let words = bytes.chunks_exact(8).map(|chunk| {
        let word = chunk.try_into().expect("eight bytes");
        u64::from_le_bytes(word)
    });
    words.fold(0, |sum, word| sum.rotate_left(5).wrapping_add(word))
}
