//! Network namespaces for tests, and the links inside them.
//!
//! Every [`Netns`] has a name of its own (`mvt-<pid>-<n>`) and is deleted with its links when it is
//! dropped, also when the test panics; the next test deletes those of a test that was killed.
//! Nothing outside these namespaces is touched.
//!
//! Use it with `#[path = "..."] mod netns;`. A test that needs root is a `root_test!(name, || { ...
//! });`. The helpers use the `ip` command on purpose: it is not the code under test.

// Each test binary that includes this file uses a part of it.
#![allow(dead_code, unused_imports, unused_macros)]

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

#[path = "skip.rs"]
pub mod skip;

/// Whether this test may make namespaces. Without root it panics where `CI` is set, so that no run
/// there is empty, and elsewhere reports that the test is skipped.
pub fn is_root() -> bool {
    // SAFETY: geteuid takes nothing and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        return true;
    }
    skip::leave_out("tests that make network namespaces need root: run them with sudo");
    false
}

/// A test that needs root. It finds [`as_root`] by the name `netns`, which has to be in scope.
macro_rules! root_test {
    ($name:ident, $body:expr) => {
        #[test]
        fn $name() {
            netns::as_root($body);
        }
    };
}
pub(crate) use root_test;

/// Runs a test's body if it [`is_root`].
pub fn as_root(body: impl FnOnce()) {
    if is_root() {
        body();
    }
}

/// A network namespace that exists as long as this value.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

