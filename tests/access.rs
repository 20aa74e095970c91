//! Ways to a network: queues that others have opened, programs without rights, macvtaps that `ip link` shows, keys, and
//! the host's own access to its guests. Each with the freestanding test guest on this machine's `/dev/kvm`, in namespaces
//! that the test makes.
//!
//! An ordinary user's `/dev/kvm` is a node of the test's own in a private mount namespace: the machine's is left alone.

// A helper that panics fails the test, as it should; clippy spares only the functions that are tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use harness::guest::{self, Net, PATIENCE, PEER, addresses, elf, is_possible};
use harness::netns::Netns;
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

/// Makes /dev/kvm anybody's and [`USER`] known, for what is run by it alone: `ip netns exec` has made a mount namespace.
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

    /// A macvtap `name`, as a user would make it; returns its node, of the test's own. (`/dev/tapN` could be another's.)
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
        vm.wait_for("READY echo\n", PATIENCE);
        // An earlier guest with its address had another MAC address, and this one is silent until it is asked.
        for neighbour in [&self.net.far, &self.net.host] {
            neighbour.ip("neigh flush all");
        }
        vm
    }

    /// minivmm with a redirection of a shell's for its descriptors; `handed` is its stdin before that.
    fn redirected(&self, redirection: &str, handed: impl Into<Stdio>, args: &[&str]) -> Command {
        let script = format!("exec \"$@\" {redirection} 0</dev/null");
        let mut command = self.net.host.command("sh");
        command.args(["-ec", &script, "sh"]).arg(binary());
        command.args(args).env_remove("RUST_LOG").stdin(handed);
        command
    }

    /// Whether another interface can come up with [`MAC`], as soon as what the kernel does on its own is done.
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

/// Whether it comes true within some seconds.
fn eventually(mut is_so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        if is_so() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
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
    let status = vm.wait_exit(PATIENCE);
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

/// A run that must be refused: with this status, with these texts in one error on stderr, and nothing on stdout.
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
    vm.wait_for_log("power button", PATIENCE);
    vm.signal(Signal::TERM);
    let status = vm.wait_exit(PATIENCE);
    assert_eq!(status.code(), Some(128 + 15), "{}", vm.transcript());
}

fn kill(mut vm: Vm) {
    vm.signal(Signal::KILL);
    assert_eq!(vm.wait_exit(PATIENCE).signal(), Some(9));
}

/// The value behind `word`, in `ip`'s and in our own listings.
fn after<'a>(text: &'a str, word: &str) -> &'a str {
    let mut words = text.split_whitespace().skip_while(|found| *found != word);
    let value = words.nth(1);
    value.unwrap_or_else(|| panic!("no {word} in {text}"))
}

/// The MAC address that the guest's card says it has.
fn mac_in_guest(console: &str) -> &str {
    let line = console.lines().find(|line| line.starts_with("NIC 0 "));
    let mut words = line.unwrap_or_else(|| panic!("{console}")).split(' ');
    words.find_map(|word| word.strip_prefix("mac=")).unwrap()
}

// Descriptors.

#[test]
fn macvtap_of_ip_link_by_descriptor_gives_its_mac_and_works() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let node = place.macvtap("mine");
    let redirection = format!("3<>{}", node.display());
    let start = |options: &str| {
        let guest = place.guest(2, options);
        let args = with(&guest, &["--macvtap", "fd=3"]);
        Vm::spawn(place.redirected(&redirection, Stdio::null(), &args))
    };
    let console = guest::succeed(start("mode=info"));
    assert_eq!(mac_in_guest(&console), place.net.host.mac("mine"));

    let vm = place.until_it_serves(start("mode=echo"));
    for ip in addresses(2) {
        assert!(place.net.far.pings(&ip, 3), "{ip}\n{}", vm.transcript());
        assert_eq!(place.net.datagram(&ip, b"through fd 3"), b"through fd 3");
    }
    place.net.quit(2, vm);
    assert_eq!(place.net.host.links(), ["lower", "mine"], "it was not ours");
}

#[test]
fn ordinary_user_runs_a_guest_with_kvm_and_a_descriptor_alone() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let node = place.macvtap("mine");
    // By a user without any capability, to whom not even the node is open.
    let script = format!(
        "{} 3<>{}",
        AS_ON_A_DESKTOP.trim_end(),
        node.to_str().unwrap()
    );
    let mut command = place.net.host.command("sh");
    command.args(["-ec", &script, "sh", "setpriv"]);
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.args([
        "--inh-caps=-all",
        "--bounding-set=-all",
        "--no-new-privs",
        "--",
    ]);
    command.arg(place.path("minivmm"));
    command
        .args(place.guest(2, "mode=echo"))
        .args(["--macvtap", "fd=3"])
        .env("FILES", place.files.path())
        .stdin(Stdio::null());
    let vm = place.until_it_serves(Vm::spawn(command));
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    assert_eq!(after(&status, "Uid:"), "65534");
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(after(&status, set), "0000000000000000", "{set}");
    }
    for ip in addresses(2) {
        assert!(place.net.far.pings(&ip, 3), "{ip}\n{}", vm.transcript());
    }
    place.net.quit(2, vm);
}

