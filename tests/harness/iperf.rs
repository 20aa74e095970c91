//! iperf3 as a server in a namespace.

use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::netns::Netns;

/// iperf3's port, as /proc/net/tcp6 writes it.
const PORT: &str = ":1451 ";
const PATIENCE: Duration = Duration::from_secs(10);

/// What `iperf3` serves; killed when dropped.
pub struct Server(Child);

impl Server {
    /// Starts it in `netns`, and waits until it listens.
    pub fn start(netns: &Netns) -> Self {
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
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