/// Deletes the namespaces of test processes that were killed, for which no destructor ran.
fn sweep() {
    let Ok(names) = std::fs::read_dir("/run/netns") else {
        return;
    };
    for name in names.flatten().map(|entry| entry.file_name()) {
        let name = name.to_string_lossy();
        let mut parts = name.strip_prefix("mvt-").unwrap_or_default().split('-');
        let pid = parts.next().and_then(|pid| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !PathBuf::from(format!("/proc/{pid}")).exists()) {
            // Another test may be sweeping too.
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
}

impl Netns {
    /// A new, empty namespace, its loopback up.
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("mvt-{}-{n}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &name]));
        let netns = Self { name };
        // It is not shared, and `tentative` would come and go in listings.
        netns.detect_duplicates(false);
        netns.ip("link set lo up");
        netns
    }

    /// Its name, as `ip netns` lists it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it, as setns(2) wants it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Runs `ip -n NAME ARGS` (split at spaces), and panics with its message when it fails.
    pub fn ip(&self, args: &str) -> String {
        let output = run(Command::new("ip")
            .args(["-n", &self.name])
            .args(args.split_whitespace()));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A command that will run inside. It goes by `ip netns exec`, so its `/sys` shows this
    /// namespace too.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Runs a command inside to its end, whatever its status.
    pub fn exec(&self, argv: &[&str]) -> Output {
        let (program, args) = argv.split_first().expect("a command");
        self.command(program)
            .args(args)
            .output()
            .expect("ip netns exec starts")
    }

    /// Runs `work` on a thread of its own inside the namespace (`/sys` stays the caller's); returns
    /// its result.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = File::open(self.path()).expect("the namespace exists");
        let inside = move || {
            // SAFETY: setns takes an open descriptor of a namespace, which `file` holds; it moves
            // this thread alone.
            let moved = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
            assert_eq!(moved, 0, "setns: {}", std::io::Error::last_os_error());
            work()
        };
        thread::scope(|scope| match scope.spawn(inside).join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }

    /// A veth pair, `name` here and `peer_name` in `peer`, both up.
    pub fn veth(&self, name: &str, peer: &Netns, peer_name: &str) {
        // Born straight into both: the namespace of the test itself never sees either end.
        self.ip(&format!(
            "link add {name} type veth peer name {peer_name} netns {}",
            peer.name
        ));
        self.up(name);
        peer.up(peer_name);
    }

    /// An Ethernet link with its far end (`<name>-far`) here too, both up. (A dummy would do, where
    /// the kernel has that driver.)
    pub fn wire(&self, name: &str) {
        self.veth(name, self, &format!("{name}-far"));
    }

    /// Adds a link of a kind that not every kernel has (`ip link add ARGS`), and reports when this
    /// one lacks it.
    pub fn add_if_supported(&self, args: &str) -> bool {
        let output = Command::new("ip")
            .args(["-n", &self.name, "link", "add"])
            .args(args.split_whitespace())
            .output();
        let output = output.expect("ip starts");
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            assert!(
                why.contains("Unknown device type"),
                "ip link add {args}: {why}"
            );
            skip::not_tested(&format!("this kernel cannot `ip link add {args}`"));
        }
        output.status.success()
    }

    /// A bridge, up, with `ports` enslaved to it.
    pub fn bridge(&self, name: &str, ports: &[&str]) {
        self.ip(&format!("link add {name} type bridge"));
        self.up(name);
        for port in ports {
            self.ip(&format!("link set {port} master {name}"));
        }
    }

    /// A macvlan in bridge mode on `lower`, which lives in namespace `of`; the macvlan lands here,
    /// and is up. This is how a "third host" on the same wire as the guests is made.
    pub fn macvlan(&self, name: &str, of: &Netns, lower: &str) {
        of.ip(&format!(
            "link add link {lower} name {name} netns {} type macvlan mode bridge",
            self.name
        ));
        self.up(name);
    }

    /// A macvtap on `lower`, both of this namespace, as a user would make it with `ip link`. It is
    /// up.
    pub fn macvtap(&self, name: &str, lower: &str, mode: &str) {
        self.ip(&format!(
            "link add link {lower} name {name} type macvtap mode {mode}"
        ));
        self.up(name);
    }

    /// A descriptor of a new tun or tap (IFF_*); without a name the kernel chooses one.
    pub fn tun(&self, name: &str, flags: libc::c_int) -> OwnedFd {
        self.enter(|| {
            let mut options = File::options();
            let file = options.read(true).write(true).open("/dev/net/tun");
            let file = file.expect("/dev/net/tun");
            // SAFETY: all bytes zero is a value of ifreq.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
                *to = from as libc::c_char;
            }
            request.ifr_ifru.ifru_flags = flags as libc::c_short;
            // SAFETY: the request reads and writes one ifreq, which this is.
            let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
            assert_eq!(done, 0, "{}", io::Error::last_os_error());
            file.into()
        })
    }

    /// Whether links that are made from now on look for another owner of each new IPv6 address, as
    /// they do on most machines: for a second that address cannot be used.
    pub fn detect_duplicates(&self, on: bool) {
        let value = if on { "1" } else { "0" };
        self.enter(|| {
            for which in ["all", "default"] {
                // A kernel without IPv6 has no such setting.
                let path = format!("/proc/sys/net/ipv6/conf/{which}/accept_dad");
                let _ = std::fs::write(path, value);
            }
        });
    }

    /// Brings a link up.
    pub fn up(&self, link: &str) {
        self.ip(&format!("link set {link} up"));
    }

    /// Takes a link down.
    pub fn down(&self, link: &str) {
        self.ip(&format!("link set {link} down"));
    }

    /// Gives a link an address, as `192.0.2.1/24` or `fd00::1/64` (the latter usable at once: no
    /// duplicate detection).
    pub fn address(&self, link: &str, address: &str) {
        let nodad = if address.contains(':') { "nodad" } else { "" };
        self.ip(&format!("address add {address} dev {link} {nodad}"));
    }

    /// The names of the links inside, loopback left out.
    pub fn links(&self) -> Vec<String> {
        let listing = self.ip("-o link show");
        let names = listing.lines().filter_map(|line| line.split(':').nth(1));
        let names = names.filter_map(|name| name.trim().split('@').next());
        names
            .filter(|name| *name != "lo")
            .map(str::to_owned)
            .collect()
    }

    /// The MAC address of a link, as `ip` writes it.
    pub fn mac(&self, link: &str) -> String {
        let listing = self.ip(&format!("-o link show dev {link}"));
        let mac = listing
            .split_whitespace()
            .skip_while(|word| *word != "link/ether")
            .nth(1);
        mac.expect("an Ethernet link").to_owned()
    }

    /// What the kernel counts of a link, in the order of /proc/net/dev: bytes, packets, errors and
    /// dropped packets are the first four numbers of those received, and 8 to 11 of those sent.
    pub fn counters(&self, link: &str) -> Vec<u64> {
        let list = || std::fs::read_to_string("/proc/thread-self/net/dev");
        let list = self.enter(list).expect("/proc is mounted");
        let line = list
            .lines()
            .find_map(|line| line.trim().strip_prefix(link)?.strip_prefix(':'));
        let numbers = line.expect("a link").split_whitespace();
        numbers
            .map(|number| number.parse().expect("a number"))
            .collect()
    }

    /// Whether `address` answers a ping from inside, tried up to `tries` times with a second's
    /// patience each.
    pub fn pings(&self, address: &str, tries: u32) -> bool {
        let address: IpAddr = address.parse().expect("an IP address");
        self.enter(|| (0..tries).any(|try_no| ping(address, try_no as u8).is_ok()))
    }
}

/// One echo request and its answer (RFC 792, RFC 4443), by a raw socket: a bare machine has no ping
/// program.
fn ping(address: IpAddr, sequence: u8) -> io::Result<()> {
    let (family, protocol, request, answer, header) = match address {
        IpAddr::V4(_) => (libc::AF_INET, libc::IPPROTO_ICMP, 8, 0, 20),
        IpAddr::V6(_) => (libc::AF_INET6, libc::IPPROTO_ICMPV6, 128, 129, 0),
    };
    // SAFETY: socket takes plain numbers.
    let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    // It is no UDP socket, but connect, send, receive and time-outs are the same for both.
    let socket = unsafe { UdpSocket::from_raw_fd(fd) };
    socket.connect((address, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    // Type, code, checksum, identifier, sequence number. For ICMPv6 the kernel fills in the
    // checksum.
    let [id_high, id_low] = (std::process::id() as u16).to_be_bytes();
    let sum = !fold(
        u32::from(request) * 256
            + u32::from_be_bytes([0, 0, id_high, id_low])
            + u32::from(sequence),
    );
    let [sum_high, sum_low] = sum.to_be_bytes();
    socket.send(&[request, 0, sum_high, sum_low, id_high, id_low, 0, sequence])?;

    let deadline = Instant::now() + Duration::from_secs(1);
    while Instant::now() < deadline {
        let mut buffer = [0; 256];
        let length = socket.recv(&mut buffer)?;
        let message = buffer[..length].get(header..).unwrap_or_default();
        if message.first() == Some(&answer)
            && message.get(4..8) == Some(&[id_high, id_low, 0, sequence])
        {
            return Ok(());
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

fn fold(sum: u32) -> u16 {
    (sum % 0xffff) as u16
}

impl Drop for Netns {
    fn drop(&mut self) {
        // A failure here must not hide the test's own: said, not raised.
        match Command::new("ip")
            .args(["netns", "delete", &self.name])
            .output()
        {
            Ok(output) if output.status.success() => {}
            Ok(output) => eprintln!(
                "namespace {}: {}",
                self.name,
                String::from_utf8_lossy(&output.stderr)
            ),
            Err(error) => eprintln!("namespace {}: {error}", self.name),
        }
    }
}

fn run(command: &mut Command) -> Output {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}
