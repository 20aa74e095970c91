//! minivmm with Debian's stock kernel as the guest: boot, network, ends, signals and console.
//!
//! A boot costs several seconds in the lab, so each test asks its guests for as much as they can
//! show.

mod harness;
mod lab;
#[path = "linux/memory.rs"]
mod memory;
#[path = "linux/run.rs"]
mod run;
#[path = "linux/user_net.rs"]
mod user_net;

use std::fs;
use std::panic::resume_unwind;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use harness::assets::assets;
use harness::eventually;
use harness::iperf;
use harness::lab_test;
use harness::linux::{boot, boot_command, command, small_initrd};
use harness::netns::Netns;
use harness::process::tap_nodes;
use harness::site::{Site, address, pings};
use harness::vm::{self, Vm};
use rustix::process::Signal;
use tempfile::NamedTempFile;

/// Whether the kernel leaves out its self-tests of crypto algorithms.
const NO_SELF_TESTS: &str = "cat /sys/module/cryptomgr/parameters/notests";

const SECOND: Duration = Duration::from_secs(1);

fn number(vm: &mut Vm, command: &str) -> u64 {
    let text = vm.run(command);
    text.trim()
        .parse()
        .unwrap_or_else(|e| panic!("{command}: {text:?}: {e}"))
}

/// What a command prints up to the first blank or hyphen.
fn first_word(vm: &mut Vm, command: &str) -> String {
    let text = vm.run(command);
    let word = text.trim().split([' ', '-']).next();
    word.unwrap_or_default().to_owned()
}

/// Boots two guests at the same time.
fn boot_two(host: &Netns, first: &[&str], second: &[&str]) -> (Vm, Vm) {
    thread::scope(|scope| {
        let first = scope.spawn(|| boot(Some(host), first));
        let second = boot(Some(host), second);
        let first = first.join().unwrap_or_else(|panic| resume_unwind(panic));
        (first, second)
    })
}

lab_test!(guest_talks_to_a_third_host_and_not_to_its_own, || {
    let site = Site::new();
    let mut vm = boot(
        Some(&site.host),
        &["--macvtap", "wire,mac=02:aa:00:00:00:0b"],
    );
    assert_eq!(vm.run("nproc").trim(), "1");
    assert_eq!(
        vm.run("cat /sys/class/net/eth0/address").trim(),
        "02:aa:00:00:00:0b"
    );
    assert_eq!(vm.run("cat /sys/class/net/eth0/mtu").trim(), "1500");
    address(&mut vm, "eth0", 11);

    // The third host, by IPv4 and IPv6 with neighbour discovery, both ways.
    for (guest, peer) in [("192.168.77.11", "192.168.77.3"), ("fd77::11", "fd77::3")] {
        assert!(
            pings(&mut vm, peer),
            "the guest reaches {peer}\n{}",
            vm.transcript()
        );
        assert!(site.peer.pings(guest, 3), "the peer reaches {guest}");
    }
    site.peer.ip("neigh flush dev peer0");
    assert!(
        site.peer.pings("fd77::11", 3),
        "the peer discovers the guest"
    );
    let neighbours = site.peer.ip("neigh show dev peer0");
    assert!(neighbours.contains("02:aa:00:00:00:0b"), "{neighbours}");

    // macvlan never carries frames between a link and its lower.
    assert!(!pings(&mut vm, "192.168.77.1"));
    assert!(!site.host.pings("192.168.77.11", 1));

    acpi_is_clean(&mut vm);
});

lab_test!(stock_kernel_finds_cores_of_one_package, || {
    // A parameter of KVM may keep it from all guests.
    let parameters = ["kvm_amd", "kvm_intel"]
        .map(|module| fs::read_to_string(format!("/sys/module/{module}/parameters/nested")));
    let may_nest = parameters
        .iter()
        .flatten()
        .any(|p| ["1", "Y"].contains(&p.trim()));
    for (nested, guests) in [("off", "0"), ("on", if may_nest { "3" } else { "0" })] {
        let mut vm = boot(None, &["--cpus", "3", "--nested", nested]);
        let mut count = |what: &str| {
            let count = format!("grep -cE '{what}' /proc/cpuinfo; true");
            vm.run(&count).trim().to_owned()
        };
        assert_eq!(count("^cpu cores[[:space:]]*: 3$"), "3");
        assert_eq!(count("^siblings[[:space:]]*: 3$"), "3");
        assert_eq!(count("^physical id[[:space:]]*: 0$"), "3");
        assert_eq!(count("^core id[[:space:]]*: [012]$"), "3");
        assert_eq!(count("^flags.* (vmx|svm)( |$)"), guests);
        vm.start_command("poweroff -f");
        assert_eq!(vm.wait_exit().code(), Some(0));
    }
});

