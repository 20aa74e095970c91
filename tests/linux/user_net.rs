//! A user network as a stock kernel and its DHCP client find it.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::thread;

use crate::harness::eventually;
use crate::harness::guest::{Net, PEER, addresses};
use crate::harness::lab_test;
use crate::harness::linux::{boot_command, command, small_initrd};
use crate::harness::netns::Netns;
use crate::harness::vm::Vm;

/// The number of the host.
const HOST: u8 = 2;
/// Makes what udhcpc calls. The guest takes a command of one line alone.
const LEASE: &str = concat!(
    r#"printf '%s\n' '#!/bin/sh' '[ "$1" = bound ] || exit 0' "#,
    r#"'ip address add "$ip/$mask" dev "$interface"' 'ip route add default via "$router"' "#,
    r#"'echo "$dns" >/tmp/dns' "#,
    ">/bin/lease && chmod +x /bin/lease",
);

/// The name server of a host that has one, at which nothing answers.
const NAME_SERVER: &str = "192.0.2.53";

/// Boots a guest on a host that asks [`NAME_SERVER`].
fn boot_on(host: &Netns, args: &[&str]) -> Vm {
    let directory = tempfile::tempdir().expect("a directory");
    let resolv_conf = directory.path().join("resolv.conf");
    fs::write(&resolv_conf, format!("nameserver {NAME_SERVER}\n")).expect("it is ours");
    // In the mount namespace that `ip netns exec` makes.
    let script = r#"mount --bind "$0" /etc/resolv.conf && exec "$@""#;
    let mut on_host = host.command("sh");
    on_host.args(["-c", script]).arg(&resolv_conf);
    let guest = command(None, args);
    on_host.arg(guest.get_program()).args(guest.get_args());
    on_host.stdin(Stdio::piped());
    boot_command(on_host)
}

/// A program of the guest's connects to `address`; returns what arrives there.
fn said_to(net: &Net, vm: &mut Vm, address: &str) -> String {
    let listener = net.far.enter(|| TcpListener::bind((address, 0)));
    let listener = listener.expect("a port is free");
    let port = listener.local_addr().expect("it is bound").port();
    let reader = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the guest connects");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("the guest sends");
        text
    });
    vm.run(&format!("echo to {address} | nc {address} {port}"));
    reader.join().expect("it ends")
}

/// Whether a program of the guest's at the host's forwarded port of `address` answers.
fn is_answered(net: &Net, vm: &mut Vm, address: &str) -> bool {
    vm.run("(echo of the guest | nc -l -p 80) >/dev/null 2>&1 &");
    eventually(|| {
        let mut text = String::new();
        let connected = net.far.enter(|| TcpStream::connect((address, 8080)));
        // passt of 2023 has the guest's connection wait until the client says something.
        let read = connected.and_then(|mut stream| {
            stream.write_all(b"hello\n")?;
            stream.read_to_string(&mut text)
        });
        read.is_ok() && text == "of the guest\n"
    })
}

lab_test!(guest_on_a_user_network_is_configured_and_connected, || {
    let net = Net::routed(HOST);
    let initrd = small_initrd();
    let initrd = initrd.to_str().expect("the cache's path is UTF-8");
    let forward = "hostfwd=tcp::8080-:80";
    let args = [
        "--initrd",
        initrd,
        "--memory",
        "256M",
        "--user-net",
        forward,
    ];
    let mut vm = boot_on(&net.host, &args);
    vm.run("ip link set eth0 up");
    vm.run(LEASE);
    vm.run("udhcpc -n -q -i eth0 -s /bin/lease");
    let addresses_of_guest = vm.run("ip -4 address show dev eth0");
    assert!(
        addresses_of_guest.contains("inet 10.0.2.15/24"),
        "{addresses_of_guest}"
    );
    let routes = vm.run("ip -4 route");
    assert!(routes.contains("default via 10.0.2.2 dev eth0"), "{routes}");
    assert_eq!(vm.run("cat /tmp/dns").trim(), NAME_SERVER);

    // By a router advertisement; DHCPv6 is not asked.
    let mut found = String::new();
    let is_announced = || {
        found = vm.run("ip -6 address show dev eth0 scope global; ip -6 route");
        found.contains("inet6 fd00:10:0:2:") && found.contains("default via fe80:")
    };
    assert!(eventually(is_announced), "{found}\n{}", vm.transcript());

    let hosts = addresses(HOST);
    for (far, near) in PEER.iter().zip(&hosts) {
        assert_eq!(said_to(&net, &mut vm, far), format!("to {far}\n"));
        assert!(
            is_answered(&net, &mut vm, near),
            "{near}\n{}",
            vm.transcript()
        );
    }
    // The router's address does not lead to the host's loopback.
    let _host = net.host.enter(|| TcpListener::bind(("127.0.0.1", 22)));
    let refused = vm.try_run("nc -w 2 10.0.2.2 22 </dev/null");
    assert_ne!(refused.status, 0, "{}", vm.transcript());
});
