//! What a NIC does besides moving frames, over a real macvtap: rate limits, the capture, the
//! counters in the log.

mod harness;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use harness::guest::{Net, PEER, addresses, power_off, succeed};
use harness::initramfs::find;
use harness::vm::Vm;
use harness::{guest_test, transports_test};

transports_test!(rate_limits_hold_in_both_directions, |net| {
    const BYTES: usize = 4 << 20;
    // 40 Mbit/s: 4 MiB take 0.84 s.
    let nic = "lower,tx-rate=40Mbit,rx-rate=40Mbit";
    let mut vm = net.start_on(nic, 2, &format!("mode=echo nic=own bytes={BYTES}"));
    vm.wait_for("READY echo\n");
    let [ip, _] = addresses(2);
    for (direction, rate) in [
        ("received", net.fill_sink(&ip, BYTES)),
        ("sent", net.drain_source(&ip, BYTES)),
    ] {
        println!("{direction} {rate} Mbit/s");
        // What a burst lets pass stays below a tenth; a busy machine makes it less.
        assert!((4..=44).contains(&rate), "{direction} {rate} Mbit/s");
    }
    // What is still held back when the guest powers off is lost.
    thread::sleep(Duration::from_millis(300));
    let pair = ended(&net, vm);
    assert!(pair.matches("times rate-limited").count() == 2, "{pair}");
});

transports_test!(limited_frames_wait_without_a_spinning_thread, |net| {
    // Ten frames a second, and more that wait to be received all the time.
    let mut vm = net.start_on("lower,rx-rate=10frames,burst=1ms", 2, "mode=echo nic=own");
    vm.wait_for("READY echo\n");
    let [ip, _] = addresses(2);
    let flood = |count: &str| {
        net.far
            .exec(&["ping", "-n", "-q", "-i0.005", "-c", count, "-W1", &ip])
    };
    let before = (cpu_time_of_nic(vm.pid()), Instant::now());
    let output = flood("400");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (used, passed) = (cpu_time_of_nic(vm.pid()) - before.0, before.1.elapsed());
    println!("the NIC's thread ran {used:?} of {passed:?}");
    assert!(used < passed / 10, "{used:?} of {passed:?}\n{text}");
    let answered: u32 = text
        .split(", ")
        .find_map(|part| part.strip_suffix(" received")?.parse().ok())
        .unwrap_or_else(|| panic!("{text}"));
    let most = 12 * (passed.as_secs() as u32 + 2);
    assert!(
        (5..most).contains(&answered),
        "{answered} of at most {most}\n{text}"
    );
});

/// CPU time of the thread that moves a guest's frames.
fn cpu_time_of_nic(pid: u32) -> Duration {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("minivmm runs");
    let nic = threads
        .flatten()
        .map(|thread| thread.path())
        .find(|thread| {
            fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.trim() == "net0")
        });
    let nic = nic.expect("the NIC has a thread");
    let schedstat = fs::read_to_string(nic.join("schedstat")).expect("the kernel counts");
    let ran = schedstat.split(' ').next().and_then(|ns| ns.parse().ok());
    Duration::from_nanos(ran.expect("a number"))
}

/// Ends a guest that serves; the line of the log that counts what its first pair has done.
fn ended(net: &Net, mut vm: Vm) -> String {
    let [ip, _] = addresses(2);
    assert_eq!(net.datagram(&ip, b"quit"), b"quit");
    vm.wait_exit();
    let log = vm.log();
    let line = log.lines().find(|line| line.contains("net0 queue pair 0"));
    line.unwrap_or_else(|| panic!("{log}")).to_owned()
}

transports_test!(counters_are_logged_at_the_end, |net| {
    let vm = net.serve(2, "nic=own");
    let [ip, _] = addresses(2);
    assert!(net.far.pings(&ip, 3));
    let line = ended(&net, vm);
    for part in ["received ", "; sent ", " kicks", " wake-ups"] {
        assert!(line.contains(part), "{line}");
    }
    assert!(
        !line.contains("sent 0 frames") && !line.contains("received 0 frames"),
        "{line}"
    );
});

