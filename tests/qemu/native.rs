//! The options of the native monitor.

use serde_json::Value;

use super::control::Listener;
use super::*;
use crate::harness::initramfs::find;
use crate::harness::linux::services_initrd;

tcg_test!(kernel_guest_has_the_macvtaps_mac_and_powers_off, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let qmp = dir.path().join("qmp");
    let args = ["--macvtap", "wire,mac=02:aa:00:00:00:0b", "--accel", "auto"];
    let more = ["--cpus", "2", "--memory", "400M"];
    let socket = ["--qmp", qmp.to_str().expect("it is text")];
    let mut vm = site.boot(&[&args[..], &more, &socket].concat());
    let listener = Listener::connect(&qmp);
    assert_eq!(
        vm.run("cat /sys/class/net/eth0/address").trim(),
        "02:aa:00:00:00:0b"
    );
    assert_eq!(vm.run("nproc").trim(), "2");
    let cmdline = vm.run("cat /proc/cmdline");
    assert!(cmdline.starts_with("console=ttyS0 reboot=panic_warm panic=-1"));
    assert!(site.host.links() == ["wire"], "{:?}", site.host.links());
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
    assert!(site.peer.pings("192.168.77.11", 3));
    let knows = || {
        let list = site.host.command(binary()).args(["net", "list"]).output();
        text(&list.expect("minivmm starts").stdout).contains("192.168.77.11")
    };
    assert!(eventually(knows), "the guest's address is not listed");
    vm.send("1 poweroff -f\n");
    assert_eq!(vm.wait_exit().code(), Some(0));
    let events = listener.events();
    let mut learnt = events
        .iter()
        .filter(|(name, _)| name == "X_MINIVMM_ADDRESS");
    let is_its =
        learnt.any(|(_, data)| data["address"] == "192.168.77.11" && data["nic"] == "macvtap0");
    assert!(is_its, "{events:?}");
    assert!(vm.log().contains("powered off"), "{}", vm.log());
    // That it takes long is not left unsaid.
    let warned = vm.log().contains("by emulation (TCG)");
    assert_eq!(warned, !kvm_is_native(), "{}", vm.log());
    assert!(site.mac_is_free("02:aa:00:00:00:0b"));
});

tcg_test!(options_of_the_native_monitor_switch_with_one_word, || {
    let site = Site::new();
    let mut command = site.host.command(binary());
    command.args(["-q", "qemu", "--accel", "tcg", "--macvtap", "wire"]);
    command.args(["--host-link", "192.168.78.9/24", "--transport", "pci"]);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let disks = Disks::make(dir.path());
    disks.add_to(&mut command);
    command.args(["--balloon", "64M", "--cmdline", STEADY]);
    command.arg("--kernel").arg(assets().bzimage());
    command.arg("--initrd").arg(initrd()).stdin(Stdio::piped());
    let mut vm = ready(command);
    assert!(!vm.log().contains("info"), "{}", vm.log());
    vm.run("ip link set eth0 up && ip addr add 192.168.78.11/24 dev eth0");
    assert!(pings(&mut vm, "192.168.78.9"), "{}", vm.transcript());
    let found = vm.run("cd /sys/block; echo $(cat vda/serial) $(cat vda/size vdb/ro)");
    let found: Vec<&str> = found.split_whitespace().collect();
    assert_eq!(found, ["root-1", "2048", "1"], "{}", vm.transcript());
    vm.run("echo from the guest >/dev/vda && sync");
    let held_back = || {
        let pages = vm.run("sed -n 's/^balloon_inflate //p' /proc/vmstat");
        pages.trim() == "16384"
    };
    assert!(eventually(held_back), "{}", vm.transcript());
    let source = vm.run("cat /sys/class/misc/hw_random/rng_current");
    assert_eq!(source.trim(), "virtio_rng.0");
    vm.send("1 poweroff -f\n");
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert_eq!(site.host.links(), ["wire"], "the host's link is deleted");
    assert_eq!(disks.begins_with(), "from the guest\n");

    let output = outcome(site.qemu(["--kernel", "k", "--transport", "mmio"]));
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr).contains("virtio_pci"),
        "{}",
        text(&output.stderr)
    );
});

/// Two disks of a guest: one that it writes, and a qcow2 that it reads.
struct Disks {
    raw: PathBuf,
    qcow2: PathBuf,
}

