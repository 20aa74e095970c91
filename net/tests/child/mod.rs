//! Processes of the test binary itself that open a macvtap, say so and wait to be killed.

use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use net::{Macvtap, MacvtapSpec, Placement};

use crate::netns::Netns;

const LINK: &str = "NET_TEST_LINK";
const PLACEMENT: &str = "NET_TEST_PLACEMENT";
const MODE: &str = "NET_TEST_MODE";
const MAC: &str = "NET_TEST_MAC";
const CHANGED_MAC: &str = "NET_TEST_CHANGED_MAC";

/// A process that has a macvtap open. It is killed with this value.
pub struct Owner {
    process: Child,
    /// The macvtap's name.
    pub link: String,
    /// The macvtap's device nodes.
    pub nodes: Vec<PathBuf>,
}

/// Starts one in `netns`, with the keys of `spec`, and waits until it has its macvtap.
pub fn start(netns: &Netns, spec: &MacvtapSpec) -> Owner {
    start_and_change(netns, spec, "")
}

/// The same with a macvtap that it has given another MAC address, as a guest may.
pub fn start_and_change(netns: &Netns, spec: &MacvtapSpec, mac: &str) -> Owner {
    let mut command = netns.command(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child::opens_and_waits", "--nocapture"])
        .env(LINK, spec.link.as_str())
        .env(PLACEMENT, format!("{:?}", spec.netns))
        .env(MODE, spec.mode.unwrap_or_default().as_str())
        .env(CHANGED_MAC, mac)
        .env(MAC, spec.mac.map_or(String::new(), |mac| mac.to_string()));
    let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(process.stdout.take().unwrap()).lines();
    // The test harness puts its own words before, on the same line.
    let link = lines
        .map_while(Result::ok)
        .find_map(|line| line.split_once("CHILD ").map(|(_, said)| said.to_owned()));
    let nodes = nodes(process.id());
    let link = link.expect("the child opens a macvtap");
    Owner {
        process,
        link,
        nodes,
    }
}

/// The nodes of all macvtaps that a process has open.
fn nodes(pid: u32) -> Vec<PathBuf> {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = fds.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    targets
        .filter(|target| target.to_string_lossy().starts_with("/dev/tap"))
        .collect()
}

impl Owner {
    /// Ends it by SIGKILL.
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // It fails when the process was killed before.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Gives a macvtap another MAC through its queue, as a VMM does for its guest (SIOCSIFHWADDR).
pub fn set_mac(macvtap: &Macvtap, mac: &str) {
    let mac: net::MacAddr = mac.parse().unwrap();
    // SAFETY: all bytes zero is a value of ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let mut address = libc::sockaddr {
        sa_family: libc::ARPHRD_ETHER,
        sa_data: [0; 14],
    };
    for (to, from) in address.sa_data.iter_mut().zip(mac.octets()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_hwaddr = address;
    let fd = macvtap.queue().as_raw_fd();
    // SAFETY: the request reads one ifreq, which this is.
    let result = unsafe { libc::ioctl(fd, libc::SIOCSIFHWADDR, &request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Not a test by itself: the body of the processes.
#[test]
fn opens_and_waits() {
    let Ok(link) = std::env::var(LINK) else {
        return;
    };
    let mut spec = MacvtapSpec::new(link.parse().unwrap());
    if std::env::var(PLACEMENT).unwrap() == "Host" {
        spec.netns = Placement::Host;
    }
    spec.mode = Some(std::env::var(MODE).unwrap().parse().unwrap());
    spec.mac = std::env::var(MAC).unwrap().parse().ok();
    let macvtap = Macvtap::open(&spec).unwrap();
    let changed = std::env::var(CHANGED_MAC).unwrap();
    if !changed.is_empty() {
        set_mac(&macvtap, &changed);
    }
    println!("CHILD {}", macvtap.info().name.as_str());
    std::thread::sleep(Duration::from_secs(60));
}

/// Waits until the kernel has cleared away, as it does in the background.
pub fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