transports_test!(offered_features_follow_the_hosts_kernel, |net| {
    let console = net.run(2, "mode=info");
    let offered = console
        .split_whitespace()
        .find_map(|word| word.strip_prefix("features=0x"))
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .unwrap_or_else(|| panic!("{console}"));
    let bits = |bits: &[u32]| bits.iter().fold(0u64, |sum, bit| sum | 1 << bit);
    // virtio 1.2, 5.1.3: offloads, then the control queue's; no MQ for a single pair.
    let usual = bits(&[0, 1, 3, 5, 7, 8, 9, 11, 12, 13, 15, 16])
        | bits(&[2, 17, 18, 19, 21, 23, 28, 29, 32]);
    assert_eq!(offered & usual, usual, "{offered:#x}");
    assert_eq!(offered & bits(&[22]), 0, "{offered:#x}");
    // Taps know UDP segmentation since 6.2 (include/uapi/linux/if_tun.h).
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let uso = bits(&[54, 55, 56]);
    let expected = if version >= (6, 2) { uso } else { 0 };
    assert_eq!(offered & uso, expected, "{offered:#x} on Linux {release}");
});

/// What tshark says of a file, one line for each frame.
fn tshark(file: &Path, args: &[&str]) -> String {
    let mut command = Command::new(find("tshark", "tshark"));
    command.arg("-r").arg(file).args(args);
    let output = command.output().expect("tshark starts");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

transports_test!(capture_is_read_by_tshark, |net| {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("net0.pcapng");
    // What an earlier guest left is replaced.
    fs::write(&file, vec![0; 1 << 20]).expect("there is room");
    let nic = format!("lower,pcap={}", file.display());
    power_off(net.start_on(
        &nic,
        2,
        &format!("mode=ping nic=own count=5 peer={}", PEER[0]),
    ));
    let frames = tshark(
        &file,
        &[
            "-T",
            "fields",
            "-e",
            "frame.len",
            "-e",
            "frame.packet_flags_direction",
            "-e",
            "icmp.type",
        ],
    );
    for (direction, icmp) in [("0x00000001", "0"), ("0x00000002", "8")] {
        let wanted = |line: &&str| {
            let fields: Vec<_> = line.split('\t').collect();
            fields.get(1) == Some(&direction) && fields.get(2) == Some(&icmp)
        };
        assert!(
            frames.lines().filter(wanted).count() >= 5,
            "{direction} {icmp} in\n{frames}"
        );
    }
    assert!(tshark(&file, &["-q", "-z", "io,phs"]).contains("arp"));
});

guest_test!(full_disk_ends_the_capture_and_not_the_guest, || {
    let net = Net::new();
    let mut vm = net.start_on(
        "lower,pcap=/dev/full",
        2,
        &format!("mode=ping count=5 peer={}", PEER[0]),
    );
    assert!(vm.wait_exit().success(), "{}", vm.transcript());
    assert_eq!(
        vm.log().matches("No space left").count(),
        1,
        "{}",
        vm.transcript()
    );
});

guest_test!(slow_reader_of_a_capture_does_not_slow_the_guest, || {
    let net = Net::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let fifo = dir.path().join("fifo");
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
    )
    .expect("a FIFO can be made");
    // Opened, and never read.
    let _reader = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&fifo)
        .expect("it opens");
    let nic = format!("lower,pcap={}", fifo.display());
    let mut vm = net.start_on(&nic, 2, "mode=echo nic=own bytes=33554432");
    vm.wait_for("READY echo\n");
    let [ip, _] = addresses(2);
    let rate = net.drain_source(&ip, 32 << 20);
    println!("{rate} Mbit/s");
    ended(&net, vm);
});

guest_test!(bad_nic_keys_are_refused_before_anything_is_made, || {
    let net = Net::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("x");
    let nowhere = dir.path().join("none/x");
    let (one, none) = (
        format!("lower,pcap={}", file.display()),
        format!("lower,pcap={}", nowhere.display()),
    );
    let without_vhost = if Path::new("/dev/vhost-net").exists() {
        Vec::new()
    } else {
        vec![(vec!["lower,backend=vhost"], "cannot use vhost-net")]
    };
    let cases = [
        (vec![none.as_str()], "cannot write a NIC's capture to"),
        (vec![one.as_str(), one.as_str()], "is a NIC's capture too"),
    ];
    for (nics, why) in cases.into_iter().chain(without_vhost) {
        let mut command = net.command();
        for nic in &nics {
            command.args(["--macvtap", nic]);
        }
        let output = command.output().expect("minivmm starts");
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{nics:?}: {log}");
        assert!(log.contains(why), "{nics:?}: {log}");
        assert_eq!(net.host.links(), ["lower"]);
    }
    // A guest that has it all all the same.
    succeed(net.start_on(&one, 2, "mode=info"));
});