#[test]
fn descriptor_that_is_no_queue_is_refused_with_what_it_is() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let guest = place.guest(2, "mode=info");
    let args = with(&guest, &["--macvtap", "fd=3"]);
    let command = |redirection: &str, handed: Stdio| place.redirected(redirection, handed, &args);
    let nothing = Stdio::null;
    is_refused(
        command("3<&-", nothing()),
        FAILED,
        &["fd 3 is not open", "3<>/dev/tap"],
    );
    is_refused(
        command("3</etc/passwd", nothing()),
        FAILED,
        &["fd 3 is a file, not a macvtap queue"],
    );
    is_refused(
        command("3</dev/null", nothing()),
        FAILED,
        &["fd 3 is some other device"],
    );
    let (socket, _other_end) = UnixStream::pair().unwrap();
    is_refused(
        command("3<&0", OwnedFd::from(socket).into()),
        FAILED,
        &["fd 3 is a socket, not a macvtap queue"],
    );
    let tun = place.net.host.enter(tun);
    is_refused(
        command("3<&0", tun.into()),
        FAILED,
        &["fd 3 belongs to", "a tun", "use a macvtap or a tap"],
    );
}

/// A descriptor of a new tun in this thread's network namespace.
fn tun() -> File {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    // SAFETY: TUNSETIFF takes an ifreq, which lives on.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    file
}

#[test]
fn descriptor_with_keys_or_twice_is_refused() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let node = place.macvtap("mine");
    let node = node.display();
    let guest = place.guest(2, "mode=info");
    let refused = |redirection: &str, options: &[&str], status: i32, texts: &[&str]| {
        let args = with(&guest, options);
        is_refused(
            place.redirected(redirection, Stdio::null(), &args),
            status,
            texts,
        );
    };
    let one = format!("3<>{node}");
    for keys in [
        "fd=3,mode=bridge",
        "fd=3,mac=02:00:00:00:00:01",
        "fd=3,netns=host",
    ] {
        refused(&one, &["--macvtap", keys], USAGE, &["fd= goes without"]);
    }
    for bad in ["fd=", "fd=x", "fd=-1"] {
        refused(
            &one,
            &["--macvtap", bad],
            USAGE,
            &["not the number of a file descriptor"],
        );
    }
    let twice = ["--macvtap", "fd=3", "--macvtap", "fd=3"];
    refused(&one, &twice, FAILED, &["fd 3 is given twice"]);
    // A copy of the queue, and another queue of the same macvtap.
    let shared = ["--macvtap", "fd=3", "--macvtap", "fd=4"];
    for other in ["4<&3".to_owned(), format!("4<>{node}")] {
        let both = format!("{one} {other}");
        refused(&both, &shared, FAILED, &["two cards", "on mine"]);
    }
    let by_name = ["--macvtap", "mine", "--macvtap", "mine"];
    refused("3<&-", &by_name, FAILED, &["two cards are on mine"]);
    let both = ["--macvtap", "fd=3", "--macvtap", "mine"];
    refused(&one, &both, FAILED, &["two cards are on mine"]);
}

#[test]
fn macvtap_of_a_running_guest_is_refused_to_a_second_one() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    place.macvtap("mine");
    let vm = place.serve(2, &["--macvtap", "mine"]);
    let guest = place.guest(3, "mode=info");
    let texts = [
        "mine (",
        &format!("(pid {})", vm.pid()),
        "a part of its frames",
    ];
    let second = with(&guest, &["--macvtap", "mine"]);
    is_refused(place.minivmm(&second), FAILED, &texts);
    let open = ["net", "open", "mine", "--user", "nobody", "--", "true"];
    is_refused(place.minivmm(&open), FAILED, &texts);
    // The first one has had all of its frames back since.
    assert!(place.net.far.pings(&addresses(2)[0], 3));
    kill(vm);
    guest::succeed(Vm::spawn(place.minivmm(&second)));
}

// net open.

/// Shows what it has, and stays until it is killed.
const SHOW: &str = "echo uid=$(id -u) gid=$(id -g) groups=$(id -G); env | grep ^MINIVMM_NET_; \
                    echo home=$HOME user=$USER,$LOGNAME runtime=$XDG_RUNTIME_DIR; \
                    grep ^Cap /proc/self/status; echo pid=$$; exec sleep 60";

/// The descriptor `number` of another process.
fn descriptor_of(pid: u32, number: i32) -> OwnedFd {
    let pid = Pid::from_raw(pid as i32).unwrap();
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty()).unwrap()
}