/// Fails on any line of the kernel's log that blames our tables.
fn acpi_is_clean(vm: &mut Vm) {
    let bad = "ACPI Error|ACPI Warning|ACPI Exception|ACPI BIOS|Firmware Bug|Firmware Warn";
    let blames = vm.run(&format!("dmesg | grep -E '{bad}' || true"));
    assert_eq!(blames, "");
}

lab_test!(tcp_runs_both_ways_with_segmentation_offload, || {
    let site = Site::new();
    let mut vm = boot(Some(&site.host), &["--macvtap", "wire", "--cpus", "2"]);
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, "192.168.77.3"));
    let features = vm.run("cat /sys/class/net/eth0/device/features");
    for (bit, name) in [
        (0, "CSUM"),
        (1, "GUEST_CSUM"),
        (3, "MTU"),
        (5, "MAC"),
        (7, "GUEST_TSO4"),
        (8, "GUEST_TSO6"),
        (11, "HOST_TSO4"),
        (12, "HOST_TSO6"),
        (15, "MRG_RXBUF"),
        (16, "STATUS"),
        (28, "INDIRECT_DESC"),
        (29, "EVENT_IDX"),
        (32, "VERSION_1"),
    ] {
        assert_eq!(
            features.as_bytes()[bit],
            b'1',
            "VIRTIO_NET_F_{name} in {features}"
        );
    }

    let _server = iperf::serve(&site.peer);
    for (direction, to, option) in [
        ("tx", "192.168.77.3", ""),
        ("rx", "192.168.77.3", "-R"),
        ("tx", "fd77::3", ""),
        ("rx", "fd77::3", "-R"),
    ] {
        let counter = |what: &str| format!("cat /sys/class/net/eth0/statistics/{direction}_{what}");
        let before = (
            number(&mut vm, &counter("bytes")),
            number(&mut vm, &counter("packets")),
        );
        let output = vm.try_run(&format!("iperf3 -c {to} {option} -n 4M"));
        assert_eq!(output.status, 0, "{}\n{}", output.text, vm.transcript());
        println!(
            "{}",
            output
                .text
                .lines()
                .filter(|line| line.contains("er"))
                .collect::<Vec<_>>()
                .join("\n")
        );
        let bytes = number(&mut vm, &counter("bytes")) - before.0;
        let packets = number(&mut vm, &counter("packets")) - before.1;
        // The MTU is 1500: without segmentation offload no frame is longer than 1514 bytes.
        assert!(
            bytes > 4_000_000 && bytes / packets > 1514,
            "{direction} {to}: {bytes} bytes in {packets} frames"
        );
    }

    // The server goes into the background before it listens.
    vm.run(
        "iperf3 -s -D; for i in $(seq 100); do grep -q ':1451 ' /proc/net/tcp6 && exit; \
         usleep 100000; done; exit 1",
    );
    let client = site
        .peer
        .exec(&["iperf3", "-c", "192.168.77.11", "-n", "4M"]);
    assert!(
        client.status.success(),
        "{}",
        String::from_utf8_lossy(&client.stdout)
    );
});

lab_test!(guests_in_bridge_mode_talk_and_a_second_nic_works, || {
    let site = Site::new();
    let other = Netns::new();
    site.host.veth("wire2", &other, "end2");
    other.address("end2", "192.168.78.1/24");
    let two_nics = [
        "--macvtap",
        "wire",
        "--macvtap",
        "wire2,mac=02:aa:00:00:00:22",
    ];
    let (mut a, mut b) = boot_two(&site.host, &two_nics, &["--macvtap", "wire"]);

    address(&mut a, "eth0", 11);
    address(&mut b, "eth0", 12);
    assert!(
        pings(&mut a, "192.168.77.12"),
        "{}\n{}",
        a.transcript(),
        b.transcript()
    );
    assert!(pings(&mut b, "192.168.77.11"));
    assert!(pings(&mut a, "fd77::12"));

    assert_eq!(
        a.run("cat /sys/class/net/eth1/address").trim(),
        "02:aa:00:00:00:22"
    );
    a.run("ip link set eth1 up && ip addr add 192.168.78.11/24 dev eth1");
    assert!(pings(&mut a, "192.168.78.1"));
    assert!(other.pings("192.168.78.11", 3));
});

