//! What a running VM is waited for, by what it shows.

use std::net::{SocketAddrV6, UdpSocket};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;

use crate::harness::elf::elf;
use crate::harness::guest::{ECHO, Net, addresses};
use crate::harness::vm::Vm;
use crate::harness::{eventually, guest_test};
use crate::host::Host;
use crate::tiny::{CRASH, POWER_OFF, RESET, Tiny};

/// A host with a wire, and a guest on it that serves.
struct Wired {
    host: Host,
    net: Net,
}

/// A link-local address for the guest.
const OF_LINK: &str = "fe80::77:2";

impl Wired {
    fn new() -> Self {
        let (host, net) = (Host::new(), Net::new());
        Self { host, net }
    }

    /// Starts the VM `web`, as soon as it serves.
    fn start(&self, macvtap: &str, ip6: &str, args: &[&str]) -> Vm {
        let [ip, _] = addresses(2);
        let line = format!("guest.mode=echo guest.ip={ip}/24 guest.ip6={ip6}/64");
        let mut command = self
            .host
            .runtime
            .minivmm(&["--name", "web", "--memory", "128M"]);
        command.arg("--kernel").arg(elf()).stdin(Stdio::null());
        // The same for each that comes after another: the far side remembers it.
        let macvtap = format!("{macvtap},mac=02:00:00:00:77:02");
        command
            .args(["--macvtap", &macvtap, "--cmdline", &line])
            .args(args);
        let mut vm = self.net.host.enter(|| Vm::spawn(command));
        vm.wait_for("READY echo\n");
        vm
    }

    /// Starts `minivmm wait web` on the host, as soon as it waits.
    fn wait(&self, args: &[&str]) -> Vm {
        let mut command = self.host.runtime.minivmm(&["-v", "wait", "web"]);
        command.args(args).stdin(Stdio::null());
        let vm = self.net.host.enter(|| Vm::spawn(command));
        vm.wait_for_log("waiting for");
        vm
    }

    /// Has the guest answer a neighbour's question for its link-local address.
    fn show_link_local(&self) {
        let echoes = || {
            let links = net::links_here().unwrap();
            let wire = links.into_iter().find(|(_, (name, _))| name == "wire");
            let scope = wire.unwrap().0.index;
            let to = SocketAddrV6::new(OF_LINK.parse().unwrap(), ECHO, 0, scope);
            let socket = UdpSocket::bind("[::]:0").unwrap();
            socket
                .set_read_timeout(Some(Duration::from_millis(200)))
                .unwrap();
            socket.send_to(b"hi", to).is_ok() && socket.recv(&mut [0; 2]).is_ok()
        };
        assert!(eventually(|| self.net.far.enter(echoes)));
    }
}

impl Host {
    /// Starts `minivmm wait web`, as soon as it waits.
    fn wait(&self, args: &[&str]) -> Vm {
        let mut command = self.runtime.minivmm(&["-v", "wait", "web"]);
        command.args(args).stdin(Stdio::null());
        let vm = Vm::spawn(command);
        vm.wait_for_log("waiting for");
        vm
    }
}

guest_test!(address_is_waited_for_until_the_guest_shows_one, || {
    let wired = Wired::new();
    let _vm = wired.start("lower", OF_LINK, &[]);
    // One of its link is not what is waited for.
    wired.show_link_local();
    let mut short = wired.wait(&["--for", "address", "--timeout", "300ms"]);
    assert_eq!(short.wait_exit().code(), Some(124), "{}", short.log());
    assert!(
        short.log().contains(&format!("only {OF_LINK}")),
        "{}",
        short.log()
    );

    let mut waiter = wired.wait(&["--for", "address", "--timeout", "0"]);
    let [ip, _] = addresses(2);
    assert!(wired.net.far.pings(&ip, 10));
    assert_eq!(waiter.wait_exit().code(), Some(0), "{}", waiter.log());
    assert_eq!(waiter.console(), format!("{ip}\n"));
    // And what is known already.
    let mut late = wired.wait(&["--for", "address"]);
    assert_eq!(late.wait_exit().code(), Some(0), "{}", late.log());
    assert_eq!(late.console(), format!("{ip}\n"));
});

guest_test!(port_is_reached_beside_the_guest_without_a_host_link, || {
    let wired = Wired::new();
    let _vm = wired.start("lower", OF_LINK, &[]);
    let before = wired.net.host.links();
    let port = format!("port={ECHO}");
    let mut waiter = wired.wait(&["--for", &port, "--timeout", "0"]);
    wired.show_link_local();
    assert_eq!(waiter.wait_exit().code(), Some(0), "{}", waiter.log());
    assert_eq!(wired.net.host.links(), before);
    let mut closed = wired.wait(&["--for", "port=1", "--timeout", "2s"]);
    assert_eq!(closed.wait_exit().code(), Some(124), "{}", closed.log());
    assert!(
        closed.log().contains(&format!("{OF_LINK}: ")),
        "{}",
        closed.log()
    );
});