/// SIOCGIFHWADDR on a queue.
fn mac_of_queue(queue: &OwnedFd) -> String {
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: SIOCGIFHWADDR fills an ifreq, which lives on.
    let done = unsafe { libc::ioctl(queue.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the call has filled this member of the union.
    let address = unsafe { request.ifr_ifru.ifru_hwaddr };
    let bytes = address.sa_data[..6]
        .iter()
        .map(|&byte| format!("{:02x}", byte as u8));
    bytes.collect::<Vec<_>>().join(":")
}

/// The numbers of a process's descriptors, without 0 to 2 and those that whoever started the tests has left open.
fn descriptors(pid: u32) -> Vec<i32> {
    let numbers = |process: &str| -> Vec<i32> {
        let fds = fs::read_dir(format!("/proc/{process}/fd")).unwrap();
        let names = fds.filter_map(|fd| fd.unwrap().file_name().into_string().ok());
        names.map(|name| name.parse().unwrap()).collect()
    };
    let is_inherited = |fd: &i32| {
        // SAFETY: F_GETFD takes any number, and only asks.
        let flags = unsafe { libc::fcntl(*fd, libc::F_GETFD) };
        flags >= 0 && flags & libc::FD_CLOEXEC == 0
    };
    let inherited: Vec<i32> = numbers("self").into_iter().filter(is_inherited).collect();
    let mut own = numbers(&pid.to_string());
    own.retain(|fd| *fd > 2 && !inherited.contains(fd));
    own.sort_unstable();
    own
}

#[test]
fn net_open_gives_the_program_queue_and_environment_and_the_users_rights() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    place.net.host.ip("link set lower mtu 1400");
    // The queues, and behind them the socket that watches.
    for (keys, fds, numbers) in [("", "3", vec![3]), (",queues=2", "3:4", vec![3, 4])] {
        let watch = 3 + numbers.len() as i32;
        for netns in ["private", "host"] {
            let spec = format!("lower,mac={MAC},netns={netns},name=mine{keys}");
            let open = ["net", "open", &spec, "--user", USER];
            let show = ["--", "sh", "-c", SHOW];
            let mut vm = Vm::spawn(place.minivmm_on_a_desktop(&[&open[..], &show].concat()));
            let shown = vm.wait_for("pid=", PATIENCE);
            let pid = vm.wait_for("\n", PATIENCE).trim().parse().unwrap();
            let (user, more) = (USER_ID, USER_ID + 1);
            for line in [
                format!("uid={user} gid={user} groups={user} {more}\n"),
                format!("home=/ user={USER},{USER} runtime=\n"),
                format!("MINIVMM_NET_FDS={fds}\n"),
                format!("MINIVMM_NET_MAC={MAC}\n"),
                "MINIVMM_NET_MTU=1400\n".to_owned(),
                "MINIVMM_NET_NAME=mine\n".to_owned(),
                "MINIVMM_NET_LOWER=lower\n".to_owned(),
                "MINIVMM_NET_MODE=bridge\n".to_owned(),
                format!("MINIVMM_NET_WATCH={watch}\n"),
            ] {
                assert!(shown.contains(&line), "no {line:?} in {shown}");
            }
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                assert_eq!(after(&shown, set), "0000000000000000", "{set} {shown}");
            }
            for &number in &numbers {
                assert_eq!(mac_of_queue(&descriptor_of(pid, number)), MAC);
            }
            // A program that has just started has its libraries open.
            let all = [&numbers[..], &[watch]].concat();
            let has_no_other = eventually(|| descriptors(pid) == all);
            assert!(has_no_other, "{:?}, not {all:?}", descriptors(pid));
            let listing = succeeds(place.minivmm(&["net", "list", "lower"]));
            let own = format!("macvtap mine on lower  bridge  {MAC}  mtu 1400  not watched");
            assert!(listing.contains(&own), "{listing}");
            vm.signal(Signal::TERM);
            vm.wait_exit(PATIENCE);
            assert!(place.mac_gets_free(), "{spec}");
            assert_eq!(place.net.host.links(), ["lower"]);
        }
    }
}

#[test]
fn net_open_passes_the_programs_exit_status_on() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    for netns in ["private", "host"] {
        let spec = format!("lower,netns={netns}");
        let status = |script: &str| {
            run(place.minivmm(&["net", "open", &spec, "--", "sh", "-c", script])).status
        };
        assert_eq!(status("exit 0").code(), Some(0));
        assert_eq!(status("exit 7").code(), Some(7));
        // minivmm has become the program in a private namespace, and tells what a shell tells otherwise.
        let killed = status("kill -KILL $$");
        let told = killed.code().or(killed.signal().map(|signal| 128 + signal));
        assert_eq!(told, Some(128 + 9), "{netns}");
        assert_eq!(place.net.host.links(), ["lower"]);
    }
}

#[test]
fn net_open_for_nobody_known_or_without_a_program_leaves_nothing() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    for netns in ["private", "host"] {
        let spec = format!("lower,mac={MAC},netns={netns}");
        let refused = |args: &[&str], texts: &[&str]| {
            let args = [&["net", "open", &spec], args].concat();
            is_refused(place.minivmm(&args), FAILED, texts);
            assert_eq!(place.net.host.links(), ["lower"]);
            assert!(place.mac_gets_free(), "{args:?}");
        };
        refused(
            &["--user", "no-such-user", "--", "true"],
            &["there is no user \"no-such-user\""],
        );
        refused(
            &["--", "/no/such/program"],
            &["cannot run \"/no/such/program\"", "No such file"],
        );
        refused(
            &["--user", "nobody", "--", "/etc/passwd"],
            &["cannot run \"/etc/passwd\"", "Permission denied"],
        );
    }
    is_refused(
        place.minivmm(&["net", "open", "nolink", "--", "true"]),
        FAILED,
        &["`nolink`"],
    );
    is_refused(
        place.minivmm(&["net", "open", "lower"]),
        USAGE,
        &["COMMAND"],
    );
    is_refused(
        place.minivmm(&["net", "open", "lower,colour=red", "--", "true"]),
        USAGE,
        &["colour"],
    );
}