impl Disks {
    fn make(dir: &Path) -> Self {
        let (raw, qcow2) = (dir.join("a:b.img"), dir.join("c,d.qcow2"));
        let file = fs::File::create(&raw).expect("an image");
        file.set_len(1 << 20).expect("an image of 1 MiB");
        let mut make = Command::new(find("qemu-img", "qemu-utils"));
        let made = make.args(["create", "-q", "-f", "qcow2"]).arg(&qcow2);
        let made = made.arg("1M").status().expect("qemu-img can be run");
        assert!(made.success());
        Self { raw, qcow2 }
    }

    /// A colon is QEMU's for a protocol, a comma separates its options.
    fn add_to(&self, command: &mut Command) {
        let raw = self.raw.file_name().expect("a name").to_string_lossy();
        let qcow2 = self.qcow2.to_string_lossy().replace(',', ",,");
        command.current_dir(self.raw.parent().expect("a folder"));
        command.args(["--disk", &format!("{raw},serial=root-1")]);
        command.args(["--disk", &format!("{qcow2},readonly=on,iops=1000")]);
    }

    fn begins_with(&self) -> String {
        let bytes = fs::read(&self.raw).expect("the image");
        let line = bytes.split_inclusive(|&byte| byte == b'\n').next();
        String::from_utf8_lossy(line.unwrap_or_default()).into_owned()
    }
}

tcg_test!(two_guests_talk_and_one_has_several_queues, || {
    let site = Site::new();
    let several = [
        "--macvtap",
        "wire,queues=2",
        "--cpus",
        "2",
        "--accel",
        "tcg",
    ];
    let (mut a, mut b) = thread::scope(|scope| {
        let a = scope.spawn(|| site.boot(&several));
        let b = site.boot(&["--macvtap", "wire", "--accel", "tcg"]);
        (a.join().expect("the first guest boots"), b)
    });
    let queues = a.run("ls -d /sys/class/net/eth0/queues/rx-* | wc -l");
    assert_eq!(queues.trim(), "2");
    let vectors = a.run("grep -c virtio /proc/interrupts");
    // The configuration's, and two for each pair of queues; the control queue's comes with its
    // first use.
    assert!(vectors.trim().parse::<u32>().unwrap() >= 5, "{vectors}");
    address(&mut a, "eth0", 11);
    address(&mut b, "eth0", 12);
    assert!(pings(&mut a, "192.168.77.12"), "{}", a.transcript());
    assert!(pings(&mut b, "192.168.77.11"));
    // Several flows, so that each of the queues gets some.
    for _ in 0..8 {
        assert!(pings(&mut a, "192.168.77.3"));
    }
});

tcg_test!(kernel_guest_ends_as_in_the_native_monitor, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let qmp = dir.path().join("qmp");
    for (command, status, words, events) in [
        (
            "reboot -f",
            0,
            "asked for a reboot",
            &[("SHUTDOWN", "guest-reset")][..],
        ),
        (
            "echo c >/proc/sysrq-trigger",
            4,
            "panicked",
            &[("GUEST_PANICKED", ""), ("SHUTDOWN", "guest-panic")],
        ),
    ] {
        let mut vm = site.boot(&["--accel", "tcg", "--qmp", &qmp.display().to_string()]);
        let listener = Listener::connect(&qmp);
        assert_eq!(vm.run("ls /sys/class/net").trim(), "lo");
        vm.send(&format!("1 {command}\n"));
        let code = vm.wait_exit().code();
        assert_eq!(code, Some(status), "{command}\n{}", vm.transcript());
        assert!(vm.log().contains(words), "{}", vm.log());
        let found = listener.events();
        let found = found.iter().map(|(name, data)| {
            let why = data["reason"].as_str().unwrap_or_default();
            (name.as_str(), why)
        });
        assert_eq!(found.collect::<Vec<_>>(), events);
    }
});

