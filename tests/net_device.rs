//! The NIC as stock drivers see it, on each transport and with each backend: traffic, offloads,
//! commands, resets.

mod harness;
mod lab;

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use harness::assets::generic;
use harness::capture;
use harness::iperf;
use harness::lab_test;
use harness::linux::{boot, generic_initrd};
use harness::netns::Netns;
use harness::site::{Site, address, pings, send_from_many_ports};
use harness::vm::{self, Vm};

const SECOND: Duration = Duration::from_secs(1);
/// The host at the far end of the wire.
const FAR: [&str; 2] = ["192.168.77.4", "fd77::4"];
const GUEST: [&str; 2] = ["192.168.77.11", "fd77::11"];

/// A wire whose checksums are real: what arrives at its far end has been summed by the guest or,
/// where that left it open, by the host's kernel as the guest's header says.
fn site() -> Site {
    let site = Site::new();
    capture::disable_offloads(&site.host, "wire");
    capture::disable_offloads(&site.far, "end");
    site.far.address("end", "192.168.77.4/24");
    site.far.address("end", "fd77::4/64");
    site
}

// Each pair of transport, backend and kernel has its turn.

lab_test!(user_threads_on_pci_carry_everything, || {
    carries_everything("pci", "user");
});

lab_test!(vhost_net_on_mmio_carries_everything, || {
    carries_everything("mmio", "vhost");
});

lab_test!(
    vhost_net_on_pci_with_the_generic_kernel_carries_everything,
    || generic_carries_everything("pci", "vhost")
);

lab_test!(
    user_threads_on_mmio_with_the_generic_kernel_carry_everything,
    || generic_carries_everything("mmio", "user")
);

/// With Debian's kernel for all machines, whose configuration is not the cloud's.
fn generic_carries_everything(transport: &str, backend: &str) {
    let (kernel, initrd) = (generic().bzimage(), generic_initrd());
    let [kernel, initrd] =
        [&kernel, &initrd].map(|path| path.to_str().expect("the cache's path is UTF-8"));
    let site = site();
    let nic = format!("wire,backend={backend}");
    let args = [
        "--transport",
        transport,
        "--cpus",
        "2",
        "--kernel",
        kernel,
        "--initrd",
        initrd,
        "--macvtap",
        &nic,
    ];
    let mut vm = boot(Some(&site.host), &args);
    address(&mut vm, "eth0", 11);
    assert!(!vm.run("uname -r").contains("cloud"));
    carries(&site, vm, backend);
}

/// Boots a guest with two CPUs and one NIC, and gives it its addresses.
fn start(site: &Site, transport: &str, nic: &str) -> Vm {
    let args = ["--transport", transport, "--cpus", "2", "--macvtap", nic];
    let mut vm = boot(Some(&site.host), &args);
    address(&mut vm, "eth0", 11);
    vm
}

fn carries_everything(transport: &str, backend: &str) {
    let site = site();
    let vm = start(&site, transport, &format!("wire,backend={backend}"));
    carries(&site, vm, backend);
}

fn carries(site: &Site, mut vm: Vm, backend: &str) {
    let by_kernel = vm.log().contains("vhost-net moves the frames");
    assert_eq!(by_kernel, backend == "vhost", "{}", vm.log());
    let reach_each_other = |vm: &mut Vm| {
        for (guest, far) in GUEST.into_iter().zip(FAR) {
            assert!(
                pings(vm, far),
                "the guest reaches {far}\n{}",
                vm.transcript()
            );
            assert!(site.far.pings(guest, 3), "the far host reaches {guest}");
        }
    };
    reach_each_other(&mut vm);
    let list = site
        .host
        .command(vm::binary())
        .args(["net", "list"])
        .output();
    let list = String::from_utf8_lossy(&list.expect("minivmm starts").stdout).into_owned();
    for address in GUEST {
        assert!(
            list.contains(address),
            "{address} is known from what the guest sends\n{list}"
        );
    }
    streams_with_every_offload(site, &mut vm);
    driver_comes_back(site, &mut vm);
    reach_each_other(&mut vm);
    let blames =
        vm.run("dmesg | grep -E 'WARNING:|BUG:|virtio_net virtio0: |NETDEV WATCHDOG' || true");
    assert_eq!(blames, "");
    vm.start_command("poweroff -f");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
}

