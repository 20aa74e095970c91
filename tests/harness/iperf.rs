//! iperf3 as a server in a namespace.

use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use super::netns::Netns;
use super::process::Killed;

/// iperf3's port, as /proc/net/tcp6 writes it.
const PORT: &str = ":1451 ";
const PATIENCE: Duration = Duration::from_secs(10);

/// Starts `iperf3 -s` in `netns`, and waits until it listens.
pub fn serve(netns: &Netns) -> Killed {
    let mut command = netns.command("iperf3");
    let child = command
        .arg("-s")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("iperf3 starts");
    // It has no way to tell that it listens, but a socket in the namespace shows.
    let start = Instant::now();
    let sockets = || netns.exec(&["cat", "/proc/net/tcp6"]).stdout;
    while !String::from_utf8_lossy(&sockets()).contains(PORT) {
        assert!(start.elapsed() < PATIENCE, "iperf3 does not listen");
        thread::sleep(Duration::from_millis(50));
    }
    Killed(child)
}