#[test]
fn net_open_private_link_is_gone_after_the_end_and_after_sigkill() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let spec = format!("lower,mac={MAC}");
    for signal in [Signal::TERM, Signal::KILL] {
        let show = ["net", "open", &spec, "--", "sh", "-c", SHOW];
        let mut vm = Vm::spawn(place.minivmm(&show));
        vm.wait_for("pid=", PATIENCE);
        assert_eq!(place.net.host.links(), ["lower"]);
        vm.signal(signal);
        assert_eq!(vm.wait_exit(PATIENCE).signal(), Some(signal.as_raw()));
        assert!(place.mac_gets_free());
    }
}

#[test]
fn net_open_in_the_hosts_namespace_shows_the_link_and_forwards_sigterm() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let script = "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done";
    let spec = "lower,netns=host,name=mine";
    let mut vm = Vm::spawn(place.minivmm(&[
        "net", "open", spec, "--user", "nobody", "--", "sh", "-c", script,
    ]));
    vm.wait_for("up\n", PATIENCE);
    let shown = place.net.host.ip("-d link show dev mine");
    assert!(
        shown.contains("alias owner: minivmm pid="),
        "no owner in {shown}"
    );
    assert!(shown.contains(&format!("pid={} ", vm.pid())), "{shown}");
    assert!(shown.contains("macvtap mode bridge"), "{shown}");
    vm.signal(Signal::TERM);
    assert_eq!(
        vm.wait_exit(PATIENCE).code(),
        Some(9),
        "{}",
        vm.transcript()
    );
    assert_eq!(place.net.host.links(), ["lower"]);
}

#[test]
fn net_open_in_the_hosts_namespace_ends_the_program_when_it_is_killed() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let spec = "lower,netns=host,name=mine";
    let open = ["net", "open", spec, "--user", USER, "--"];
    let mut vm = Vm::spawn(place.minivmm_on_a_desktop(&[&open[..], &["sh", "-c", SHOW]].concat()));
    vm.wait_for("pid=", PATIENCE);
    let pid: u32 = vm.wait_for("\n", PATIENCE).trim().parse().unwrap();
    assert_ne!(pid, vm.pid());
    vm.signal(Signal::KILL);
    // A zombie may stay, where nobody waits for orphans.
    let has_ended = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.map_or(true, |stat| stat.contains(") Z "))
    };
    assert!(eventually(has_ended), "its link may be deleted by anybody");
    vm.wait_exit(PATIENCE);
    let deleted = succeeds(place.minivmm(&["net", "gc"]));
    assert!(deleted.starts_with("deleted mine (macvtap)"), "{deleted}");
    assert_eq!(place.net.host.links(), ["lower"]);
}

#[test]
fn unprivileged_minivmm_in_net_open_serves_its_guest() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    // No descriptor tells its interface's MTU, and the usual one would be too much.
    place.net.host.ip("link set lower mtu 1400");
    for (keys, fds) in [
        ("netns=private", "fd=3"),
        ("netns=host", "fd=3"),
        ("queues=2", "fd=3:4"),
    ] {
        let spec = format!("lower,mac={MAC},{keys}");
        let program = place.path("minivmm");
        let open = ["net", "open", &spec, "--user", USER, "--"];
        let start = |options: &str| {
            let guest = place.guest(2, options);
            let inner = with(&guest, &["--macvtap", fds]);
            let outer = [&open[..], &[program.to_str().unwrap()], &inner].concat();
            Vm::spawn(place.minivmm_on_a_desktop(&outer))
        };
        let console = guest::succeed(start("mode=info"));
        assert_eq!(mac_in_guest(&console), MAC);
        assert!(console.contains(" mtu=1400"), "{console}");
        let vm = place.until_it_serves(start("mode=echo"));
        vm.wait_for_log("network card on lower: ", PATIENCE);
        for ip in addresses(2) {
            assert!(place.net.far.pings(&ip, 3), "{ip}\n{}", vm.transcript());
        }
        // Everybody's `net list` knows it, once, with what it says of itself.
        let listing = || succeeds(place.minivmm(&["net", "list", "lower"]));
        let is_listed = eventually(|| {
            let text = listing();
            let line = text
                .lines()
                .find(|line| line.contains(&format!("  bridge  {MAC}  mtu 1400  up  addr")));
            line.is_some_and(|line| addresses(2).iter().all(|ip| line.contains(ip)))
        });
        assert!(is_listed, "{}", listing());
        assert_eq!(listing().matches(" of pid ").count(), 1, "{}", listing());
        // The wire of a macvtap that it cannot see.
        place.net.far.down("wire");
        vm.wait_for_log("the link is down", PATIENCE);
        assert!(
            eventually(|| listing().contains("no carrier  addr")),
            "{}",
            listing()
        );
        place.net.far.up("wire");
        vm.wait_for_log("the link is up", PATIENCE);
        place.net.far.address("wire", &format!("{}/64", PEER[1]));
        place.net.quit(2, vm);
        assert_eq!(place.net.host.links(), ["lower"]);
        assert_eq!(listing().matches(" of pid ").count(), 0, "{}", listing());
    }
}