/// TCP both ways at once, by IPv4 and IPv6, while the driver's offloads change, and UDP both ways.
fn streams_with_every_offload(site: &Site, vm: &mut Vm) {
    let _server = iperf::serve(&site.far);
    for to in FAR {
        let toggles = [
            "tx",
            "rx",
            "tso",
            "gso",
            "gro",
            "rx-gro-hw",
            "tx-tcp6-segmentation",
        ];
        let toggles = toggles.map(|name| {
            // Some are fixed where the host's kernel has no such offload.
            format!("ethtool -K eth0 {name} off; usleep 300000; ethtool -K eth0 {name} on; usleep 100000")
        });
        let stream = format!(
            "iperf3 -c {to} -t 4 --bidir >/tmp/out 2>&1 & {}; wait $!; status=$?; \
                              tail -n 12 /tmp/out; exit $status",
            toggles.join("; ")
        );
        let output = vm.try_run(&stream);
        assert_eq!(output.status, 0, "{}\n{}", output.text, vm.transcript());
        for direction in ["TX-C", "RX-C"] {
            let line = output
                .text
                .lines()
                .find(|line| line.contains(direction) && line.contains("receiver"));
            let line = line.unwrap_or_else(|| panic!("{}", output.text));
            println!("{to} {}", line.trim());
            assert!(!line.contains(" 0.00 Bytes"), "{}", output.text);
        }
    }
    for to in FAR {
        let both = format!("iperf3 -u -b 20M -c {to} -t 1 && iperf3 -u -b 20M -c {to} -t 1 -R");
        let output = vm.try_run(&both);
        assert_eq!(output.status, 0, "{}\n{}", output.text, vm.transcript());
    }
    let theirs = site
        .far
        .exec(&["cat", "/proc/net/snmp", "/proc/net/snmp6"])
        .stdout;
    no_bad_checksums(&String::from_utf8_lossy(&theirs));
    no_bad_checksums(&vm.run("grep -h InCsumErrors -A1 /proc/net/snmp /proc/net/snmp6"));
}

/// Fails when a kernel has counted wrong checksums, of TCP, UDP or ICMP.
fn no_bad_checksums(statistics: &str) {
    let mut lines = statistics.lines().peekable();
    let mut seen = 0;
    while let Some(names) = lines.next() {
        if names.starts_with("Udp6InCsumErrors") || names.starts_with("Icmp6InCsumErrors") {
            assert!(names.ends_with("\t0") || names.ends_with(" 0"), "{names}");
            seen += 1;
        } else if names.contains("InCsumErrors") {
            let values = lines.next().unwrap_or_default();
            for (name, value) in names.split_whitespace().zip(values.split_whitespace()) {
                assert!(name != "InCsumErrors" || value == "0", "{names}\n{values}");
            }
            seen += 1;
        }
    }
    assert!(seen >= 5, "{statistics}");
}

/// The driver goes and comes back 20 times while frames arrive.
fn driver_comes_back(site: &Site, vm: &mut Vm) {
    let mac = vm.run("cat /sys/class/net/eth0/address");
    let [v4, _] = GUEST;
    site.far
        .ip(&format!("neigh replace {v4} lladdr {} dev end", mac.trim()));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| site.far.enter(|| flood(v4, &done)));
        let reload = "for i in $(seq 20); do rmmod virtio_net && insmod /modules/virtio_net.ko && \
                      ip link set eth0 up || exit 1; done";
        let output = vm.try_run(reload);
        done.store(true, Ordering::Relaxed);
        assert_eq!(output.status, 0, "{}\n{}", output.text, vm.transcript());
    });
    site.far.ip("neigh flush dev end");
    address(vm, "eth0", 11);
}

/// Sends datagrams, some hundreds a second and for at most 90 s.
fn flood(to: &str, done: &AtomicBool) {
    let socket = UdpSocket::bind("192.168.77.4:0").expect("an address on the wire");
    let start = Instant::now();
    while !done.load(Ordering::Relaxed) && start.elapsed() < 90 * SECOND {
        // Refusals come back as errors of the next call.
        let _ = socket.send_to(&[0; 600], (to, 9));
        thread::sleep(Duration::from_millis(2));
    }
}

