//! Machines that QEMU alone can be: with disks, firmware, a screen, USB.

use super::*;

/// UEFI's code, and a copy of its variables, which the guest writes. Newer packages have the larger
/// ones alone.
fn firmware(dir: &Path) -> (PathBuf, PathBuf) {
    let file =
        |name: &str, size: &str| PathBuf::from(format!("/usr/share/OVMF/OVMF_{name}{size}.fd"));
    let size = ["_4M", ""]
        .into_iter()
        .find(|size| file("CODE", size).exists());
    let size = size.expect("the package ovmf is installed");
    let path = dir.join("vars.fd");
    fs::copy(file("VARS", size), &path).expect("the package ovmf is installed");
    (file("CODE", size), path)
}

tcg_test!(classic_command_works_with_macvtap_lines_replaced, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| dir.path().join(name).display().to_string();
    let disk = at("disk.qcow2");
    let mut image = Command::new("qemu-img");
    let made = image.args(["create", "-q", "-f", "qcow2", &disk, "64M"]);
    assert!(made.status().expect("qemu-img is there").success());
    let (code, vars) = firmware(dir.path());
    // Of the original, -enable-kvm and -cpu host are what the translator cannot do.
    let args = format!(
        "--macvtap wire,bus=pcie.0,addr=0x4,id=nic2,mac=02:aa:00:00:00:0e -- \
         -M q35 -accel tcg -cpu max -smp 2 -m 512M -nodefaults \
         -drive if=pflash,format=raw,readonly=on,file={} -drive if=pflash,format=raw,file={} \
         -serial mon:stdio -chardev socket,id=qmp,path={},server=on,wait=off -mon chardev=qmp,mode=control \
         -netdev user,id=net0,hostfwd=tcp:127.0.0.1:2222-:22 \
         -device virtio-net-pci,netdev=net0,bus=pcie.0,addr=0x3,mac=52:54:00:00:00:01,romfile= \
         -device virtio-scsi-pci,id=scsi0 -drive if=none,id=hd,format=qcow2,file={disk} \
         -device scsi-hd,drive=hd,bus=scsi0.0 -device virtio-gpu-pci -display vnc=unix:{} \
         -device qemu-xhci -device usb-tablet \
         -kernel {} -initrd {}",
        code.display(),
        vars.display(),
        at("qmp"),
        at("vnc"),
        assets().bzimage().display(),
        initrd().display(),
    );
    let append = format!("console=ttyS0 {STEADY}");
    let args = args.split_whitespace().chain(["-append", &append]);
    let mut vm = ready(site.qemu(args));

    // Each NIC is where it was put.
    for (slot, mac) in [("3", "52:54:00:00:00:01"), ("4", "02:aa:00:00:00:0e")] {
        let found = vm.run(&format!(
            "cat /sys/bus/pci/devices/0000:00:0{slot}.0/virtio*/net/*/address"
        ));
        assert_eq!(found.trim(), mac);
    }
    let ids = vm.run("cat /sys/bus/pci/devices/*/device");
    for (id, what) in [
        ("0x1048", "virtio-scsi"),
        ("0x1050", "virtio-gpu"),
        ("0x000d", "xHCI"),
    ] {
        // A disk controller on an ordinary PCI slot is transitional, with the older id.
        let found = ids.contains(id) || (id == "0x1048" && ids.contains("0x1004"));
        assert!(found, "{what} in {ids}");
    }
    vm.run("[ -d /sys/firmware/efi ] || dmesg | grep -q 'efi: EFI v'");
    let name = |vm: &mut Vm, slot: &str| {
        let list = format!("ls /sys/bus/pci/devices/0000:00:0{slot}.0/virtio*/net");
        vm.run(&list).trim().to_owned()
    };
    let (user, macvtap) = (name(&mut vm, "3"), name(&mut vm, "4"));

    // The macvtap, and user networking with its forwarded port on the host's loopback.
    address(&mut vm, &macvtap, 11);
    assert!(pings(&mut vm, "192.168.77.3"), "{}", vm.transcript());
    vm.run(&format!(
        "ip link set {user} up && ip addr add 10.0.2.15/24 dev {user}"
    ));
    vm.run("(while :; do echo hello from the guest | nc -l -p 22; done) >/dev/null 2>&1 &");
    let greeting = || {
        site.host.enter(|| {
            let mut stream = TcpStream::connect("127.0.0.1:2222").ok()?;
            stream.set_read_timeout(Some(5 * SECOND)).ok()?;
            let mut text = String::new();
            stream.write_all(b"\n").ok()?;
            stream.read_to_string(&mut text).ok()?;
            Some(text)
        })
    };
    assert!(
        eventually(|| { greeting().is_some_and(|text| text.contains("hello from the guest")) }),
        "the forwarded port does not answer"
    );

    // The screen is shown: VNC's server greets with its version (RFC 6143, 7.1.1).
    let mut screen = UnixStream::connect(at("vnc")).expect("QEMU listens");
    screen.set_read_timeout(Some(PATIENCE)).expect("no zero");
    let mut banner = [0; 12];
    screen.read_exact(&mut banner).expect("the server greets");
    assert!(banner.starts_with(b"RFB 003."), "{banner:?}");

    let answer = qmp(
        &site.host,
        &at("qmp"),
        &["query-status", "query-block", "quit"],
    );
    assert!(answer.contains("running"), "{answer}");
    assert!(answer.contains("qcow2"), "{answer}");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
    assert!(site.mac_is_free("02:aa:00:00:00:0e"));
});