/// All that minivmm asks of QEMU here.
const NOT_REALLY_QEMU: &str = "#!/bin/sh
case $1 in
--version) echo QEMU emulator version 8.0.0 ;;
*) exec sleep 60 ;;
esac
";

#[test]
fn card_of_qemu_is_listed_while_it_runs_and_never_shared() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    place.macvtap("mine");
    let (script, program) = (place.path("script"), place.path("qemu"));
    fs::write(&script, NOT_REALLY_QEMU).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    copy_program(&script, &program);
    let program = program.to_str().unwrap();
    let qemu = |macvtaps: &[&str]| {
        let mut args = vec!["qemu", "--qemu", program];
        macvtaps
            .iter()
            .for_each(|spec| args.extend(["--macvtap", spec]));
        place.minivmm(&[&args[..], &["--", "-M", "q35"]].concat())
    };
    is_refused(qemu(&["mine", "mine"]), FAILED, &["two cards are on mine"]);
    let private = format!("lower,mac={MAC},mode=private");
    let mut vm = Vm::spawn(qemu(&["mine", &private]));
    let listing = || succeeds(place.minivmm(&["net", "list", "lower"]));
    let own = format!("program of pid {}, {program}\n", vm.pid());
    assert!(eventually(|| listing().contains(&own)), "{}", listing());
    let card = format!("macvtap macvtap0 on lower  private  {MAC}  mtu 1500");
    assert!(listing().contains(&card), "{}", listing());
    let texts = [program, "a part of its frames"];
    is_refused(qemu(&["mine"]), FAILED, &texts);
    vm.signal(Signal::TERM);
    vm.wait_exit(PATIENCE);
    assert!(!listing().contains(&own), "{}", listing());
}

// netns=host.

#[test]
fn visible_macvtap_names_its_owner_and_is_gone_at_the_end() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let options = ["--macvtap", "lower,netns=host,name=guest0"];
    let is_shown = |vm: &Vm| {
        let shown = place.net.host.ip("-d link show dev guest0");
        let owner = format!("alias owner: minivmm pid={} start=", vm.pid());
        assert!(shown.contains(&owner), "no {owner:?} in {shown}");
        assert!(shown.contains("macvtap mode bridge"), "{shown}");
    };
    let vm = place.serve(2, &options);
    is_shown(&vm);
    assert!(place.net.far.pings(&addresses(2)[0], 3));
    place.net.quit(2, vm);
    assert_eq!(place.net.host.links(), ["lower"], "after the power-off");

    let vm = place.serve(2, &options);
    is_shown(&vm);
    terminate(vm);
    assert_eq!(place.net.host.links(), ["lower"], "after SIGTERM twice");

    // Without a name it gets a free one.
    let vm = place.serve(2, &["--macvtap", "lower,netns=host"]);
    assert_eq!(place.net.host.links(), ["lower", "mvt0"]);
    place.net.quit(2, vm);
}

#[test]
fn leaked_macvtap_is_told_by_list_and_deleted_by_gc_and_a_live_one_is_not() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let dead = place.serve(2, &["--macvtap", "lower,netns=host,name=dead"]);
    let live = place.serve(3, &["--macvtap", "lower,netns=host,name=live"]);
    place.net.host.macvtap("users", "lower", "bridge");
    // Their indexes are random, and so is `ip`'s order.
    let links = || {
        let mut links = place.net.host.links();
        links.sort();
        links
    };
    let pid = dead.pid();
    kill(dead);
    assert_eq!(
        links(),
        ["dead", "live", "lower", "users"],
        "none deletes it"
    );

    let listing = succeeds(place.minivmm(&["net", "list"]));
    let line = |name: &str| {
        let word = format!("macvtap {name} ");
        let found = listing.lines().find(|line| line.contains(&word));
        found.unwrap_or_else(|| panic!("no {name} in {listing}"))
    };
    let leaked = "minivmm net gc";
    assert!(line("dead").contains(leaked), "{listing}");
    assert!(line("dead").contains(&format!("(pid {pid})")), "{listing}");
    assert!(!line("live").contains(leaked), "{listing}");
    assert!(!line("users").contains("owner"), "{listing}");
    let json = succeeds(place.minivmm(&["net", "list", "lower", "--json"]));
    assert_eq!(json.matches("\"leaked\": true").count(), 1, "{json}");

    let deleted = succeeds(place.minivmm(&["net", "gc"]));
    assert!(deleted.starts_with("deleted dead (macvtap)"), "{deleted}");
    assert_eq!(deleted.lines().count(), 1, "{deleted}");
    assert_eq!(links(), ["live", "lower", "users"]);
    assert_eq!(succeeds(place.minivmm(&["net", "gc"])), "");
    assert!(place.net.far.pings(&addresses(3)[0], 3), "the live one");
    place.net.quit(3, live);
    assert_eq!(links(), ["lower", "users"]);
}