lab_test!(jumbo_frames_pass_whole, || {
    for backend in ["user", "vhost"] {
        let site = site();
        for (netns, link) in [(&site.host, "wire"), (&site.far, "end")] {
            netns.ip(&format!("link set {link} mtu 9000"));
        }
        let mut vm = start(&site, "pci", &format!("wire,backend={backend}"));
        assert_eq!(vm.run("cat /sys/class/net/eth0/mtu").trim(), "9000");
        for to in FAR {
            // 8,900 bytes of a datagram or an echo do not fit a smaller MTU unfragmented, and
            // nothing is offloaded.
            vm.run(&format!("ping -c3 -W2 -s 8900 {to}"));
        }
        let _server = iperf::serve(&site.far);
        vm.run("ethtool -K eth0 tso off gso off");
        let output = vm.try_run(&format!("iperf3 -c {} -t 1 --bidir", FAR[0]));
        assert_eq!(output.status, 0, "{}", output.text);
        let statistics = site
            .far
            .exec(&["cat", "/proc/net/snmp", "/proc/net/snmp6"])
            .stdout;
        let statistics = String::from_utf8_lossy(&statistics).into_owned();
        no_bad_checksums(&statistics);
        let reassembled = statistics
            .lines()
            .filter(|line| line.starts_with("Ip:"))
            .nth(1);
        // ReasmReqds is the 14th number.
        assert_eq!(
            reassembled.and_then(|line| line.split(' ').nth(14)),
            Some("0"),
            "{statistics}"
        );
    }
});

lab_test!(drivers_commands_take_effect_or_are_refused, || {
    let site = site();
    let args = [
        "--transport",
        "pci",
        "--macvtap",
        "wire",
        "--macvtap",
        "wire,trust-mac=on",
    ];
    let mut vm = boot(Some(&site.host), &args);
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, FAR[0]), "{}", vm.transcript());

    // A MAC address of its own.
    let own = vm.run("cat /sys/class/net/eth0/address");
    let refused = vm.try_run("ip link set eth0 address 02:aa:00:00:00:77");
    assert_ne!(refused.status, 0, "{}", refused.text);
    assert_eq!(vm.run("cat /sys/class/net/eth0/address"), own);
    let first = vm.run("cat /sys/class/net/eth1/address");
    vm.run("ip link set eth0 down && ip link set eth1 address 02:aa:00:00:00:78");
    address(&mut vm, "eth1", 12);
    assert!(
        pings(&mut vm, FAR[0]) && pings(&mut vm, FAR[1]),
        "{}",
        vm.transcript()
    );
    let neighbour = site.far.ip("neigh show 192.168.77.12");
    assert!(neighbour.contains("02:aa:00:00:00:78"), "{neighbour}");
    // The next driver finds the NIC as it was.
    vm.run("rmmod virtio_net && insmod /modules/virtio_net.ko");
    assert_eq!(vm.run("cat /sys/class/net/eth1/address"), first);
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, FAR[0]), "{}", vm.transcript());

    // Groups are delivered as the driver lists them; frames for others the host never has.
    vm.run("ifconfig eth0 allmulti");
    vm.run("ifconfig eth0 promisc");
    // The driver sends such commands from a thread of its own.
    let refused = "dmesg | grep -q 'Failed to enable promisc mode'";
    vm.run(&format!(
        "for i in $(seq 50); do {refused} && exit; usleep 100000; done; exit 1"
    ));
    let log = vm.run("dmesg | grep virtio_net");
    assert!(
        !log.contains("allmulti mode") && !log.contains("MAC filter"),
        "{log}"
    );
    vm.run("ifconfig eth0 -promisc -allmulti");

    // A VLAN over the same wire.
    site.far.ip("link add link end name tagged type vlan id 5");
    site.far.up("tagged");
    site.far.address("tagged", "192.168.79.4/24");
    vm.run("ip link add link eth0 name eth0.5 type vlan id 5 && ip link set eth0.5 up");
    vm.run("ip addr add 192.168.79.11/24 dev eth0.5");
    assert!(pings(&mut vm, "192.168.79.4"), "{}", vm.transcript());
    assert!(vm.run("ethtool -k eth0").contains("rx-vlan-filter: on"));

    announces_itself(&site, &mut vm);
});