lab_test!(guests_in_private_mode_do_not_talk_and_leave_nothing, || {
    let site = Site::new();
    site.far.address("end", "192.168.77.4/24");
    let mac = "02:aa:00:00:00:0b";
    let a_args = ["--macvtap", &format!("wire,mode=private,mac={mac}")];
    let (mut a, mut b) = boot_two(&site.host, &a_args, &["--macvtap", "wire,mode=private"]);
    address(&mut a, "eth0", 11);
    address(&mut b, "eth0", 12);
    // Both have a network: what follows is the mode's doing.
    for vm in [&mut a, &mut b] {
        assert!(pings(vm, "192.168.77.4"), "{}", vm.transcript());
    }
    assert!(!pings(&mut a, "192.168.77.12"));
    assert!(!pings(&mut b, "192.168.77.11"));

    let take_mac = || {
        let add = format!("link add link wire name probe address {mac} type macvlan mode private");
        site.host.ip(&add);
        let up = site
            .host
            .exec(&["ip", "link", "set", "probe", "up"])
            .status
            .success();
        site.host.ip("link del probe");
        up
    };
    assert!(!take_mac(), "the MAC is in use while the guest runs");
    let links_before = site.host.links();
    let nodes = [&a, &b].map(|vm| tap_nodes(vm.pid())).concat();
    assert!(nodes.len() >= 2, "each has a tap open: {nodes:?}");
    a.signal(Signal::KILL);
    b.signal(Signal::KILL);
    a.wait_exit();
    b.wait_exit();
    let is_left = || nodes.iter().any(|node| node.exists());
    assert!(
        eventually(|| take_mac() && !is_left()),
        "one of {nodes:?} is still there, or the MAC is not free"
    );
    assert_eq!(site.host.links(), links_before);
});

lab_test!(existing_macvtap_is_used_as_it_is, || {
    let site = Site::new();
    site.host.macvtap("mt0", "wire", "bridge");
    let mac = site.host.mac("mt0");
    let mut vm = boot(Some(&site.host), &["--macvtap", "mt0"]);
    assert_eq!(vm.run("cat /sys/class/net/eth0/address").trim(), mac);
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, "192.168.77.3"));
    vm.send("1 poweroff -f\n");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
    assert_eq!(site.host.mac("mt0"), mac, "it is still there");
});

lab_test!(carrier_of_the_lower_is_that_of_the_guests_nic, || {
    let site = Site::new();
    let mut vm = boot(Some(&site.host), &["--macvtap", "wire"]);
    address(&mut vm, "eth0", 11);
    becomes(&mut vm, "cat /sys/class/net/eth0/carrier", "1");
    let interrupts = "awk '/virtio0/ { print $2 }' /proc/interrupts | head -n1";
    let changes = "cat /sys/class/net/eth0/carrier_changes";
    let before = (number(&mut vm, interrupts), number(&mut vm, changes));

    site.far.down("end");
    becomes(&mut vm, "cat /sys/class/net/eth0/carrier", "0");
    becomes(&mut vm, "cat /sys/class/net/eth0/operstate", "down");
    let link = vm.run("ip link show eth0");
    assert!(link.contains("NO-CARRIER"), "{link}");
    assert!(number(&mut vm, interrupts) > before.0, "no interrupt came");

    site.far.up("end");
    becomes(&mut vm, "cat /sys/class/net/eth0/carrier", "1");
    // The flags follow within a second (net/core/link_watch.c).
    becomes(&mut vm, "cat /sys/class/net/eth0/operstate", "up");
    let link = vm.run("ip link show eth0");
    assert!(!link.contains("NO-CARRIER"), "{link}");
    assert_eq!(number(&mut vm, changes), before.1 + 2);
    assert!(
        pings(&mut vm, "192.168.77.3"),
        "the link works again\n{}",
        vm.transcript()
    );
});

/// Waits until a command in the guest writes a line.
fn becomes(vm: &mut Vm, command: &str, line: &str) {
    let wait = format!(
        "for i in $(seq 50); do [ \"$({command})\" = {line} ] && exit; usleep 100000; done; exit 1"
    );
    let status = vm.try_run(&wait).status;
    assert_eq!(status, 0, "{command}: not {line}\n{}", vm.transcript());
}

