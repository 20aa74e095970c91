//! minivmm on this machine's `/dev/kvm` with the freestanding test guest (`guest/`), over a real
//! macvtap on a veth pair in namespaces that each test makes.

mod harness;
#[path = "bench/traffic.rs"]
mod traffic;

use std::os::unix::process::CommandExt;

use harness::capture;
use harness::guest::{ECHO, Net, PEER, Transport, addresses, power_off, stream_bytes, succeed};
use harness::netns::Netns;
use harness::process::tap_nodes;
use harness::vm::Vm;
use harness::{AT_ONCE, PATIENCE, eventually, guest_test, transports_test};
use rustix::process::{Resource, Rlimit, Signal, setrlimit};
use traffic::{FarEnd, Load, Pinger};

/// How much the bulk streams carry.
const BULK: usize = 50 << 20;

/// The value of `key=` in the first line of the console that begins with `line`.
fn value<'a>(console: &'a str, line: &str, key: &str) -> &'a str {
    let line = console
        .lines()
        .find(|candidate| candidate.starts_with(line))
        .unwrap_or_else(|| panic!("{console}"));
    let found = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    found.unwrap_or_else(|| panic!("no {key} in {line:?}"))
}

guest_test!(info_shows_the_macvtaps_mac_and_the_links_mtu, || {
    let net = Net::new();
    net.host.ip("link set lower mtu 1400");
    let vm = net.start_on("lower,mac=02:00:00:00:77:01", 2, "mode=info");
    let console = succeed(vm);
    assert_eq!(value(&console, "NIC 0", "mac"), "02:00:00:00:77:01");
    assert_eq!(value(&console, "NIC 0", "mtu"), "1400");
    assert_eq!(value(&console, "NIC 0", "status"), "1");
    assert_eq!(value(&console, "OK info", "nics"), "1");
});

guest_test!(info_without_a_mac_shows_the_one_that_the_log_names, || {
    let net = Net::new();
    let mut vm = net.start(2, "mode=info");
    assert!(vm.wait_exit().success(), "{}", vm.transcript());
    let (console, log) = (vm.console(), vm.log());
    let mac = value(&console, "NIC 0", "mac");
    assert!(log.contains(mac), "{mac} is not in the log:\n{log}");
});

transports_test!(two_nics_are_both_there_and_work, |net| {
    let other = Netns::new();
    net.host.veth("lower2", &other, "wire2");
    other.address("wire2", "10.77.0.9/24");
    let start = |options: &str| {
        let mut command = net.command();
        command.args(["--macvtap", "lower", "--macvtap", "lower2"]);
        command.args(["--cmdline", &format!("guest.ip=10.77.0.2/24 {options}")]);
        Vm::spawn(command)
    };
    let console = succeed(start("guest.mode=info"));
    assert_eq!(value(&console, "OK info", "nics"), "2");
    assert_ne!(
        value(&console, "NIC 0", "mac"),
        value(&console, "NIC 1", "mac")
    );
    succeed(start("guest.mode=ping guest.index=0 guest.peer=10.77.0.1"));
    succeed(start("guest.mode=ping guest.index=1 guest.peer=10.77.0.9"));
});

/// Everything that a guest serves, with either driver in it.
fn serves_everything(net: Net, driver: &str) {
    let vm = net.serve(2, &format!("nic={driver} bytes={BULK}"));
    for ip in addresses(2) {
        assert!(
            net.far.pings(&ip, 3),
            "no ping to {ip}\n{}",
            vm.transcript()
        );
        let datagram = stream_bytes(0, 1400);
        assert_eq!(net.datagram(&ip, &datagram), datagram);
        echoes_a_stream(&net, &ip);
        let received = net.fill_sink(&ip, BULK);
        let sent = net.drain_source(&ip, BULK);
        println!("nic={driver} {ip}: guest receives {received} Mbit/s, sends {sent} Mbit/s");
    }
    let console = net.quit(2, vm);
    assert_eq!(value(&console, "OK echo", "connections"), "6");
}