/// Sends commands by the client of PyPI; its answers as text.
fn qmp(netns: &Netns, socket: &str, commands: &[&str]) -> String {
    const CLIENT: &str = "
import asyncio, sys
from qemu.qmp import QMPClient
async def main():
    client = QMPClient('test')
    await client.connect(sys.argv[1])
    for command in sys.argv[2:]:
        print(command, await client.execute(command))
    try:
        await client.disconnect()
    except (EOFError, ConnectionError):
        pass # after a quit QEMU may be gone first
asyncio.run(main())
";
    let mut python = netns.command("python3");
    python
        .env("PYTHONPATH", harness::qmp::library())
        .args(["-c", CLIENT, socket]);
    let output = python.args(commands).output().expect("python3 starts");
    let answers = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{answers}");
    answers
}

tcg_test!(uefi_firmware_reaches_its_shell_with_the_macvtap_nic, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    // The firmware first tries what has a boot index, and then its shell: no network boot, which
    // takes minutes to fail.
    let (code, vars) = firmware(dir.path());
    let disk = dir.path().join("empty");
    fs::write(&disk, vec![0; 1 << 20]).expect("a file in the temporary directory");
    let args = format!(
        "--macvtap wire,mac=02:aa:00:00:00:0f,romfile= -- -M q35 -accel tcg -m 256M -nodefaults -display none \
         -drive if=pflash,format=raw,readonly=on,file={} -drive if=pflash,format=raw,file={} \
         -drive if=none,id=empty,format=raw,file={} -device virtio-blk-pci,drive=empty,bootindex=1 -serial stdio",
        code.display(),
        vars.display(),
        disk.display(),
    );
    let mut vm = Vm::spawn(site.qemu(args.split_whitespace()));
    vm.wait_for("Shell>");
    vm.send("connect -r\r");
    vm.wait_for("Shell>");
    vm.send("ifconfig -l\r");
    vm.wait_for("02:AA:00:00:00:0F");
    vm.send("reset -s\r");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
});

/// A disk's first sector: reads the second by the BIOS and writes its text to the first serial
/// port.
const BOOT_SECTOR: &[u8] = &[
    0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, // ds and es are 0
    0xbb, 0x00, 0x7e, 0xb8, 0x01, 0x02, // to 0x7e00, read one sector,
    0xb9, 0x02, 0x00, 0xb6, 0x00, 0xcd, 0x13, // the second of cylinder and head 0
    0xbe, 0x00, 0x7e, // from 0x7e00 on
    0xac, 0x84, 0xc0, 0x74, 0x06, // a byte, until it is 0,
    0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf5, // to port 0x3f8
    0xf4, 0xeb, 0xfd, // and halt
];

tcg_test!(guest_boots_from_its_qcow2_disk, || {
    let site = Site::new();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| dir.path().join(name).display().to_string();
    let mut sectors = vec![0; 1 << 20];
    sectors[..BOOT_SECTOR.len()].copy_from_slice(BOOT_SECTOR);
    sectors[510..512].copy_from_slice(&[0x55, 0xaa]);
    let words = b"read from the qcow2 disk\n";
    sectors[512..512 + words.len()].copy_from_slice(words);
    fs::write(at("raw"), sectors).expect("a file in the temporary directory");
    let mut image = Command::new("qemu-img");
    image.args([
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        &at("raw"),
        &at("qcow2"),
    ]);
    assert!(image.status().expect("qemu-img is there").success());
    let args = format!(
        "--macvtap wire,romfile= -- -M q35 -accel tcg -m 64M -nodefaults -display none -serial stdio \
         -device virtio-scsi-pci -drive if=none,id=hd,format=qcow2,file={} -device scsi-hd,drive=hd,bootindex=0",
        at("qcow2"),
    );
    let mut vm = Vm::spawn(site.qemu(args.split_whitespace()));
    vm.wait_for("read from the qcow2 disk");
    vm.signal(Signal::TERM);
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.log());
});