tcg_test!(
    kernel_guest_that_reboots_restarts_and_its_panic_ends,
    || {
        let site = Site::new();
        let dir = tempfile::tempdir().expect("a temporary directory");
        let qmp = dir.path().join("qmp");
        let nic = ["--accel", "tcg", "--macvtap", "wire,mac=02:aa:00:00:00:0e"];
        let more = ["--reboot", "restart", "--qmp", qmp.to_str().expect("text")];
        let mut vm = site.boot(&[nic, more].concat());
        let listener = Listener::connect(&qmp);
        vm.start_command("reboot -f");
        vm.wait_for("GUEST ready\n");
        let mac = vm.run("cat /sys/class/net/eth0/address");
        assert_eq!(mac.trim(), "02:aa:00:00:00:0e");
        address(&mut vm, "eth0", 14);
        assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
        vm.send("1 echo c >/proc/sysrq-trigger\n");
        assert_eq!(vm.wait_exit().code(), Some(4), "{}", vm.transcript());
        let events = listener.events();
        let names = ["RESET", "STOP", "RESUME", "SHUTDOWN"];
        let ends = events.iter().filter(|(name, _)| names.contains(&&**name));
        let reason =
            |data: &serde_json::Value| data["reason"].as_str().unwrap_or_default().to_owned();
        let mut ends: Vec<_> = ends.map(|(name, data)| (&**name, reason(data))).collect();
        // SeaBIOS, which finds that it has run before, resets once more; QEMU's own events, by which it
        // was reset, are not seen.
        ends.dedup();
        let expected = [("RESET", "guest-reset"), ("SHUTDOWN", "guest-panic")];
        assert_eq!(ends, expected.map(|(name, why)| (name, why.to_owned())));
    }
);

tcg_test!(signals_press_the_power_button_and_a_second_one_ends, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("console");
    let console = format!("file:{}", file.display());
    let read = || fs::read_to_string(&file).unwrap_or_default();
    let (kernel, initrd) = (assets().bzimage(), initrd());
    let name = format!("qemu-console-{}", std::process::id());
    let mut command = site.qemu(["--accel", "tcg", "--console", &console]);
    command.args(["--name", &name, "--kernel"]);
    command.arg(&kernel).arg("--initrd").arg(&initrd);
    command.args(["--cmdline", STEADY]);
    let mut vm = Vm::spawn(command);
    assert!(
        eventually(|| read().contains("GUEST ready")),
        "the guest does not boot"
    );
    let mut dump = Command::new(binary());
    dump.args(["console", &name, "--dump"]);
    let shown = outcome(dump).stdout;
    assert!(text(&shown).contains("GUEST ready"), "{}", text(&shown));
    vm.signal(Signal::QUIT);
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert!(read().contains("GUEST power button"), "{}", read());
    assert_eq!(vm.console(), "", "the console is in the file");

    let mut vm = site.boot(&["--accel", "tcg"]);
    vm.run("killall head");
    vm.signal(Signal::HUP);
    vm.wait_for_log("signal 1: pressing");
    assert!(!vm.has_ended(), "{}", vm.transcript());
    vm.signal(Signal::INT);
    assert_eq!(vm.wait_exit_within(AT_ONCE).code(), Some(130));

    let mut vm = site.boot(&["--accel", "tcg"]);
    vm.signal(Signal::TERM);
    assert_eq!(vm.wait_exit().code(), Some(0));
});

tcg_test!(open_queue_and_a_device_of_the_users_are_taken, || {
    let site = Site::new();
    let mac = "02:aa:00:00:00:10";
    let (kernel, initrd) = (assets().bzimage(), initrd());
    let mut command = site.host.command(binary());
    command.args(["net", "open", &format!("wire,mac={mac}"), "--"]);
    let name = format!("qemu-attached-{}", std::process::id());
    command.arg(binary()).args(["qemu", "--name", &name]);
    command.args(["--accel", "tcg", "--macvtap", "fd=3", "--kernel"]);
    command.arg(kernel).arg("--initrd").arg(initrd);
    command.args(["--cmdline", STEADY]);
    let device = format!("virtio-net-pci,netdev=macvtap0,addr=0x9,mac={mac}");
    command
        .args(["--", "-device", &device])
        .stdin(Stdio::piped());
    let mut vm = ready(command);
    let found = vm.run("cat /sys/bus/pci/devices/0000:00:09.0/virtio*/net/eth0/address");
    assert_eq!(found.trim(), mac);
    address(&mut vm, "eth0", 11);
    assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
    let mut ps = Command::new(binary());
    ps.args(["ps", &name, "--json"]);
    let shown: Value = serde_json::from_slice(&outcome(ps).stdout).expect("it is JSON");
    assert_eq!(shown[0]["state"], "running");
    assert_eq!(shown[0]["nics"][0]["mac"], mac);
    // What another program types comes to the guest too.
    let mut console = Command::new(binary());
    console.args(["console", &name]).stdin(Stdio::piped());
    let mut console = Vm::spawn(console);
    console.send("1 poweroff -f\n");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.log());
    assert_eq!(console.wait_exit().code(), Some(0), "{}", console.log());
});