fn echoes_a_stream(net: &Net, ip: &str) {
    use std::io::{Read, Write};
    net.connect(ip, ECHO, |stream| {
        let data = stream_bytes(0, 1 << 20);
        let (mut reader, mut writer) = (&stream, &stream);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                writer.write_all(&data).expect("the guest takes the stream");
                stream
                    .shutdown(std::net::Shutdown::Write)
                    .expect("the connection is up");
            });
            let mut echo = Vec::new();
            reader.read_to_end(&mut echo).expect("the guest answers");
            assert!(
                echo == data,
                "{} of {} bytes came back, or wrong ones",
                echo.len(),
                data.len()
            );
        });
    });
}

transports_test!(guest_with_virtio_drivers_serves_ping_udp_and_tcp, |net| {
    serves_everything(net, "drivers");
});

transports_test!(guest_with_offloads_serves_ping_udp_and_tcp, |net| {
    serves_everything(net, "own");
});

guest_test!(guest_pings_the_far_side, || {
    let net = Net::new();
    for (driver, peer) in [
        ("drivers", PEER[0]),
        ("drivers", PEER[1]),
        ("own", PEER[0]),
        ("own", PEER[1]),
    ] {
        let console =
            succeed(net.start(2, &format!("mode=ping count=20 nic={driver} peer={peer}")));
        println!(
            "nic={driver} {peer}: {} us at least",
            value(&console, "OK ping", "min_us")
        );
    }
});

transports_test!(received_frames_interrupt_the_guest, |net| {
    succeed(net.start(2, &format!("mode=interrupts count=20 peer={}", PEER[0])));
});

/// A number in the line by which a guest reports.
fn number(console: &str, line: &str, key: &str) -> u64 {
    let text = value(console, line, key);
    text.parse().unwrap_or_else(|e| panic!("{key}={text}: {e}"))
}

/// Where the floods of the benchmark go to, which knows the guest's address.
const FLOODED: ([u8; 6], &str) = (
    [2, 0, 0, 0, 0x77, 3],
    "lower,mac=02:00:00:00:77:03,queues=2",
);

guest_test!(hello_says_so_and_no_more, || {
    let console = Net::new().run(2, "mode=hello");
    assert!(console.starts_with("OK hello"), "{console}");
});

/// The frames that have left on the lower link, those included that the far side has no room for.
fn sent(net: &Net) -> u64 {
    let counters = net.host.counters("lower");
    counters[9] + counters[11]
}

transports_test!(guest_floods_its_wire_and_counts_the_frames, |net| {
    for (size, pairs) in [(60, 1), (1514, 2), (65_000, 1), (65_000, 2)] {
        let before = sent(&net);
        let options = format!("mode=send size={size} pairs={pairs} ms=200");
        let console = succeed(net.start_on(FLOODED.1, 2, &options));
        let counted = |key| number(&console, "OK send", key);
        assert_eq!(counted("unsent"), 0, "{console}");
        assert_eq!(counted("bytes"), counted("frames") * size, "{console}");
        let sent = sent(&net) - before;
        assert!(sent > 0 && sent >= counted("frames"), "{sent}\n{console}");
    }
});

transports_test!(flooded_guest_counts_frames_and_their_bytes, |net| {
    net.silence();
    for (size, pairs) in [(60, 1), (1514, 2), (65_000, 1)] {
        let load = Load {
            size,
            rate: Some(10_000),
            burst: 1,
            waits: false,
        };
        let options = format!("mode=receive pairs={pairs} ms=200");
        let mut vm = net.start_on(FLOODED.1, 2, &options);
        vm.wait_for("READY receive\n");
        let _far = FarEnd::start(&net.far, FLOODED.0, Some(load), PATIENCE);
        let console = succeed(vm);
        assert!(console.contains("START receive"), "{console}");
        let counted = |key| number(&console, "OK receive", key);
        let bytes = counted("frames") * size as u64;
        assert_eq!(counted("bytes"), bytes, "{console}");
    }
});

