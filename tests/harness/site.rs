//! A wire with a lower interface for guests and a third host on it, and what a Linux guest does
//! there.

use std::net::UdpSocket;

use super::netns::Netns;
use super::process::Killed;
use super::vm::Vm;

/// The MAC address of the guest that gets a known address by DHCP; others get another one.
pub const LEASED_TO: &str = "02:aa:00:00:00:32";
/// The address that it gets.
pub const LEASED: &str = "192.168.77.50";

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

    /// Starts a DHCP server on the third host, which gives [`LEASED`] to [`LEASED_TO`].
    pub fn serve_dhcp(&self) -> Killed {
        let mut command = self.peer.command("dnsmasq");
        command.args([
            "--no-daemon",
            "--conf-file=/dev/null",
            "--port=0",
            "--user=root",
            "--group=root",
            "--interface=peer0",
            "--bind-interfaces",
            "--dhcp-range=192.168.77.50,192.168.77.59",
            &format!("--dhcp-host={LEASED_TO},{LEASED}"),
            "--leasefile-ro",
            "--no-ping",
            "--pid-file=",
        ]);
        Killed(command.spawn().expect("dnsmasq starts"))
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