tcg_test!(what_is_served_outside_qemu_is_there_in_its_guest, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (shared, socket) = (dir.path().join("a,b"), dir.path().join("vsock"));
    fs::create_dir(&shared).expect("a directory");
    fs::write(shared.join("hello"), "of the host").expect("a file in it");
    let mut command = site.qemu(["--accel", "tcg", "--cmdline", STEADY]);
    command.arg("--kernel").arg(assets().bzimage());
    command.arg("--initrd").arg(services_initrd());
    command.args([
        "--user-net",
        "hostfwd=tcp:127.0.0.1:8080-:80,mac=02:aa:00:00:00:0f",
    ]);
    command
        .arg("--share")
        .arg(format!("{}:src", shared.display()));
    command
        .arg("--vsock")
        .arg(format!("{},cid=9", socket.display()));
    let mut vm = ready(command);

    let read =
        vm.run("mkdir -p /mnt && mount -t virtiofs src /mnt && cat /mnt/hello && echo of the guest >/mnt/made");
    assert_eq!(read.trim(), "of the host");
    let made = fs::read_to_string(shared.join("made")).expect("the guest's file");
    assert_eq!(made, "of the guest\n");

    assert_eq!(
        vm.run("cat /sys/class/net/eth0/address").trim(),
        "02:aa:00:00:00:0f"
    );
    // What passt gives where the host has no route.
    vm.run("ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0 && ip route add default via 10.0.2.2");
    vm.run("(echo of the guest | nc -l -p 80) >/dev/null 2>&1 &");
    let answer = || {
        let mut text = String::new();
        let connected = site.host.enter(|| TcpStream::connect("127.0.0.1:8080"));
        // passt of 2023 has the guest's connection wait until the client says something.
        let read = connected.and_then(|mut stream| {
            stream.write_all(b"hello\n")?;
            stream.read_to_string(&mut text)
        });
        read.is_ok() && text == "of the guest\n"
    };
    assert!(eventually(answer), "{}", vm.transcript());

    // The guest's kernel refuses the connection: no program of its listens.
    let mut stream = UnixStream::connect(&socket).expect("the socket is there");
    stream.write_all(b"CONNECT 22\n").expect("it takes bytes");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    assert_eq!(stream.read(&mut [0]).expect("it is closed"), 0);

    vm.send("9 poweroff -f\n");
    assert_eq!(vm.wait_exit().code(), Some(0));
    assert!(!socket.exists(), "the socket is removed");
});

#[test]
fn machine_of_args_has_to_share_its_memory_with_a_server() {
    let args = [
        "--share",
        "socket=/nowhere,tag=src",
        "--",
        "-M",
        "q35",
        "-m",
        "1G",
    ];
    let mut command = Command::new(binary());
    command.arg("qemu").args(args);
    let output = outcome(command);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("-object memory-backend-memfd"), "{error}");
}

#[test]
fn what_cannot_be_served_is_refused_before_qemu_starts() {
    let long = format!("/tmp/{}", "s".repeat(110));
    let share = format!("socket={long},tag=src");
    let tag = format!("/etc:{}", "t".repeat(37));
    for (args, status, words) in [
        (
            &["--share", "/no/such:src"][..],
            1,
            "cannot open the directory /no/such to share it",
        ),
        (&["--share", &share], 1, "is too long for a socket"),
        (
            &["--share", "socket=/no/such,tag=src"],
            1,
            "nothing listens on the socket",
        ),
        (
            &["--share", &tag],
            2,
            "has 37 bytes, and a share's has at most 36",
        ),
        (
            &["--share", "/etc:src", "--share", "/usr:src"],
            1,
            "two shares have the tag src",
        ),
        (&["--vsock", &long], 1, "it may have 96 bytes"),
        (&["--vsock", "/etc/passwd"], 1, "is no socket"),
        (&["--vsock", "vsock,cid=2"], 2, "cid=2 is the host"),
        (
            &["--user-net", "hostfwd=sctp::1-:1"],
            2,
            "there are tcp and udp",
        ),
        (
            &["--user-net", "rx-rate=1Mbit"],
            2,
            "for NICs of the native monitor",
        ),
        (&["--user-net", "--user-net"], 1, "give one of them others"),
    ] {
        let mut command = Command::new(binary());
        command
            .args(["-q", "qemu", "--accel", "tcg", "--kernel", "/dev/null"])
            .args(args);
        let output = outcome(command);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {error}");
        assert!(error.contains(words), "{args:?}: {error}");
    }
}
