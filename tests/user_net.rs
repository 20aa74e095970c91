//! `--user-net`: the freestanding guest on a network by passt, which goes out by a veth pair in
//! namespaces that each test makes.

mod harness;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use harness::guest::{ECHO, Net, PEER, SINK, SOURCE, addresses, stream_bytes, succeed};
use harness::netns::Netns;
use harness::process::{children, is_running};
use harness::vm::{self, Vm, copy_program};
use harness::{elf::elf, eventually, guest_test};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use vmm::config::{Config, ConsoleTarget, parse_user_net};
use vmm::stats::Stats;
use vmm::{Exit, Guest};

/// How much the streams carry.
const BULK: usize = 4 << 20;
/// The number of the host, by whose addresses the guest is reached.
const HOST: u8 = 2;
/// The guest's addresses. It has no router, and passt answers for every address.
const GUEST: &str = "guest.ip=10.0.2.15/0 guest.ip6=fd00:10:0:2::15/64";

/// Forwards the ports of what the guest serves.
fn services() -> String {
    let tcp = [ECHO, SINK, SOURCE].map(|port| format!("hostfwd=tcp::{port}-:{port}"));
    format!("{},hostfwd=udp::{ECHO}-:{ECHO}", tcp.join(","))
}

/// The command that starts the guest with this value of `--user-net`.
fn command(net: &Net, user_net: &str, options: &str) -> Command {
    let options: Vec<_> = options
        .split_whitespace()
        .map(|option| format!("guest.{option}"))
        .collect();
    let line = format!("{} {GUEST}", options.join(" "));
    let mut command = net.command();
    command.args(["--user-net", user_net, "--cmdline", &line]);
    command
}

fn serve(net: &Net, user_net: &str, options: &str) -> Vm {
    let mut vm = Vm::spawn(command(net, user_net, &format!("mode=echo {options}")));
    vm.wait_for("READY echo\n");
    vm
}

/// Fills the guest's sink and drains its source, again and again. Meanwhile `disturb` runs after every few
/// frames that `stats` counts: a guest that is stopped whether it has moved on or not may never come to
/// the end, since passt sends all that is not acknowledged anew for each frame that comes twice.
fn streams_disturbed(net: &Net, stats: impl Fn() -> Stats, disturb: impl Fn()) {
    const FEW: u64 = 16;
    let passed = || {
        let pair = stats().nics[0].queues[0];
        pair.rx.frames + pair.tx.frames
    };
    let [ip, _] = addresses(HOST);
    thread::scope(|scope| {
        let streams = scope.spawn(|| {
            for _ in 0..3 {
                net.fill_sink(&ip, BULK);
                drain(net, &ip, BULK);
            }
        });
        let mut next = 0;
        while !streams.is_finished() {
            let now = passed();
            if now < next {
                thread::yield_now();
                continue;
            }
            disturb();
            next = now + FEW;
        }
    });
}

/// The process of the guest's passt.
fn passt_of(vm: &Vm) -> u32 {
    let [passt] = children(vm.pid())[..] else {
        panic!("{:?}\n{}", children(vm.pid()), vm.transcript())
    };
    passt
}

/// Reads the guest's source to its end, as [`Net::drain_source`] does, but speaks first: passt versions up to Debian 12's
/// complete a connection to the guest only then.
fn drain(net: &Net, ip: &str, bytes: usize) -> u64 {
    let start = Instant::now();
    net.connect(ip, SOURCE, |mut stream| {
        stream.write_all(b"\n").expect("the connection is up");
        let mut received = Vec::new();
        stream.read_to_end(&mut received).expect("the guest sends");
        assert!(
            received == stream_bytes(0, bytes),
            "{} bytes",
            received.len()
        );
    });
    bytes as u64 * 8 / start.elapsed().as_micros().max(1) as u64
}

fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    kill_process(pid.expect("a process"), signal).expect("it runs");
}

/// Has the guest's QMP run a command.
fn qmp(socket: &Path, words: &[&str]) {
    let mut command = Command::new(vm::binary());
    let output = command.arg("qmp").arg(socket).args(words).output();
    let output = output.expect("it starts");
    assert!(output.status.success(), "{output:?}");
}