lab_test!(every_kind_of_lower_carries_a_guest_and_others, || {
    let (host, far) = (Netns::new(), Netns::new());
    for n in 0..3 {
        host.veth(&format!("wire{n}"), &far, &format!("end{n}"));
    }
    host.ip("link add lower0 link wire0 type vlan id 5");
    far.ip("link add tagged link end0 type vlan id 5");
    host.ip("link add lower1 type bond mode active-backup");
    host.ip("link add lower2 type bridge");
    for n in 1..3 {
        host.down(&format!("wire{n}"));
        host.ip(&format!("link set wire{n} master lower{n}"));
        host.up(&format!("wire{n}"));
    }
    host.ip("link add lower3 type dummy");
    let peers = Netns::new();
    for n in 0..4 {
        host.up(&format!("lower{n}"));
    }
    // A dummy has no wire: only links that share it.
    peers.macvlan("sibling", &host, "lower3");
    let peer = |n: usize| match n {
        0 => (&far, "tagged"),
        1 => (&far, "end1"),
        2 => (&far, "end2"),
        _ => (&peers, "sibling"),
    };
    for n in 0..4 {
        let (netns, link) = peer(n);
        netns.up(link);
        netns.address(link, &format!("192.168.{}.1/24", 80 + n));
    }

    let lowers: Vec<_> = (0..4).map(|n| format!("lower{n}")).collect();
    let args: Vec<_> = lowers
        .iter()
        .flat_map(|lower| ["--macvtap", lower])
        .collect();
    let mut vm = boot(Some(&host), &args);
    for n in 0..4 {
        let net = 80 + n;
        vm.run(&format!(
            "ip link set eth{n} up && ip addr add 192.168.{net}.11/24 dev eth{n}"
        ));
        assert!(
            pings(&mut vm, &format!("192.168.{net}.1")),
            "lower{n}\n{}",
            vm.transcript()
        );
        let (netns, _) = peer(n);
        assert!(netns.pings(&format!("192.168.{net}.11"), 3), "lower{n}");
    }

    // And for other programs, in both placements.
    let script = r#"[ -c /proc/self/fd/3 ] && echo "$MINIVMM_NET_LOWER""#;
    for lower in &lowers {
        for placement in ["private", "host"] {
            let macvtap = format!("{lower},netns={placement}");
            let output = host
                .command(vm::binary())
                .args(["net", "open", &macvtap, "--", "sh", "-c", script])
                .output()
                .expect("minivmm starts");
            assert_eq!(
                String::from_utf8_lossy(&output.stdout).trim(),
                lower,
                "{macvtap}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
});

// Without a guest: it is here because the lab's kernel has the driver for VRFs, which many have
// not.
lab_test!(host_link_on_a_vrf_slave_moves_inside_the_vrf, || {
    let (host, far) = (Netns::new(), Netns::new());
    if lab::place() == lab::Place::InsideLab {
        host.ip("link add red type vrf table 10");
    } else if !host.add_if_supported("red type vrf table 10") {
        return;
    }
    host.up("red");
    host.veth("v0", &far, "v1");
    host.ip("link set v0 master red");
    host.address("v0", "192.0.2.1/24");
    far.address("v1", "192.0.2.3/24");
    far.address("v1", "2001:db8::3/64");
    // One with a lifetime leaves its network's route in the VRF's table.
    host.ip("address add 2001:db8::1/64 dev v0 nodad valid_lft 5000 preferred_lft 4000");
    host.ip("route add 198.51.100.0/24 via 192.0.2.3 vrf red");
    let main = host.ip("route show") + &host.ip("-6 route show");
    let table = || {
        let text = host.ip("route show table 10") + &host.ip("-6 route show table 10");
        // What each link has of its own, and what passes with time.
        let own = |line: &&str| !line.contains("fe80::") && !line.contains("ff00::");
        let lines = text.lines().filter(own).map(|line| {
            let line = line.replace("macvlan0", "v0");
            line.split(" expires")
                .next()
                .unwrap_or_default()
                .trim_end()
                .to_owned()
        });
        let mut lines: Vec<String> = lines.collect();
        lines.sort();
        lines
    };
    let before = table();
    let host_link = |args: &[&str]| {
        let mut command = host.command(vm::binary());
        let output = command.args(["net", "host-link", "v0"]).args(args).output();
        let output = output.expect("minivmm starts");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), stderr)
    };
    for arg in ["--move-address", "--delete"] {
        let (done, stderr) = host_link(&[arg]);
        assert!(done, "{arg}: {stderr}");
        assert_eq!(table(), before, "after {arg}");
        assert_eq!(host.ip("route show") + &host.ip("-6 route show"), main);
        for address in ["192.0.2.1", "2001:db8::1"] {
            assert!(far.pings(address, 5), "{address} after {arg}");
        }
    }

    // No way back from one table into another.
    let (done, stderr) = host_link(&["--move-address"]);
    assert!(done, "{stderr}");
    host.ip("link set macvlan0 nomaster");
    let (done, stderr) = host_link(&["--delete"]);
    assert!(
        !done && stderr.contains("`ip link set v0 nomaster`"),
        "{stderr}"
    );
    host.ip("link set v0 nomaster");
    let (done, stderr) = host_link(&["--delete"]);
    assert!(done, "{stderr}");
});

/// The stock kernel as a bzImage packed by gzip, which minivmm unpacks.
fn gzip_bzimage() -> NamedTempFile {
    let mut image = fs::read(assets().bzimage()).expect("the kernel is there");
    let word = |at: usize| {
        let bytes = image[at..].first_chunk().expect("it has a header");
        u32::from_le_bytes(*bytes) as usize
    };
    // Documentation/arch/x86/boot.rst: setup_sects, payload_offset, and below syssize and payload_length.
    let setup = (usize::from(image[0x1f1]) + 1) * 512;
    let start = setup + word(0x248);
    let vmlinux = fs::File::open(assets().vmlinux()).expect("the kernel is there");
    let gzip = Command::new("gzip").arg("-1c").stdin(vmlinux).output();
    let payload = gzip.expect("gzip runs").stdout;
    image.truncate(start);
    image.extend(&payload);
    image.resize(image.len().next_multiple_of(16), 0);
    let syssize = (image.len() - setup) / 16;
    for (at, number) in [(0x1f4, syssize), (0x24c, payload.len())] {
        image[at..at + 4].copy_from_slice(&(number as u32).to_le_bytes());
    }
    let file = NamedTempFile::new().expect("there is room in /tmp");
    fs::write(&file, image).expect("there is room in /tmp");
    file
}

lab_test!(kernel_is_at_random_addresses_unless_nokaslr, || {
    let file = gzip_bzimage();
    let kernel = file.path().to_str().expect("its path is UTF-8");
    let boot = |cmdline| {
        let mut vm = boot(None, &["--kernel", kernel, "--cmdline", cmdline]);
        let places = [
            "grep ' _text$' /proc/kallsyms",
            "grep 'Kernel code' /proc/iomem",
        ];
        let places = places.map(|command| first_word(&mut vm, command));
        // Bit 1 of loadflags, by which the kernel moves its other memory too.
        let flags = "od -An -tu1 -j 529 -N 1 /sys/kernel/boot_params/data";
        let is_random = number(&mut vm, flags) & 2 != 0;
        assert!(vm.log().contains(": unpacked, "), "{}", vm.log());
        (places, is_random)
    };
    let boots: Vec<_> = thread::scope(|scope| {
        let boots = ["quiet", "quiet", "nokaslr"].map(|cmdline| scope.spawn(move || boot(cmdline)));
        let join = |boot: thread::ScopedJoinHandle<_>| {
            boot.join().unwrap_or_else(|panic| resume_unwind(panic))
        };
        boots.into_iter().map(join).collect()
    });
    let linked = ["ffffffff81000000".to_owned(), "01000000".to_owned()];
    assert_eq!(boots[2], (linked.clone(), false));
    // One of 500 virtual places and of 200 physical ones: all of them differ.
    assert_ne!(boots[0].0, boots[1].0);
    for (places, is_random) in &boots[..2] {
        assert_ne!(*places, linked);
        assert!(is_random);
    }
});

lab_test!(vmlinux_with_four_cpus_boots_and_powers_off, || {
    let vmlinux = assets().vmlinux();
    let kernel = vmlinux.to_str().expect("the cache's path is UTF-8");
    let mut vm = boot(None, &["--kernel", kernel, "--cpus", "4"]);
    assert_eq!(vm.run("nproc").trim(), "4");
    assert_eq!(vm.run(NO_SELF_TESTS).trim(), "Y");
    assert_eq!(
        vm.run("ls /sys/class/net").trim(),
        "lo",
        "a guest without a NIC"
    );
    acpi_is_clean(&mut vm);
    vm.send("1 poweroff -f\n");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
    assert!(!vm.log().to_lowercase().contains("reboot"), "{}", vm.log());
});

lab_test!(guest_with_80_mib_boots_and_its_reboot_ends_minivmm, || {
    // Less is not enough for this kernel, and its bzImage needs more to unpack itself.
    let (kernel, initrd) = (assets().vmlinux(), small_initrd());
    let [kernel, initrd] =
        [&kernel, &initrd].map(|path| path.to_str().expect("the cache's path is UTF-8"));
    let mut args = vec!["--memory", "80M", "--kernel", kernel, "--initrd", initrd];
    args.extend(["--cmdline", "cryptomgr.notests=0"]);
    let mut vm = boot(None, &args);
    assert_eq!(vm.run(NO_SELF_TESTS).trim(), "N");
    let total = number(
        &mut vm,
        "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo",
    );
    assert!(total < 64 << 10, "{total} KiB");
    vm.send("1 reboot -f\n");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
    assert!(vm.log().to_lowercase().contains("reboot"), "{}", vm.log());
});

lab_test!(
    guest_that_reboots_has_its_network_back_on_the_same_mac,
    || {
        let site = Site::new();
        let mac = "02:aa:00:00:00:0d";
        let nic = format!("wire,mac={mac}");
        let args = ["--macvtap", &nic, "--cpus", "2", "--reboot", "restart"];
        let mut vm = boot(Some(&site.host), &args);
        for reboots in 0..3 {
            assert_eq!(vm.run("nproc").trim(), "2");
            assert_eq!(vm.run("cat /sys/class/net/eth0/address").trim(), mac);
            address(&mut vm, "eth0", 13);
            assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
            assert!(site.peer.pings("fd77::13", 3), "{}", vm.transcript());
            acpi_is_clean(&mut vm);
            if reboots < 2 {
                // As init does it, and as an emergency.
                let way = ["reboot -f", "echo b >/proc/sysrq-trigger"][reboots];
                vm.start_command(way);
                vm.wait_for("GUEST ready\n");
            }
        }
        assert_eq!(vm.log().matches("the guest restarts").count(), 2);
        vm.send("1 echo c >/proc/sysrq-trigger\n");
        assert_eq!(vm.wait_exit().code(), Some(4), "{}", vm.transcript());
    }
);

lab_test!(guest_uses_memory_above_4_gib_and_its_panic_is_seen, || {
    let mut vm = boot(None, &["--memory", "4608M"]);
    let total = number(
        &mut vm,
        "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo",
    );
    assert!(total > 4300 << 10, "{total} KiB");
    vm.send("1 echo c >/proc/sysrq-trigger\n");
    assert_eq!(vm.wait_exit().code(), Some(4), "{}", vm.transcript());
    assert!(vm.log().to_lowercase().contains("panic"), "{}", vm.log());
});

lab_test!(guest_with_sixteen_cpus_brings_up_all, || {
    let mut vm = boot(None, &["--cpus", "16"]);
    assert_eq!(vm.run("nproc").trim(), "16");
    acpi_is_clean(&mut vm);
});

lab_test!(sigterm_presses_the_power_button_with_stdin_closed, || {
    // A shell closes descriptor 0, which then is the first that minivmm opens itself.
    let inner = command(None, &[]);
    let mut shell = Command::new("sh");
    shell
        .args(["-c", r#"exec "$0" "$@" <&-"#])
        .arg(inner.get_program())
        .args(inner.get_args());
    let mut vm = boot_command(shell);
    vm.signal(Signal::TERM);
    vm.wait_for("GUEST power button\n");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
});

lab_test!(second_sigterm_ends_a_deaf_guest_at_once, || {
    let mut vm = boot(None, &[]);
    vm.run("killall head");
    vm.signal(Signal::TERM);
    thread::sleep(2 * SECOND);
    assert!(
        !vm.has_ended(),
        "the guest has its grace time\n{}",
        vm.transcript()
    );
    // Eight of its ten seconds are left.
    let start = Instant::now();
    vm.signal(Signal::TERM);
    assert_eq!(vm.wait_exit().code(), Some(143), "{}", vm.transcript());
    assert!(start.elapsed() < 6 * SECOND, "{:?}", start.elapsed());
});

lab_test!(console_to_a_file_keeps_stdout_empty, || {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("console");
    let console = format!("file:{}", path.display());
    let mut command = command(None, &["--console", &console]);
    command.stdin(Stdio::null());
    let mut vm = Vm::spawn(command);
    let read = || std::fs::read_to_string(&path).unwrap_or_default();
    assert!(eventually(|| read().contains("GUEST ready")), "{}", read());
    vm.signal(Signal::TERM);
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
    assert_eq!(vm.console(), "");
});