transports_test!(pings_of_a_guest_come_back_from_the_far_end, |net| {
    let options = "mode=ping-pong size=60 count=20 gap=0 ms=60000";
    let mut vm = net.start_on(FLOODED.1, 2, options);
    vm.wait_for("READY ping-pong\n");
    let _far = FarEnd::start(&net.far, FLOODED.0, None, PATIENCE);
    let console = succeed(vm);
    let counted = |key| number(&console, "OK ping-pong", key);
    assert!(counted("pings") > 0, "{console}");
    let times = ["p50_ns", "p99_ns", "p999_ns", "max_ns"].map(counted);
    assert!(times[0] > 0 && times.is_sorted(), "{console}");
});

guest_test!(sleeping_guest_sends_pings_back, || {
    let net = Net::with(Transport::Pci);
    let options = "mode=reflect interrupts=on size=60";
    let mut vm = net.start_on(FLOODED.1, 2, options);
    vm.wait_for("READY reflect\n");
    let pinger = Pinger::new(&net.far);
    for _ in 0..3 {
        let comes_back = || pinger.ping(FLOODED.0, AT_ONCE).is_some();
        assert!(eventually(comes_back), "\n{}", vm.transcript());
    }
});

guest_test!(lack_of_descriptors_fails_the_start_alone, || {
    let net = Net::new();
    let line = format!(
        "guest.mode=ping guest.count=1 guest.peer={} guest.ip=10.77.0.2/24",
        PEER[0]
    );
    let start = |most: u64| {
        let mut command = net.command();
        command.args([
            "--macvtap",
            "lower,backend=user,queues=4",
            "--cmdline",
            &line,
        ]);
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        // SAFETY: it makes one system call.
        unsafe { command.pre_exec(move || Ok(setrlimit(Resource::Nofile, limit)?)) };
        Vm::spawn(command)
    };
    let mut refused = 0;
    for most in (40..).step_by(2) {
        let mut vm = start(most);
        let status = vm.wait_exit();
        if vm.console().is_empty() {
            let log = vm.log();
            assert!(
                !status.success() && log.contains("Too many open files"),
                "{most}: {log}"
            );
            refused += 1;
            continue;
        }
        assert!(status.success(), "{most}: {}", vm.transcript());
        break;
    }
    assert!(refused > 5, "{refused}");
});

guest_test!(driver_without_interrupts_is_warned_of_once, || {
    let net = Net::with(Transport::Pci);
    for (mode, times) in [("ping", 1), ("info", 0)] {
        let mut vm = net.start(2, &format!("mode={mode} count=3 peer={}", PEER[0]));
        assert_eq!(vm.wait_exit().code(), Some(0));
        let warnings = vm.log().matches("with MSI-X off").count();
        assert_eq!(warnings, times, "{mode}\n{}", vm.transcript());
    }
});

guest_test!(tso_frames_arrive_as_segments_with_right_checksums, || {
    let net = Net::new();
    capture::disable_offloads(&net.host, "lower");
    let bytes = 2 << 20;
    let vm = net.serve(2, &format!("nic=own bytes={bytes}"));
    for ip in addresses(2) {
        let frames = capture::during(&net.far, "wire", || net.drain_source(&ip, bytes));
        let segments: Vec<_> = frames
            .iter()
            .filter_map(|frame| capture::Segment::from_source(frame))
            .collect();
        let carried: usize = segments.iter().map(|segment| segment.payload).sum();
        assert!(
            carried >= bytes,
            "{ip}: only {carried} bytes in {} segments were seen",
            segments.len()
        );
        for segment in &segments {
            assert!(
                segment.checksum_is_right,
                "{ip}: a segment of {} bytes has a wrong checksum",
                segment.payload
            );
            assert!(
                segment.frame <= 1514,
                "{ip}: a frame of {} bytes",
                segment.frame
            );
        }
    }
    net.quit(2, vm);
});

