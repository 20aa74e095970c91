//! minivmm of an ordinary user, who is in the group of `/dev/kvm` and may do nothing else: without any capability, also
//! in the bounding set, without locked memory, in a `/dev` with `null`, `urandom` and `kvm`. The share, the user
//! network and the socket device of one guest, the commands beside it, and what is left.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use harness::elf::elf;
use harness::guest::Transport::{self, Mmio, Pci};
use harness::guest::{ECHO, Net, addresses, stream_bytes, succeed};
use harness::process::is_running;
use harness::vm::{Vm, binary, copy_program};
use harness::{PATIENCE, eventually, guest_test};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

/// Users from here on are those of this suite, two for each process that runs it.
const FIRST_USER: u32 = 50_000;
/// The group of `/dev/kvm`.
const KVM: u32 = 42_430;
/// The number of the host, by whose addresses the guest is reached.
const HOST: u8 = 2;
/// The port of the host that is the guest's echo: users get none below 1024.
const PORT: u16 = 2007;
/// The port of the guest's socket device that ends its service.
const QUIT: u32 = 1;
const NAME: &str = "mine";

/// Runs a program as `$USER_ID` in its home, in the mount namespace of `ip netns exec`.
const AS_USER: &str = r#"
cd "$FILES"
mount -t tmpfs -o mode=755 none dev
cp -a /dev/null /dev/urandom /dev/kvm dev
chown "0:$KVM" dev/kvm
chmod 660 dev/kvm
mount --bind dev /dev
cd home
ulimit -l 0
exec setpriv --reuid="$USER_ID" --regid="$USER_ID" --groups="$KVM" --inh-caps=-all --bounding-set=-all "$@"
"#;

/// A user with a directory `src` at home, and the network of their host. Each test has another, so that whatever runs or
/// is left of this user is its own.
struct User {
    id: u32,
    net: Net,
    files: TempDir,
    /// Whether there is a session with a directory for sockets: cron and su make none.
    has_session: bool,
}

impl User {
    fn new(number: u32) -> Self {
        let id = FIRST_USER + std::process::id() % 5000 * 2 + number;
        let files = tempfile::tempdir().unwrap();
        let path = |name: &str| files.path().join(name);
        fs::set_permissions(files.path(), Permissions::from_mode(0o755)).unwrap();
        copy_program(binary(), path("minivmm"));
        fs::copy(elf(), path("guest")).unwrap();
        fs::create_dir(path("dev")).unwrap();
        for name in ["home", "home/src", "run"] {
            fs::create_dir(path(name)).unwrap();
            chown(path(name), Some(id), Some(id)).unwrap();
        }
        fs::set_permissions(path("run"), Permissions::from_mode(0o700)).unwrap();
        fs::write(path("home/src/hello"), "of the host").unwrap();
        let net = Net::routed(HOST);
        let has_session = number == 0;
        Self {
            id,
            net,
            files,
            has_session,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// minivmm, with these arguments.
    fn minivmm(&self, args: &[&str]) -> Command {
        let mut command = self.net.host.command("sh");
        command.args(["-ec", AS_USER, "sh"]);
        command.arg(self.path("minivmm")).args(args);
        command.env("FILES", self.files.path());
        command.envs([("USER_ID", self.id), ("KVM", KVM)].map(|(k, v)| (k, v.to_string())));
        command.env("HOME", self.path("home"));
        match self.has_session {
            true => command.env("XDG_RUNTIME_DIR", self.path("run")),
            false => command.env_remove("XDG_RUNTIME_DIR"),
        };
        command.env_remove("RUST_LOG").stdin(Stdio::null());
        command
    }

    /// Starts a guest with a share, a user network and a socket device.
    fn start(&self, transport: Transport, modes: &str) -> Vm {
        let kernel = self.path("guest").display().to_string();
        let line = format!("guest.mode={modes} guest.ip=10.0.2.15/0");
        let forwards = ["tcp", "udp"].map(|kind| format!("hostfwd={kind}::{PORT}-:{ECHO}"));
        let mut command = self.minivmm(&["--name", NAME, "--kernel", &kernel]);
        command.args(["--memory", "128M", "--transport", transport.name()]);
        command.args(["--cmdline", &line, "--user-net", &forwards.join(",")]);
        command.args(["--share", "src:src", "--vsock", "vm.vsock"]);
        Vm::spawn(command)
    }

    /// What minivmm writes on stdout when it succeeds.
    fn show(&self, args: &[&str]) -> String {
        let output = self.minivmm(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The names of this user's processes.
    fn processes(&self) -> Vec<String> {
        let pids = fs::read_dir("/proc").unwrap();
        let pids = pids.filter_map(|entry| entry.unwrap().file_name().into_string().ok());
        let names = pids.filter(|pid| is_running(pid)).filter_map(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let mut ids = field(&status, "Uid").split_whitespace();
            let is_theirs = ids.any(|id| id == self.id.to_string());
            is_theirs.then(|| field(&status, "Name").to_owned())
        });
        names.collect()
    }

    fn assert_no_process(&self) {
        let has_none = eventually(|| self.processes().is_empty());
        assert!(has_none, "{:?}", self.processes());
    }

    /// All that is no directory in the user's directories, and what of theirs is in those that are everybody's.
    fn left(&self) -> Vec<String> {
        let (home, run) = (self.path("home"), self.path("run"));
        let id = self.id.to_string();
        let mut own = Command::new("find");
        own.args([home, run])
            .args("! -type d -printf %f\\n".split(' '));
        let mut shared = Command::new("find");
        shared.args(["/tmp", "/var/tmp", "/dev/shm", "/run", "-maxdepth", "1"]);
        shared.args(["-user", &id]);
        let found = [own, shared].map(|mut find| {
            let output = find.output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        });
        let mut left: Vec<_> = found.concat().lines().map(str::to_owned).collect();
        left.sort();
        left
    }
}

/// A field of /proc/PID/status; nothing of a process that has ended.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.map_or("", |line| line.trim_start_matches(':').trim())
}

/// Sends the stream to a service that echoes it.
fn echo(mut to: impl Write, from: &mut impl Read, close: impl FnOnce()) {
    let sent = stream_bytes(0, 10_000);
    to.write_all(&sent).unwrap();
    close();
    let mut received = Vec::new();
    from.read_to_end(&mut received).unwrap();
    assert!(received == sent, "{} bytes", received.len());
}

fn assert_without_capabilities(vm: &Vm) {
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(&status, set), "0000000000000000", "{set}");
    }
}

