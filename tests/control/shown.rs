//! What `ps` shows, and `qmp`.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::harness::guest::{Net, addresses};
use crate::harness::vm::Vm;
use crate::harness::{eventually, guest_test};
use crate::host::Host;
use crate::tiny::Tiny;

guest_test!(vm_that_does_not_answer_delays_no_other, || {
    let host = Host::new();
    // They halt.
    let vms: Vec<_> = (0..20)
        .map(|_| host.start_with(Tiny::Prompt, "$ ", &["--memory", "16M"]))
        .collect();
    for vm in &vms[..10] {
        vm.signal(Signal::STOP);
    }
    // On a busy machine one that runs may be late too.
    let are_told_apart = || {
        let found = host.ps();
        assert_eq!(found.len(), 20);
        let state = |vm: &Vm| {
            let found = found.iter().find(|found| found["pid"] == vm.pid());
            found.unwrap()["state"].as_str().unwrap().to_owned()
        };
        let states: Vec<_> = vms.iter().map(state).collect();
        assert_eq!(states[..10], ["unresponsive"; 10]);
        states[10..] == ["running"; 10]
    };
    assert!(eventually(are_told_apart), "{:?}", host.ps());
    // More clients than may wait for a server.
    let path = host.runtime.directory.path().join("vms/vm1/qmp.sock");
    let clients: Vec<_> = (0..100).map_while(|_| client(&path).ok()).collect();
    assert!(clients.len() < 100);
    let table = host.show(&["ps"]);
    assert!(table.matches("unresponsive").count() >= 10, "{table}");
});

/// A client that does not wait for its server.
fn client(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK;
    let client = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&client, &SocketAddrUnix::new(path)?)?;
    Ok(client)
}

guest_test!(nics_show_with_mac_and_addresses, || {
    let host = Host::new();
    let net = Net::new();
    let prefix = host.runtime.prefix();
    let prefix: Vec<_> = prefix.iter().map(String::as_str).collect();
    let mut command = net.command_under(&prefix);
    let [ip, _] = addresses(2);
    let line = format!("guest.mode=echo guest.ip={ip}/24");
    let mac = "02:00:00:00:79:01";
    command.args(["--macvtap", &format!("lower,mac={mac}"), "--cmdline", &line]);
    let mut vm = Vm::spawn(command);
    vm.wait_for("READY echo\n");
    net.datagram(&ip, b"ping");
    let has_address = || {
        let nics = host.ps()[0]["nics"].clone();
        let addresses = nics[0]["addresses"].as_array().unwrap();
        nics[0]["mac"] == mac && addresses.contains(&json!(ip))
    };
    assert!(eventually(has_address), "{:?}", host.ps());
    let table = host.show(&["ps"]);
    assert!(table.contains(mac) && table.contains(&ip), "{table}");
});

guest_test!(qmp_by_name_returns_json_or_the_error, || {
    let host = Host::new();
    let _vm = host.start(&["--name", "web"]);
    let status = host.show(&["qmp", "web", "query-status"]);
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["running"], true);
    host.show(&["qmp", "web", "stop"]);
    host.await_state("paused");
    let (status, log) = host.fail(&["qmp", "web", "query-nothing"]);
    assert_eq!(status, 1);
    assert!(
        log.contains("The command query-nothing has not been found"),
        "{log}"
    );
    let path = host.ps()[0]["qmp"][0].as_str().unwrap().to_owned();
    host.show(&["qmp", &path, "cont", "{}"]);
    host.await_state("running");
});