#[test]
fn leaked_macvtap_is_deleted_by_the_next_start() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let spec = format!("lower,netns=host,name=guest0,mac={MAC}");
    kill(place.serve(2, &["--macvtap", &spec]));
    assert_eq!(place.net.host.links(), ["lower", "guest0"]);
    // Its name and its MAC address would be in the way.
    let vm = place.serve(2, &["--macvtap", &spec]);
    vm.wait_for_log("deleted guest0, which a dead process had left", PATIENCE);
    assert!(place.net.far.pings(&addresses(2)[0], 3));
    place.net.quit(2, vm);
    assert_eq!(place.net.host.links(), ["lower"]);
}

// Keys.

#[test]
fn keys_show_on_the_link_and_in_the_guest() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let spec = "lower,netns=host,name=guest0,mtu=1300,txqueuelen=700,bcqueuelen=2000,mode=vepa";
    let vm = place.serve(2, &["--macvtap", spec]);
    let shown = place.net.host.ip("-d link show dev guest0");
    for (word, value) in [
        ("mtu", "1300"),
        ("qlen", "700"),
        ("bcqueuelen", "2000"),
        ("mode", "vepa"),
    ] {
        let values: Vec<_> = shown.split_whitespace().collect();
        let has = values.windows(2).any(|pair| pair == [word, value]);
        assert!(has, "no {word} {value} in {shown}");
    }
    assert!(place.net.far.pings(&addresses(2)[0], 3));
    place.net.quit(2, vm);

    let guest = place.guest(2, "mode=info");
    let args = with(&guest, &["--macvtap", "lower,mtu=1300"]);
    let console = guest::succeed(Vm::spawn(place.minivmm(&args)));
    assert!(console.contains(" mtu=1300"), "{console}");
    for (key, text) in [
        ("mtu=9000", "9000"),
        ("txqueuelen=0", "not 0"),
        ("bcqueuelen=0", "1 or more"),
    ] {
        let spec = format!("lower,{key}");
        let args = with(&guest, &["--macvtap", &spec]);
        is_refused(place.minivmm(&args), FAILED, &["`lower`", text]);
    }
    let args = with(&guest, &["--macvtap", "lower,queues=2"]);
    let console = guest::succeed(Vm::spawn(place.minivmm(&args)));
    assert!(console.contains("NIC 0"), "{console}");
    let args = with(&guest, &["--macvtap", "lower,queues=32"]);
    is_refused(place.minivmm(&args), USAGE, &["1 to 31 queues"]);
}

#[test]
fn passthru_gives_the_lower_its_mac_back() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let host = &place.net.host;
    let own = host.mac("lower");
    let vm = place.serve(2, &["--macvtap", "lower,mode=passthru,netns=host,name=p0"]);
    assert_eq!(host.mac("p0"), own, "in passthru it is the lower's");
    assert!(place.net.far.pings(&addresses(2)[0], 3));
    host.ip(&format!("link set p0 address {MAC}"));
    assert_eq!(host.mac("lower"), MAC, "in passthru the lower's follows");
    terminate(vm);
    assert_eq!(host.links(), ["lower"]);
    assert_eq!(host.mac("lower"), own);

    let guest = place.guest(2, "mode=info");
    let spec = format!("lower,mode=passthru,mac={MAC}");
    let args = with(&guest, &["--macvtap", &spec]);
    is_refused(place.minivmm(&args), FAILED, &["passthru", MAC]);
    assert_eq!(host.mac("lower"), own);
}

#[test]
fn lower_in_another_namespace_carries_the_guest() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let elsewhere = Netns::new();
    let lower = place.net.host.path();
    let start = |keys: &str| {
        let spec = format!("lower,lower-netns={}{keys}", lower.display());
        let guest = place.guest(2, "mode=echo");
        let vm = place.until_it_serves(Vm::spawn(minivmm(
            &elsewhere,
            &with(&guest, &["--macvtap", &spec]),
        )));
        assert!(place.net.far.pings(&addresses(2)[0], 3));
        vm
    };
    place.net.quit(2, start(""));
    let vm = start(",netns=host,name=guest0");
    assert_eq!(elsewhere.links(), ["guest0"]);
    place.net.quit(2, vm);
    assert!(elsewhere.links().is_empty());
    assert_eq!(place.net.host.links(), ["lower"]);

    let guest = place.guest(2, "mode=info");
    let args = with(&guest, &["--macvtap", "lower,lower-netns=/run/netns/none"]);
    is_refused(minivmm(&elsewhere, &args), FAILED, &["/run/netns/none"]);
}

// Host and guest.

/// The host's addresses in these tests.
const HOST: [&str; 2] = ["10.77.0.8", "fd77::8"];