fn stats_of(socket: &Path) -> Stats {
    let mut stats = Command::new(vm::binary());
    stats.arg("stats").arg(socket).arg("--json");
    let json = stats.output().expect("it starts").stdout;
    serde_json::from_slice(&json).expect("of the VM")
}

fn set_link(socket: &Path, up: bool) {
    let arguments = format!(r#"{{"name": "net0", "up": {up}}}"#);
    qmp(socket, &["set_link", &arguments]);
}

/// A guest of this program that serves, with the directory of its console.
fn serve_here(net: &Net) -> (Guest, TempDir) {
    let directory = tempfile::tempdir().expect("a directory");
    let console = directory.path().join("console");
    let mut config = Config::new(elf());
    config.memory = "128M".parse().expect("a size");
    config.console = ConsoleTarget::File(console.clone());
    config.cmdline = format!("guest.mode=echo guest.bytes={BULK} {GUEST}");
    config.nics = vec![parse_user_net(&services()).expect("keys")];
    let guest = net.host.enter(|| Guest::start(config).expect("it starts"));
    let is_ready = || fs::read_to_string(&console).is_ok_and(|text| text.contains("READY echo\n"));
    assert!(eventually(is_ready), "{:?}", fs::read_to_string(&console));
    (guest, directory)
}

/// Has a guest of this program end itself.
fn quit_here(net: &Net, guest: Guest) {
    let [ip, _] = addresses(HOST);
    assert_eq!(net.datagram(&ip, b"quit"), b"quit");
    let exit = guest.wait().expect("it has run");
    assert_eq!(exit, Exit::PowerOff);
}

/// A directory with a program `passt` in it, and the value of PATH that finds it.
fn another_passt(directory: &Path, script: &str) -> String {
    let text = directory.join("text");
    fs::write(&text, format!("#!/bin/sh\n{script}\n")).expect("the directory can be written");
    fs::set_permissions(&text, fs::Permissions::from_mode(0o755)).expect("it is ours");
    copy_program(text, directory.join("passt"));
    format!("{}:/usr/bin:/bin", directory.display())
}

/// minivmm's log when it cannot start the guest.
#[track_caller]
fn refused(command: Command) -> String {
    let mut vm = Vm::spawn(command);
    let status = vm.wait_exit();
    assert_eq!(status.code(), Some(1), "{}", vm.transcript());
    vm.log()
}

guest_test!(guest_is_reached_by_forwarded_ports, || {
    let net = Net::routed(HOST);
    let vm = serve(&net, &services(), &format!("bytes={BULK}"));
    let passt = passt_of(&vm);
    let [ip, _] = addresses(HOST);
    let datagram = stream_bytes(0, 1400);
    assert_eq!(net.datagram(&ip, &datagram), datagram);
    let received = net.fill_sink(&ip, BULK);
    let sent = drain(&net, &ip, BULK);
    println!("guest receives {received} Mbit/s, sends {sent} Mbit/s");
    net.quit(HOST, vm);
    assert!(eventually(|| !is_running(passt)));
});

guest_test!(guest_connects_to_the_outside, || {
    let net = Net::routed(HOST);
    let (far, [near, _]) = (PEER[0], addresses(HOST));
    let listener = net
        .far
        .enter(|| TcpListener::bind((far, 0)).expect("a port is free"));
    let port = listener.local_addr().expect("it is bound").port();
    let reader = thread::spawn(move || {
        let (mut stream, from) = listener.accept().expect("the guest connects");
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("the guest sends");
        assert!(bytes == stream_bytes(0, BULK), "{} bytes", bytes.len());
        let answer = format!("OK {BULK}\n");
        stream
            .write_all(answer.as_bytes())
            .expect("the guest waits");
        from
    });
    let options = format!("mode=tcp-source peer={far} port={port} bytes={BULK}");
    succeed(Vm::spawn(command(&net, "", &options)));
    let from = reader.join().expect("the reader ends");
    // The far side sees the host.
    assert_eq!(from.ip().to_string(), near);
});

guest_test!(
    passt_that_dies_takes_the_link_down_and_the_guest_lives_on,
    || {
        let net = Net::routed(HOST);
        let directory = tempfile::tempdir().expect("a directory");
        let (events, socket) = (
            directory.path().join("events"),
            directory.path().join("qmp"),
        );
        // Of the macvtap an address of its own.
        let [ip, _] = addresses(HOST);
        let options = format!("mode=link peer={} ip={ip}/24", PEER[0]);
        let mut command = command(&net, &services(), &options);
        command
            .args(["--macvtap", "lower", "--events"])
            .arg(&events)
            .arg("--qmp")
            .arg(&socket);
        let mut vm = Vm::spawn(command);
        vm.wait_for("LINK 0 status=1");
        vm.wait_for("READY link\n");
        signal(passt_of(&vm), Signal::KILL);
        vm.wait_for("LINK 0 status=0");
        vm.wait_for_log("net0 on a user network: passt has hung up");
        let link = |line: &str| line.contains(r#""event":"link","nic":"net0","up":false"#);
        let written = || fs::read_to_string(&events).is_ok_and(|events| events.lines().any(link));
        assert!(eventually(written), "{}", vm.transcript());
        // An operator cannot bring it up again.
        set_link(&socket, false);
        set_link(&socket, true);
        // By the other NIC.
        net.host.ip("address flush dev lower");
        let console = net.quit(HOST, vm);
        let last = console.lines().rfind(|line| line.starts_with("LINK 0 "));
        assert!(
            last.is_some_and(|line| line.contains("status=0")),
            "{console}"
        );
    }
);

guest_test!(
    streams_stay_whole_while_the_guest_and_passt_are_stopped_again_and_again,
    || {
        let net = Net::routed(HOST);
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("qmp");
        let mut command = command(&net, &services(), &format!("mode=echo bytes={BULK}"));
        command.arg("--qmp").arg(&socket);
        let mut vm = Vm::spawn(command);
        vm.wait_for("READY echo\n");
        let passt = passt_of(&vm);
        let disturb = || {
            qmp(&socket, &["stop"]);
            qmp(&socket, &["cont"]);
            signal(passt, Signal::STOP);
            thread::yield_now();
            signal(passt, Signal::CONT);
        };
        streams_disturbed(&net, || stats_of(&socket), disturb);
        net.quit(HOST, vm);
    }
);

guest_test!(operator_takes_the_link_down_and_up, || {
    let net = Net::routed(HOST);
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("qmp");
    let options = format!("mode=link peer={}", PEER[0]);
    let mut command = command(&net, &services(), &options);
    command.arg("--qmp").arg(&socket);
    let mut vm = Vm::spawn(command);
    vm.wait_for("READY link\n");
    for (up, status) in [(false, 0), (true, 1)] {
        set_link(&socket, up);
        vm.wait_for(&format!("LINK 0 status={status}"));
    }
    net.quit(HOST, vm);
});

guest_test!(
    streams_stay_whole_while_the_guest_is_saved_and_restored,
    || {
        let net = Net::routed(HOST);
        let (guest, _directory) = serve_here(&net);
        let disturb = || {
            guest.pause().expect("it runs");
            let state = guest.save().expect("it is paused");
            guest.restore(state).expect("it is its own");
            guest.resume().expect("it is paused");
        };
        streams_disturbed(&net, || guest.stats().expect("it runs"), disturb);
        quit_here(&net, guest);
    }
);

guest_test!(guest_that_restarts_in_a_stream_is_reached_again, || {
    let net = Net::routed(HOST);
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("qmp");
    let mut command = command(&net, &services(), &format!("mode=echo bytes={BULK}"));
    command.args(["--reboot", "restart", "--qmp"]).arg(&socket);
    let mut vm = Vm::spawn(command);
    vm.wait_for("READY echo\n");
    let [ip, _] = addresses(HOST);
    net.connect(&ip, SOURCE, |mut stream| {
        stream.write_all(b"\n").expect("the connection is up");
        stream.read_exact(&mut [0]).expect("the guest sends");
        qmp(&socket, &["system_reset"]);
    });
    vm.wait_for("READY echo\n");
    net.fill_sink(&ip, BULK);
    drain(&net, &ip, BULK);
    net.quit(HOST, vm);
});

guest_test!(monitor_that_is_killed_leaves_no_passt, || {
    let net = Net::routed(HOST);
    let mut vm = serve(&net, &services(), "");
    let passt = passt_of(&vm);
    // One that does not look whether its socket is closed.
    signal(passt, Signal::STOP);
    vm.signal(Signal::KILL);
    vm.wait_exit();
    assert!(eventually(|| !is_running(passt)));
});

guest_test!(
    nics_stand_on_the_bus_in_the_order_of_the_command_line,
    || {
        let net = Net::routed(HOST);
        let (user, macvtap) = ("mac=02:00:00:00:77:01", "lower,mac=02:00:00:00:77:02");
        let user_first = ["--user-net", user, "--macvtap", macvtap];
        let macvtap_first = ["--macvtap", macvtap, "--user-net", user];
        for (args, macs) in [(user_first, ["01", "02"]), (macvtap_first, ["02", "01"])] {
            let mut command = net.command();
            command.args(args).args(["--cmdline", "guest.mode=info"]);
            let console = succeed(Vm::spawn(command));
            for (n, mac) in macs.iter().enumerate() {
                let nic = format!("NIC {n} ");
                let line = console
                    .lines()
                    .find(|line| line.starts_with(&nic))
                    .expect("a NIC");
                assert!(
                    line.contains(&format!("mac=02:00:00:00:77:{mac}")),
                    "{console}"
                );
                let mtu = if *mac == "01" {
                    "mtu=65520"
                } else {
                    "mtu=1500"
                };
                assert!(line.contains(mtu), "{console}");
            }
        }
    }
);

guest_test!(
    host_without_a_route_reaches_its_guest_by_forwarded_ports,
    || {
        let (host, far) = (Netns::new(), Netns::new());
        let net = Net {
            host,
            far,
            transport: None,
        };
        let mut command = net.command();
        command.args(["--user-net", &services()]);
        command.args(["--cmdline", "guest.mode=echo guest.ip=10.0.2.15/24"]);
        let mut vm = Vm::spawn(command);
        vm.wait_for("READY echo\n");
        vm.wait_for_log("the host has no default route");
        // From the host itself.
        let local = Net {
            far: net.host,
            host: net.far,
            transport: None,
        };
        local.fill_sink("127.0.0.1", BULK);
        drain(&local, "127.0.0.1", 1 << 20);
        drop(vm);
    }
);

guest_test!(frames_are_recorded_and_limited_as_on_a_macvtap, || {
    let net = Net::routed(HOST);
    let directory = tempfile::tempdir().expect("a directory");
    let pcap = directory.path().join("pcap");
    let options = format!("{},tx-rate=8Mbit,pcap={}", services(), pcap.display());
    let mut vm = Vm::spawn(command(&net, &options, "mode=echo bytes=1000000"));
    vm.wait_for("READY echo\n");
    let [ip, _] = addresses(HOST);
    assert!(drain(&net, &ip, 1_000_000) <= 10);
    assert_eq!(net.datagram(&ip, b"quit"), b"quit");
    assert!(vm.wait_exit().success(), "{}", vm.transcript());
    assert!(vm.log().contains("times rate-limited"), "{}", vm.log());
    assert!(fs::metadata(&pcap).expect("it is there").len() > 1_000_000);
});

guest_test!(guest_does_not_reach_the_hosts_loopback, || {
    let net = Net::routed(HOST);
    let directory = tempfile::tempdir().expect("a directory");
    let qmp = directory.path().join("qmp");
    let loopback = net.host.enter(|| UdpSocket::bind("127.0.0.1:9"));
    let loopback = loopback.expect("it is free");
    loopback.set_nonblocking(true).expect("a socket can");
    // It sends a datagram there every few milliseconds.
    let mut command = command(&net, &services(), "mode=link peer=127.0.0.1");
    command.arg("--qmp").arg(&qmp);
    let mut vm = Vm::spawn(command);
    vm.wait_for("READY link\n");
    let refused = || stats_of(&qmp).nics[0].queues[0].tx.refused;
    let reached = || loopback.recv(&mut [0; 100]).is_ok();
    assert!(
        eventually(|| reached() || refused() > 0),
        "{}",
        vm.transcript()
    );
    // What comes back left after what was sent before.
    let [ip, _] = addresses(HOST);
    assert_eq!(net.datagram(&ip, b"after"), b"after");
    assert!(!reached());
    assert_eq!(net.datagram(&ip, b"quit"), b"quit");
    assert!(vm.wait_exit().success(), "{}", vm.transcript());
});

guest_test!(port_of_the_host_is_not_taken_for_the_guests, || {
    let net = Net::routed(HOST);
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("qmp");
    let [ip, _] = addresses(HOST);
    let _host = net
        .host
        .enter(|| TcpListener::bind(format!("{ip}:22")).expect("it is free"));
    let name = format!("user-net-{}", std::process::id());
    let mut command = command(&net, &services(), "mode=echo");
    command.args(["--name", &name, "--qmp"]).arg(&socket);
    let mut vm = Vm::spawn(command);
    vm.wait_for("READY echo\n");
    let mut wait = net.host.command(vm::binary());
    wait.args(["wait", &name, "--for", "port=22", "--timeout", "60"]);
    let output = wait.output().expect("it starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && text.contains("on a user network"),
        "{output:?}"
    );
    net.quit(HOST, vm);
});

guest_test!(port_that_is_taken_is_named, || {
    let net = Net::routed(HOST);
    let [ip, _] = addresses(HOST);
    let (_tcp, _udp) = net.host.enter(|| {
        let tcp = TcpListener::bind("0.0.0.0:2222").expect("it is free");
        (
            tcp,
            UdpSocket::bind(format!("{ip}:5353")).expect("it is free"),
        )
    });
    for (forward, text) in [
        (
            "tcp::2222-:22",
            "cannot forward tcp port 2222 to the guest: Address already in use",
        ),
        (
            "udp::5353-:53",
            "cannot forward udp port 5353 to the guest: Address already in use",
        ),
        ("tcp:127.0.0.1:2222-:22", "tcp port 2222 of 127.0.0.1"),
        (
            "tcp:192.0.2.9:80-:80",
            "tcp port 80 of 192.0.2.9 to the guest: Cannot assign",
        ),
    ] {
        let user_net = format!("hostfwd=tcp::81-:80,hostfwd={forward}");
        let log = refused(command(&net, &user_net, "mode=info"));
        assert!(log.contains(text), "{log}");
    }
    // Those of one guest's networks are each other's too.
    let mut command = command(&net, "hostfwd=tcp::80-:80", "mode=info");
    command.args(["--user-net", "net=10.0.3.0/24,hostfwd=tcp::80-:8080"]);
    assert!(refused(command).contains("cannot forward tcp port 80 to the guest"));
});

guest_test!(two_user_networks_of_one_guest_have_addresses_each, || {
    let net = Net::routed(HOST);
    let mut one = command(&net, "", "mode=info");
    one.args(["--user-net", "hostfwd=tcp::80-:80"]);
    let log = refused(one);
    assert!(
        log.contains("two user networks of the guest have the addresses of 10.0.2.0/24"),
        "{log}"
    );
    assert!(log.contains("net=10.0.3.0/24"), "{log}");
    let mut two = command(&net, "", "mode=info");
    two.args(["--user-net", "net=10.0.3.0/24"]);
    let console = succeed(Vm::spawn(two));
    assert!(console.contains("NIC 1 "), "{console}");
});

guest_test!(passt_that_is_missing_too_old_or_fails_is_named, || {
    let net = Net::routed(HOST);
    let directory = tempfile::tempdir().expect("a directory");
    let with_path = |path: &str| {
        let mut command = net.host.command("/usr/bin/env");
        command.arg(format!("PATH={path}")).arg(vm::binary());
        command
            .arg("--kernel")
            .arg(elf())
            .arg("--user-net")
            .stdin(Stdio::null());
        refused(command)
    };
    let log = with_path("/nonexistent");
    assert!(log.contains("there is no program passt"), "{log}");
    assert!(log.contains("install the package passt"), "{log}");
    let old = "echo \"passt: unrecognized option '--fd'\" >&2; echo 'Usage: passt' >&2; exit 1";
    let log = with_path(&another_passt(directory.path(), old));
    assert!(
        log.contains("too old for --user-net: passt: unrecognized option '--fd'"),
        "{log}"
    );
    let log = with_path(&another_passt(
        directory.path(),
        "echo 'no luck' >&2; exit 3",
    ));
    assert!(
        log.contains("has ended at its start (exit status: 3): no luck"),
        "{log}"
    );
});
