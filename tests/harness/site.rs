//! A wire with a lower interface for guests and a third host on it, and what a Linux guest does
//! there.

use std::net::UdpSocket;

use super::netns::Netns;
use super::vm::Vm;

/// The namespaces of one wire.
pub struct Site {
    /// Where the monitor runs; its link `wire` has 192.168.77.1 and fd77::1.
    pub host: Netns,
    /// A macvlan on that link, with 192.168.77.3 and fd77::3.
    pub peer: Netns,
    /// Where the wire ends, at its link `end`.
    pub far: Netns,
}

impl Site {
    /// Makes them.
    pub fn new() -> Self {
        let site = Self {
            host: Netns::new(),
            peer: Netns::new(),
            far: Netns::new(),
        };
        site.host.veth("wire", &site.far, "end");
        site.host.address("wire", "192.168.77.1/24");
        site.host.address("wire", "fd77::1/64");
        site.peer.macvlan("peer0", &site.host, "wire");
        site.peer.address("peer0", "192.168.77.3/24");
        site.peer.address("peer0", "fd77::3/64");
        site
    }
}

/// Gives a guest's interface the addresses 192.168.77.N and fd77::N.
pub fn address(vm: &mut Vm, interface: &str, n: u8) {
    vm.run(&format!(
        "ip link set {interface} up && ip addr add 192.168.77.{n}/24 dev {interface} && ip addr add fd77::{n}/64 dev {interface}"
    ));
}

/// Whether the guest reaches an address, tried up to five times with a second's patience each.
pub fn pings(vm: &mut Vm, to: &str) -> bool {
    let ping = format!("for i in 1 2 3 4 5; do ping -q -c1 -W1 {to} && exit; done; exit 1");
    vm.try_run(&ping).status == 0
}

/// Sends so many datagrams, each from a port of its own, that each of a NIC's queues gets some: the host's kernel spreads
/// frames by addresses and ports.
pub fn send_from_many_ports(netns: &Netns, from: &str, to: &str) {
    netns.enter(|| {
        for _ in 0..256 {
            let socket = UdpSocket::bind((from, 0)).expect("an address on the wire");
            socket.send_to(b"spread", (to, 9)).expect("it is sent");
        }
    });
}