guest_test!(
    port_is_reached_over_a_host_link_and_without_one_it_is_named,
    || {
        let wired = Wired::new();
        let [ip, ip6] = addresses(2);
        let port = format!("port={ECHO}");
        for (link, status) in [(&["--host-link", "10.77.0.100/24"][..], 0), (&[], 124)] {
            let macvtap = if link.is_empty() {
                "lower,mode=private"
            } else {
                "lower"
            };
            let vm = wired.start(macvtap, &ip6, link);
            assert!(wired.net.far.pings(&ip, 10));
            let timeout = if link.is_empty() { "1s" } else { "0" };
            let mut waiter = wired.wait(&["--for", &port, "--timeout", timeout]);
            let ended = waiter.wait_exit().code();
            assert_eq!(ended, Some(status), "{}", waiter.log());
            if link.is_empty() {
                assert!(
                    waiter.log().contains("minivmm net host-link"),
                    "{}",
                    waiter.log()
                );
            }
            wired.net.quit(2, vm);
        }
    }
);

guest_test!(end_before_the_condition_is_named, || {
    let wired = Wired::new();
    let [_, ip6] = addresses(2);
    for condition in ["address", "port=1", "console=never"] {
        let vm = wired.start("lower", &ip6, &[]);
        let mut waiter = wired.wait(&["--for", condition, "--timeout", "0"]);
        // The question would show the guest's address.
        if condition == "address" {
            drop(vm);
        } else {
            wired.net.quit(2, vm);
        }
        let status = waiter.wait_exit().code();
        assert_eq!(status, Some(1), "{condition}: {}", waiter.log());
        assert!(waiter.log().contains("web has ended"), "{}", waiter.log());
    }
});

guest_test!(line_on_the_console_is_waited_for, || {
    let host = Host::new();
    let mut vm = host.start(&["--name", "web"]);
    // What was said before.
    let mut known = host.wait(&["--for", "console=^ready$"]);
    assert_eq!(known.wait_exit().code(), Some(0), "{}", known.log());
    let mut waiter = host.wait(&["--for", "console=^O[K]$", "--for", "console=login: "]);
    for piece in ["O", "KAY\n", "OK", "\n", "login: "] {
        assert!(!waiter.has_ended(), "{}", waiter.log());
        vm.send(piece);
        vm.wait_for(piece);
    }
    assert_eq!(waiter.wait_exit().code(), Some(0), "{}", waiter.log());
    let mut never = host.wait(&["--for", "console=never", "--timeout", "300ms"]);
    assert_eq!(never.wait_exit().code(), Some(124), "{}", never.log());
    assert!(
        never.log().contains("last line is `login:`"),
        "{}",
        never.log()
    );
});

guest_test!(end_is_waited_for_with_its_status, || {
    let host = Host::new();
    for (key, status) in [(POWER_OFF, 0), (RESET, 0), (CRASH, 3), ("", 137)] {
        let mut vm = host.start(&["--name", "web"]);
        let mut waiter = host.wait(&["--for", "exit", "--timeout", "0"]);
        match key {
            "" => vm.signal(Signal::KILL),
            key => vm.send(key),
        }
        let ended = waiter.wait_exit().code();
        assert_eq!(ended, Some(status), "{key}: {}", waiter.log());
        assert!(host.ps().is_empty());
    }
    let _vm = host.start(&["--name", "web"]);
    let mut short = host.wait(&["--for", "exit", "--timeout", "100ms"]);
    assert_eq!(short.wait_exit().code(), Some(124), "{}", short.log());
    let (status, log) = host.fail(&["wait", "wbe", "--for", "exit"]);
    assert!(status == 1 && log.contains("no VM is called wbe"), "{log}");
});

guest_test!(end_of_a_detached_vm_is_known_afterwards, || {
    let host = Host::new();
    let kernel = host.kernel(Tiny::Unrunnable);
    host.show(&["-d", "--name", "web", "--kernel", &kernel]);
    for _ in 0..2 {
        let (status, log) = host.fail(&["wait", "web", "--for", "exit", "--timeout", "0"]);
        assert_eq!(status, 3, "{log}");
    }
    let (status, log) = host.fail(&["wait", "web", "--for", "address"]);
    assert!(status == 1 && log.contains("web has ended"), "{log}");
});
