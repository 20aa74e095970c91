//! Processes of the test binary itself that open a macvtap, say so and wait to be killed.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use net::{Macvtap, MacvtapSpec, Placement};

use crate::netns::Netns;

const LINK: &str = "NET_TEST_LINK";
const PLACEMENT: &str = "NET_TEST_PLACEMENT";
const MODE: &str = "NET_TEST_MODE";
const MAC: &str = "NET_TEST_MAC";

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
    let mut command = netns.command(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child::opens_and_waits", "--nocapture"])
        .env(LINK, spec.link.as_str())
        .env(PLACEMENT, format!("{:?}", spec.netns))
        .env(MODE, spec.mode.unwrap_or_default().as_str())
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
        // Of no use when it was killed before.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
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
    println!("CHILD {}", macvtap.name());
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