/// Host and guest reach each other, and the far side still both.
#[track_caller]
fn host_and_guest_talk(place: &Place, vm: &Vm) {
    for ip in addresses(2) {
        assert!(
            place.net.host.pings(&ip, 3),
            "host to {ip}\n{}",
            vm.transcript()
        );
        assert!(place.net.far.pings(&ip, 3), "far side to {ip}");
    }
    for (host, peer) in HOST.iter().zip(PEER) {
        assert!(place.net.far.pings(host, 3), "far side to {host}");
        assert!(place.net.host.pings(peer, 3), "host to {peer}");
        // A second guest asks the host: the first one is busy serving.
        let guest = place.guest(3, &format!("mode=ping count=3 peer={host}"));
        let args = with(&guest, &["--macvtap", "lower"]);
        guest::succeed(Vm::spawn(place.minivmm(&args)));
    }
}

#[test]
fn host_link_lets_host_and_guest_talk_until_it_is_deleted() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let vm = place.serve(2, &["--macvtap", "lower"]);
    let [v4, v6] = [format!("{}/24", HOST[0]), format!("{}/64", HOST[1])];
    let make = [
        "net",
        "host-link",
        "lower",
        "--address",
        &v4,
        "--address",
        &v6,
    ];
    for (name, words) in [("macvlan0", &[][..]), ("hosts", &["--name", "hosts"])] {
        let told = succeeds(place.minivmm(&[&make[..], words].concat()));
        assert!(told.starts_with(&format!("{name} on lower has")), "{told}");
        assert!(told.contains(&v4) && told.contains(&v6), "{told}");
        assert_eq!(place.net.host.links(), ["lower", name]);
        host_and_guest_talk(&place, &vm);
        let listing = succeeds(place.minivmm(&["net", "list", "lower"]));
        assert!(listing.contains("the host's own"), "{listing}");
        // By the name of either link.
        let by = if name == "hosts" { name } else { "lower" };
        let told = succeeds(place.minivmm(&["net", "host-link", by, "--delete"]));
        assert_eq!(told, format!("deleted {name} on lower\n"));
        assert_eq!(place.net.host.links(), ["lower"]);
        assert!(!place.net.host.pings(&addresses(2)[0], 1), "without it");
    }
    place.net.quit(2, vm);
}

#[test]
fn host_link_moves_the_lowers_addresses_and_routes_and_back() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let host = &place.net.host;
    host.address("lower", &format!("{}/24", HOST[0]));
    host.address("lower", &format!("{}/64", HOST[1]));
    host.ip(&format!("route add default via {}", PEER[0]));
    host.ip(&format!("-6 route add default via {}", PEER[1]));
    let routes = || host.ip("route show") + &host.ip("-6 route show default");
    let before = routes();
    let vm = place.serve(2, &["--macvtap", "lower"]);
    assert!(
        !host.pings(&addresses(2)[0], 1),
        "that is how macvtap works"
    );

    let told = succeeds(place.minivmm(&["net", "host-link", "lower", "--move-address"]));
    assert!(told.contains(HOST[0]) && told.contains(HOST[1]), "{told}");
    let with_link = routes();
    assert_eq!(after(&with_link, "dev"), "macvlan0", "{with_link}");
    assert!(!with_link.contains("dev lower"), "{with_link}");
    assert_eq!(with_link.matches("default via").count(), 2, "{with_link}");
    host_and_guest_talk(&place, &vm);

    let told = succeeds(place.minivmm(&["net", "host-link", "lower", "--delete"]));
    assert!(told.contains("are back there"), "{told}");
    assert_eq!(routes(), before);
    assert_eq!(host.links(), ["lower"]);
    for peer in PEER {
        assert!(host.pings(peer, 3), "{peer}");
    }
    place.net.quit(2, vm);
}

#[test]
fn host_link_that_cannot_be_is_refused_and_changes_nothing() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let host = &place.net.host;
    host.address("lower", &format!("{}/24", HOST[0]));
    let before = host.ip("address show");
    let refused = |args: &[&str], status: i32, texts: &[&str]| {
        let args = [&["net", "host-link"], args].concat();
        is_refused(place.minivmm(&args), status, texts);
        assert_eq!(host.ip("address show"), before, "{args:?}");
    };
    let address = ["--address", "10.99.0.8/24"];
    refused(
        &[&["nolink"], &address[..]].concat(),
        FAILED,
        &["cannot make a host link on `nolink`"],
    );
    refused(&["lower"], USAGE, &["--address"]);
    refused(&["lower", "--address", "10.99.0.8"], USAGE, &["10.99.0.8"]);
    refused(
        &["lower", "--address", "10.77.0.9/24"],
        FAILED,
        &["`lower` with its", "network of 10.77.0.9/24"],
    );
    refused(
        &["lower", "--address", &format!("{}/24", HOST[0])],
        FAILED,
        &["has the address", "already"],
    );
    refused(
        &["lower", "--delete"],
        FAILED,
        &["cannot delete the host link", "no host link on `lower`"],
    );
    refused(&["--delete"], FAILED, &["there is no host link"]);
    refused(
        &[&["lower", "--name", "lower"], &address[..]].concat(),
        FAILED,
        &["already an interface `lower`"],
    );
}

