//! iperf3 as a server in a namespace.

use std::process::Stdio;

use super::eventually;
use super::netns::Netns;
use super::process::Killed;

/// iperf3's port, as /proc/net/tcp6 writes it.
const PORT: &str = ":1451 ";
/// Starts `iperf3 -s` in `netns`, and waits until it listens.
pub fn serve(netns: &Netns) -> Killed {
    let mut command = netns.command("iperf3");
    let child = command
        .arg("-s")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("iperf3 starts");
    // It does not report that it listens, but the namespace shows its socket.
    let sockets = || netns.exec(&["cat", "/proc/net/tcp6"]).stdout;
    let listens = || String::from_utf8_lossy(&sockets()).contains(PORT);
    assert!(eventually(listens), "iperf3 does not listen");
    Killed(child)
}