guest_test!(two_guests_on_one_lower_talk_in_bridge_mode, || {
    let net = Net::new();
    let server = net.serve(2, "nic=own");
    for peer in addresses(2) {
        succeed(net.start(3, &format!("mode=ping nic=drivers peer={peer}")));
    }
    let [peer, _] = addresses(2);
    let console = succeed(net.start(
        3,
        &format!("mode=tcp-source nic=own bytes={BULK} peer={peer}"),
    ));
    println!(
        "guest to guest: {BULK} bytes in {} us",
        value(&console, "OK tcp-source", "us")
    );
    succeed(net.start(3, &format!("mode=tcp-sink nic=own peer={peer}")));
    net.quit(2, server);
});

guest_test!(two_guests_on_one_lower_cannot_talk_in_private_mode, || {
    let net = Net::new();
    let mut server = net.start_on("lower,mode=private", 2, "mode=echo");
    server.wait_for("READY echo\n");
    let [peer, _] = addresses(2);
    let console = power_off(net.start_on(
        "lower,mode=private",
        3,
        &format!("mode=ping count=3 peer={peer}"),
    ));
    assert_eq!(value(&console, "FAIL ping", "received"), "0");
    // The far side still reaches the server: it is there, only not for its sibling.
    assert!(net.far.pings(&peer, 3));
    net.quit(2, server);
});

guest_test!(hosts_own_address_on_the_lower_is_out_of_reach, || {
    let net = Net::new();
    net.host.address("lower", "10.77.0.8/24");
    let console = net.run(2, "mode=ping count=3 peer=10.77.0.8");
    assert_eq!(value(&console, "FAIL ping", "received"), "0");
});

guest_test!(reset_ends_with_0_and_the_log_says_so, || {
    let net = Net::new();
    let mut vm = net.start(2, "mode=reset");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
    assert!(vm.log().contains("reboot"), "{}", vm.transcript());
});

guest_test!(triple_fault_ends_with_3_and_names_the_instruction, || {
    let net = Net::new();
    let mut vm = net.start(2, "mode=triple-fault");
    assert_eq!(vm.wait_exit().code(), Some(3), "{}", vm.transcript());
    let log = vm.log().to_lowercase();
    assert!(log.contains("triple fault") && log.contains("rip"), "{log}");
    // The guest faults on purpose at a ud2. On AMD hardware KVM forgets where that was.
    assert!(
        log.contains("0f 0b") || log.contains("its rip is lost"),
        "no instruction bytes in the log:\n{log}"
    );
});

guest_test!(exception_in_the_guest_is_reported_by_the_guest, || {
    let console = Net::new().run(2, "mode=exception");
    assert_eq!(value(&console, "FAIL exception", "vector"), "6");
    assert!(console.ends_with("END failures=1\n"), "{console}");
});

guest_test!(sigterm_twice_ends_a_deaf_guest_at_once_with_143, || {
    let net = Net::new();
    let mut vm = net.start(2, "mode=hlt");
    vm.wait_for("OK hlt");
    vm.signal(Signal::TERM);
    vm.wait_for_log("power button");
    vm.signal(Signal::TERM);
    assert_eq!(
        vm.wait_exit_within(AT_ONCE).code(),
        Some(128 + 15),
        "{}",
        vm.transcript()
    );
});

guest_test!(sigkill_leaves_no_link_no_node_and_the_mac_free, || {
    let net = Net::new();
    for _ in 0..3 {
        // Were the last round's macvtap still there, this one with the same MAC could not come up.
        let mut vm = net.start_on("lower,mac=02:00:00:00:77:02", 2, "mode=hlt");
        vm.wait_for("OK hlt");
        let nodes = tap_nodes(vm.pid());
        assert!(!nodes.is_empty(), "minivmm has no tap open");
        vm.signal(Signal::KILL);
        vm.wait_exit();
        // The kernel clears away in the background.
        let is_clean = || net.host.links() == ["lower"] && nodes.iter().all(|node| !node.exists());
        assert!(eventually(is_clean), "{nodes:?}, {:?}", net.host.links());
    }
});