#[test]
fn host_link_to_delete_needs_no_name_when_it_is_the_only_one() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let host_link = |args: &[&str]| place.minivmm(&[&["net", "host-link"], args].concat());
    for (name, address) in [("one", "10.98.0.8/24"), ("two", "10.99.0.8/24")] {
        succeeds(host_link(&["lower", "--name", name, "--address", address]));
    }
    let both = ["`one` on `lower`", "`two` on `lower`", "name one of them"];
    is_refused(host_link(&["--delete"]), FAILED, &both);
    succeeds(host_link(&["one", "--delete"]));
    let told = succeeds(host_link(&["--delete"]));
    assert_eq!(told, "deleted two on lower\n");
}

#[test]
fn host_link_of_a_guest_lives_as_long_as_the_guest() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let [v4, v6] = [format!("{}/24", HOST[0]), format!("{}/64", HOST[1])];
    let options = ["--macvtap", "lower", "--host-link", &v4, "--host-link", &v6];
    let vm = place.serve(2, &options);
    assert_eq!(place.net.host.links(), ["lower", "macvlan0"]);
    host_and_guest_talk(&place, &vm);
    for name in ["lower", "macvlan0"] {
        is_refused(
            place.minivmm(&["net", "host-link", name, "--delete"]),
            FAILED,
            &[&format!("`macvlan0` belongs to the process {}", vm.pid())],
        );
    }
    place.net.quit(2, vm);
    assert_eq!(place.net.host.links(), ["lower"], "after the power-off");

    let vm = place.serve(2, &options);
    terminate(vm);
    assert_eq!(place.net.host.links(), ["lower"], "after SIGTERM twice");

    kill(place.serve(2, &options));
    assert_eq!(place.net.host.links(), ["lower", "macvlan0"]);
    let deleted = succeeds(place.minivmm(&["net", "gc"]));
    assert!(
        deleted.starts_with("deleted macvlan0 (macvlan)"),
        "{deleted}"
    );
    assert_eq!(place.net.host.links(), ["lower"], "after gc");
}

#[test]
fn host_link_on_an_interface_of_another_namespace_is_refused() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    // Where minivmm runs, the same names mean something else.
    let elsewhere = Netns::new();
    elsewhere.wire("lower");
    elsewhere.wire("mine");
    let before = elsewhere.links();
    let guest = place.guest(2, "mode=info");
    let spec = format!("lower,lower-netns={}", place.net.host.path().display());
    let options = ["--macvtap", &spec, "--host-link", "10.77.0.9/24"];
    let texts = ["--host-link", "not in this network namespace"];
    let refused = |command| {
        is_refused(command, FAILED, &texts);
        assert_eq!(elsewhere.links(), before);
        assert_eq!(place.net.host.links()[0], "lower");
    };
    refused(minivmm(&elsewhere, &with(&guest, &options)));
    let node = place.macvtap("mine");
    let script = format!("exec \"$@\" 3<>{}", node.display());
    let mut command = elsewhere.command("sh");
    command.args(["-ec", &script, "sh"]).arg(binary());
    command.args(with(
        &guest,
        &["--macvtap", "fd=3", "--host-link", "10.77.0.9/24"],
    ));
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    let run = run(command);
    assert_eq!(run.status.code(), Some(FAILED), "{run:?}");
    for text in [&texts[..], &["its carrier and its end will not show"]].concat() {
        assert_eq!(run.stderr.matches(text).count(), 1, "{text}: {run:?}");
    }
    assert_eq!(elsewhere.links(), before);
}

#[test]
fn host_link_of_a_guest_that_cannot_be_leaves_nothing() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    place.net.host.address("lower", &format!("{}/24", HOST[0]));
    let guest = place.guest(2, "mode=info");
    let options = [
        "--macvtap",
        "lower,netns=host",
        "--host-link",
        "10.77.0.9/24",
    ];
    is_refused(
        place.minivmm(&with(&guest, &options)),
        FAILED,
        &["cannot make a host link on `lower`", "10.77.0.9/24"],
    );
    assert_eq!(place.net.host.links(), ["lower"]);
    is_refused(
        place.minivmm(&with(&guest, &["--host-link", "10.77.0.9/24"])),
        USAGE,
        &["--macvtap"],
    );
}

// Exit status and streams.

#[test]
fn subcommands_answer_on_stdout_and_complain_on_stderr() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    assert_eq!(succeeds(place.minivmm(&["net", "gc"])), "");
    let vm = place.serve(2, &["--macvtap", "lower"]);
    assert_eq!(place.net.datagram(&addresses(2)[0], b"hello"), b"hello");
    // What the guest has said is told a moment later.
    let listing = || succeeds(place.minivmm(&["net", "list", "lower"]));
    let own = format!("guest of pid {}", vm.pid());
    let is_told = eventually(|| {
        let listing = listing();
        listing.contains(&own) && listing.contains(&addresses(2)[0])
    });
    assert!(is_told, "{}", listing());
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
}