/// What the guest has made is the user's.
fn assert_shared(user: &User) {
    let made = user.path("home/src/made");
    assert_eq!(fs::read(&made).unwrap(), b"written by the guest");
    let owner = fs::metadata(&made).unwrap();
    assert_eq!((owner.uid(), owner.gid()), (user.id, user.id));
    // For the next one.
    fs::remove_file(made).unwrap();
}

/// Connects to the guest by its socket device, and ends its service there.
fn use_socket(user: &User) {
    let socket = user.path("home/vm.vsock");
    assert_eq!(fs::metadata(&socket).unwrap().uid(), user.id);
    let connect = |port: u32| {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        BufReader::new(stream)
    };
    let mut stream = connect(ECHO.into());
    let mut answer = String::new();
    stream.read_line(&mut answer).unwrap();
    assert!(answer.starts_with("OK "), "{answer:?}");
    let writer = stream.get_ref().try_clone().unwrap();
    let close = || writer.shutdown(Shutdown::Write).unwrap();
    echo(&writer, &mut stream, close);
    assert_eq!(connect(QUIT).read(&mut [0]).unwrap(), 0);
}

/// Connects to the guest by the port that is forwarded, and ends its service there.
fn use_port(user: &User) {
    let [ip, _] = addresses(HOST);
    user.net.connect(&ip, PORT, |stream| {
        let close = || stream.shutdown(Shutdown::Write).unwrap();
        echo(&stream, &mut &stream, close);
    });
    assert_eq!(user.net.datagram_by(&ip, PORT, b"quit"), b"quit");
}

guest_test!(user_of_kvms_group_shares_forwards_and_connects, || {
    let user = User::new(0);
    for transport in [Mmio, Pci] {
        // What a killed one leaves is in the way of none.
        let mut killed = user.start(transport, "vsock");
        killed.wait_for("READY vsock cid=3\n");
        killed.signal(Signal::KILL);
        killed.wait_exit();
        user.assert_no_process();

        let mut vm = user.start(transport, "share,vsock,echo");
        vm.wait_for("READY vsock cid=3\n");
        assert_without_capabilities(&vm);
        // minivmm, the two of its file server, and passt.
        assert_eq!(user.processes().len(), 4, "{:?}", user.processes());
        assert_shared(&user);
        use_socket(&user);
        vm.wait_for("READY echo\n");
        use_port(&user);
        succeed(vm);
        user.assert_no_process();
        assert_eq!(user.left(), ["hello"]);
    }
});

/// A directory that is removed at the end.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

guest_test!(
    commands_of_a_user_without_a_session_find_the_users_guest,
    || {
        let user = User::new(1);
        let mut vm = user.start(Pci, "echo");
        vm.wait_for("READY echo\n");
        user.show(&["wait", NAME, "--for", "console=READY echo"]);
        let place = Removed(format!("/tmp/minivmm-{}", user.id).into());
        let found = fs::symlink_metadata(&place.0).unwrap();
        assert_eq!((found.uid(), found.mode() & 0o7777), (user.id, 0o700));
        let listed: Value = serde_json::from_str(&user.show(&["ps", "--json"])).unwrap();
        assert_eq!(listed[0]["name"], NAME, "{listed}");
        assert_eq!(listed[0]["pid"], vm.pid(), "{listed}");
        user.show(&["qmp", NAME, "query-status"]);
        // The guest takes no notice of its power button.
        user.show(&["stop", NAME, "--timeout", "1"]);
        vm.wait_exit();
        assert_eq!(user.show(&["ps", "--json"]).trim(), "[]");
        assert_eq!(fs::read_dir(place.0.join("vms")).unwrap().count(), 0);
        drop(place);
        user.assert_no_process();
        assert_eq!(user.left(), ["hello"]);
    }
);
