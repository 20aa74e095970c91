//! User networks, by the freestanding guest: minivmm beside QEMU with the same passt and with its own
//! `-netdev user`, and beside TCP on the loopback. The guest's stack is smoltcp with frames of 1514 bytes and
//! no offloads, whoever the monitor is.

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;

use crate::harness::netns::Netns;
use crate::harness::vm::Vm;

use super::monitors;
use super::native::{Effort, wait_for_line};
use super::report::Table;
use super::streams::{COLUMNS, ENDLESS, SERVICES, Service, Stream, bounded, measure, serve};

/// The name of the limit's row.
const BARE: &str = "bare loopback";
/// A service's port on the host is that of the guest's and this.
const PORTS: u16 = 2000;

/// One table: the limit and every monitor once a round.
pub fn run(effort: Effort) -> Vec<Table> {
    let title = "streams to a guest by TCP (user network)";
    eprintln!("{title}");
    let mut table = Table::new(title, &COLUMNS);
    // No route leads out of it: the guest has the address that QEMU gives to its own.
    let host = Netns::new();
    let options = format!("mode=echo ip=10.0.2.15/24 bytes={ENDLESS}");
    // What fills the host's buffers takes a slow guest long.
    for _ in 0..if effort.quick { 1 } else { effort.rounds } {
        let bare = |service| host.enter(|| bare(service));
        table.add(BARE, &measure(&bare, None, effort));
        for (name, command) in commands(&options) {
            let mut vm = host.enter(|| Vm::spawn(command));
            wait_for_line(&mut vm, "READY ");
            let connect = |service| host.enter(|| connect(service as u16 + PORTS));
            table.add(&name, &measure(&connect, Some(vm.pid()), effort));
        }
    }
    for (name, column) in [("to it, of QEMU", 0), ("from it, of QEMU", 2)] {
        table.add_ratio(name, column, "QEMU");
    }
    vec![table]
}

/// What starts the guest in each way.
fn commands(options: &str) -> Vec<(String, Command)> {
    let forward = |host: &str| {
        let ports = SERVICES.map(|service| service as u16);
        let forwards = ports.map(|port| format!("hostfwd=tcp:{host}:{}-:{port}", port + PORTS));
        forwards.join(",")
    };
    let own = ["--user-net".into(), forward("").into()];
    let ours = monitors::ours().map(|monitor| {
        let command = monitor.command_with(own.to_vec(), options);
        (monitor.name, command)
    });
    let mut all: Vec<_> = ours.collect();
    all.extend(monitors::q35().map(|monitor| {
        let command = monitor.command_by_minivmm(&own, options);
        (format!("{}, passt", monitor.name), command)
    }));
    all.extend(monitors::q35().map(|monitor| {
        let args = [
            "-netdev".to_owned(),
            format!("user,id=net0,{}", forward("127.0.0.1")),
            "-device".to_owned(),
            "virtio-net-pci,disable-legacy=on,romfile=,netdev=net0".to_owned(),
        ];
        let command = monitor.command_with(args.map(Into::into).to_vec(), options);
        (format!("{}, user", monitor.name), command)
    }));
    all
}

fn connect(port: u16) -> io::Result<Box<dyn Stream>> {
    bounded(TcpStream::connect((Ipv4Addr::LOCALHOST, port))?)
}

/// Connects to a thread.
fn bare(service: Service) -> io::Result<Box<dyn Stream>> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        if let Ok((stream, _)) = listener.accept() {
            // Else the round trips have the delays of Nagle's algorithm.
            let _ = stream.set_nodelay(true);
            serve(service, stream);
        }
    });
    connect(port)
}