lab_test!(promiscuous_passthru_guest_receives_all_frames, || {
    let (host, far) = (Netns::new(), Netns::new());
    host.veth("wire", &far, "end");
    far.address("end", "192.168.77.4/24");
    far.ip("neigh replace 192.168.77.99 lladdr 02:00:00:00:00:99 dev end");
    let args = ["--macvtap", "wire,mode=passthru,backend=user"];
    let mut vm = boot(Some(&host), &args);
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, FAR[0]), "{}", vm.transcript());
    // What arrives of 100 frames for an absent host.
    let received = |vm: &mut Vm| {
        let count = |vm: &mut Vm| -> u32 {
            let count = vm.run("cat /sys/class/net/eth0/statistics/rx_packets");
            count.trim().parse().expect("a number")
        };
        let before = count(vm);
        far.enter(|| {
            let socket = UdpSocket::bind("192.168.77.4:0").expect("an address on the wire");
            for _ in 0..100 {
                socket
                    .send_to(&[0; 100], "192.168.77.99:9")
                    .expect("its MAC address is known");
            }
        });
        // A ping's answer comes after them, in the same queue.
        assert!(pings(vm, FAR[0]), "{}", vm.transcript());
        count(vm) - before
    };
    let before = received(&mut vm);
    vm.run("ifconfig eth0 promisc && sleep 1");
    let promiscuous = received(&mut vm);
    assert!(
        before < 50 && promiscuous >= 100,
        "{before}, then {promiscuous}"
    );
    let log = vm.run("dmesg | grep virtio_net || true");
    assert!(!log.contains("promisc mode"), "{log}");
});

/// When its wire comes back, the guest announces itself.
fn announces_itself(site: &Site, vm: &mut Vm) {
    site.far.down("end");
    vm.run("for i in $(seq 50); do [ $(cat /sys/class/net/eth0/carrier) = 0 ] && exit; usleep 100000; done; exit 1");
    // An ARP request (RFC 826) that asks for the sender's own address.
    let own = [192, 168, 77, 11];
    let is_announcement = |frame: &[u8]| {
        frame.get(12..14) == Some(&[8, 6])
            && frame.get(28..32) == Some(&own)
            && frame.get(38..42) == Some(&own)
    };
    let up = || site.far.up("end");
    assert!(
        capture::sees(&site.far, "end", up, is_announcement),
        "no announcement\n{}",
        vm.transcript()
    );
}

lab_test!(vhost_net_uses_all_queues_of_a_nic, || {
    let site = site();
    let args = [
        "--transport",
        "pci",
        "--cpus",
        "4",
        "--macvtap",
        "wire,queues=4,backend=vhost",
    ];
    let mut vm = boot(Some(&site.host), &args);
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, FAR[0]), "{}", vm.transcript());
    let _server = iperf::serve(&site.far);
    let output = vm.try_run(&format!("iperf3 -c {} -P 8 -t 2 --bidir", FAR[0]));
    assert_eq!(output.status, 0, "{}", output.text);
    send_from_many_ports(&site.far, FAR[0], GUEST[0]);
    // A vector for each queue, and each of them has been used: the sum over the CPUs.
    let counts = vm.run("awk '/virtio0-(in|out)put/ { print $2 + $3 + $4 + $5 }' /proc/interrupts");
    let counts: Vec<u64> = counts
        .lines()
        .map(|line| line.parse().expect("a number"))
        .collect();
    assert_eq!(counts.len(), 8, "{}", vm.run("cat /proc/interrupts"));
    let inputs: Vec<_> = counts.iter().step_by(2).collect();
    assert!(inputs.iter().all(|count| **count > 0), "{counts:?}");
    // Fewer pairs: those that are out of use get nothing, and all streams still arrive.
    vm.run("ethtool -L eth0 combined 1");
    let output = vm.try_run(&format!("iperf3 -c {} -P 8 -t 1 -R", FAR[0]));
    assert_eq!(output.status, 0, "{}", output.text);
    vm.run("ethtool -L eth0 combined 4");
    assert!(pings(&mut vm, FAR[1]), "{}", vm.transcript());
});

lab_test!(dhcp_reply_from_the_same_host_has_a_whole_checksum, || {
    let site = Site::new();
    let mut vm = boot(Some(&site.host), &["--macvtap", "wire,backend=user"]);
    vm.run("ip link set eth0 up");
    let _server = site.serve_dhcp();
    let lease = vm.try_run("udhcpc -n -q -f -t 10 -i eth0 -s /bin/true");
    assert!(
        lease.text.contains("192.168.77.5"),
        "{}\n{}",
        lease.text,
        vm.transcript()
    );
    vm.start_command("poweroff -f");
    vm.wait_exit();
    assert!(
        vm.log().contains("DHCP checksums completed"),
        "{}",
        vm.log()
    );
});
