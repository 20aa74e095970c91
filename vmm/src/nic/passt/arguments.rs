//! passt's arguments, by what the guest is to have and what the host has.

use std::fs;
use std::net::IpAddr;
use std::process::Command;

use super::{MTU, READY, SOCKET};
use crate::config::{Network, Protocol, UserNet};

/// Where systemd's resolver says which ones it asks itself.
const UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";

pub(super) fn command(net: &UserNet) -> Command {
    let mut command = Command::new("passt");
    command.args(["--foreground", "--fd", &SOCKET.to_string()]);
    command.args(["--pid", &format!("/proc/self/fd/{READY}")]);
    command.args(["--mtu", &MTU.to_string()]);
    // By the gateway's address the guest would reach what listens on the host's loopback alone.
    command.arg("--no-map-gw");
    let network = net.network;
    command.args(["--address", &network.guest().to_string()]);
    command.args(["--netmask", &Network::PREFIX.to_string()]);
    command.args(["--gateway", &network.gateway().to_string()]);
    command.args(["--mac-addr", &network.gateway_mac()]);
    // Of use where the host has a route for IPv6.
    command.args(["--address", &network.guest_v6().to_string()]);
    if !has_default_route() {
        log::warn!(
            "the host has no default route: the guest does not reach beyond it, and can be reached by the ports of \
             hostfwd= alone"
        );
        command.args(["--interface", "lo"]);
    }
    match name_servers() {
        NameServers::Hosts => {}
        NameServers::Upstream(servers) => {
            for server in servers {
                command.args(["--dns", &server.to_string()]);
            }
        }
        NameServers::Loopback(server) => {
            let forwarded = network.name_server();
            log::warn!(
                "the host's name server is on its loopback ({server}): the guest reaches it at {forwarded}, which passt \
                 of Debian 12 does not announce"
            );
            command.args(["--dns-forward", &forwarded.to_string()]);
        }
    }
    for forward in &net.forwards {
        let option = match forward.protocol {
            Protocol::Tcp => "--tcp-ports",
            Protocol::Udp => "--udp-ports",
        };
        let address = forward.address.map(|address| format!("{address}/"));
        let address = address.unwrap_or_default();
        let (port, guest_port) = (forward.port, forward.guest_port);
        command.args([option, &format!("{address}{port}:{guest_port}")]);
    }
    command
}

/// Whether packets of either IP leave the host. Where that cannot be seen, they do.
fn has_default_route() -> bool {
    // Of this thread's network namespace.
    let read = |table| fs::read_to_string(format!("/proc/thread-self/net/{table}"));
    let Ok(ipv4) = read("route") else {
        return true;
    };
    is_default_in_ipv4(&ipv4) || read("ipv6_route").is_ok_and(|table| is_default_in_ipv6(&table))
}

/// Whether the kernel's table has a default route: destination and mask are 0.
fn is_default_in_ipv4(table: &str) -> bool {
    table.lines().any(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        (columns.get(1), columns.get(7)) == (Some(&"00000000"), Some(&"00000000"))
    })
}

/// The same: the length of the prefix is 0. That by the loopback refuses all.
fn is_default_in_ipv6(table: &str) -> bool {
    table.lines().any(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        columns.get(1) == Some(&"00") && columns.last() != Some(&"lo")
    })
}

/// Where the guest's name servers are.
#[derive(Debug, PartialEq, Eq)]
enum NameServers {
    /// In the host's resolv.conf, if anywhere, which passt reads itself.
    Hosts,
    /// Where the host's own resolver asks.
    Upstream(Vec<IpAddr>),
    /// On the host's loopback alone, where a guest reaches none.
    Loopback(IpAddr),
}

fn name_servers() -> NameServers {
    let servers = |path| fs::read_to_string(path).map_or(Vec::new(), |text| servers_of(&text));
    choose(&servers("/etc/resolv.conf"), || servers(UPSTREAM))
}

fn choose(hosts: &[IpAddr], upstream: impl FnOnce() -> Vec<IpAddr>) -> NameServers {
    let is_reached = |server: &IpAddr| !server.is_loopback();
    match hosts.first() {
        Some(first) if !hosts.iter().any(is_reached) => {
            let upstream: Vec<_> = upstream().into_iter().filter(is_reached).collect();
            match upstream.is_empty() {
                true => NameServers::Loopback(*first),
                false => NameServers::Upstream(upstream),
            }
        }
        _ => NameServers::Hosts,
    }
}

fn servers_of(resolv_conf: &str) -> Vec<IpAddr> {
    let lines = resolv_conf.lines().map(str::split_whitespace);
    let servers =
        lines.filter_map(|mut words| (words.next()? == "nameserver").then(|| words.next())?);
    servers.filter_map(|server| server.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_are_seen() {
        let head =
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
        let local = "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let default = "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";
        assert!(!is_default_in_ipv4(&format!("{head}{local}")));
        assert!(is_default_in_ipv4(&format!("{head}{local}{default}")));
        let route = |prefix, interface| {
            let zeros = "0".repeat(32);
            format!("{zeros} {prefix} {zeros} 00 {zeros} 00000400 1 0 00000003 {interface}\n")
        };
        assert!(is_default_in_ipv6(&route("00", "eth0")));
        assert!(!is_default_in_ipv6(
            &(route("00", "lo") + &route("40", "eth0"))
        ));
    }

    #[test]
    fn name_servers_are_read() {
        let text = "# made\nnameserver 127.0.0.53\noptions edns0\n nameserver  fd00::1\nnameserver fe80::1%2\nsearch x\n";
        let servers = servers_of(text);
        let expected: [IpAddr; 2] = ["127.0.0.53", "fd00::1"].map(|text| text.parse().unwrap());
        assert_eq!(servers, expected);
    }

    #[test]
    fn guest_gets_name_servers_that_it_reaches() {
        let [stub, far, other] =
            ["127.0.0.53", "192.0.2.1", "::1"].map(|text| text.parse::<IpAddr>().unwrap());
        let unread = || unreachable!("the host's are enough");
        assert_eq!(choose(&[], unread), NameServers::Hosts);
        assert_eq!(choose(&[stub, far], unread), NameServers::Hosts);
        assert_eq!(
            choose(&[stub], || vec![other, far]),
            NameServers::Upstream(vec![far])
        );
        assert_eq!(
            choose(&[stub, other], || vec![other]),
            NameServers::Loopback(stub)
        );
    }

    #[test]
    fn guest_has_the_addresses_of_its_network() {
        let net = UserNet {
            network: "10.0.7.0/24".parse().unwrap(),
            ..UserNet::default()
        };
        let command = command(&net);
        let args: Vec<_> = command.get_args().filter_map(|arg| arg.to_str()).collect();
        let expected = [
            ["--address", "10.0.7.15"],
            ["--netmask", "24"],
            ["--gateway", "10.0.7.2"],
            ["--mac-addr", "52:55:0a:00:07:02"],
            ["--address", "fd00:10:0:7::15"],
        ];
        assert!(
            args.windows(10).any(|args| args == expected.concat()),
            "{args:?}"
        );
    }
}
