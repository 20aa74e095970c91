//! Disks of a Linux guest: what its kernel sees of them, errors of the host, kills in the middle of
//! writing.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;
mod lab;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::assets::assets;
use harness::disk::{Tmpfs, copy_sparse, debugfs, make_ext4, qemu_img, replay_and_check_ext4, run};
use harness::eventually;
use harness::initramfs::find;
use harness::lab_test;
use harness::linux::{boot, small_initrd};
use harness::vm::Vm;
use rustix::process::Signal;
use tempfile::TempDir;
use vmm::Guest;
use vmm::config::{Config, ConsoleTarget};

const MIB: u64 = 1 << 20;

/// Boots a guest with these disks.
fn boot_with(disks: &[String], more: &[&str]) -> Vm {
    let mut args = more.to_vec();
    args.extend(disks.iter().flat_map(|disk| ["--disk", disk]));
    boot(None, &args)
}

/// A raw image without any data.
fn raw(dir: &TempDir, name: &str, mib: u64) -> PathBuf {
    let path = dir.path().join(name);
    File::create(&path).unwrap().set_len(mib * MIB).unwrap();
    path
}

/// How much of the host's disk a file takes.
fn taken(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

fn power_off(mut vm: Vm) {
    vm.start_command("poweroff -f");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
}

lab_test!(stock_kernel_sees_all_of_a_disk, || {
    let dir = TempDir::new().unwrap();
    let disk = dir.path().join("disk.raw");
    make_ext4(&disk, 64);
    let second = raw(&dir, "second.raw", 1);
    let first = format!("{},serial=a-serial-of-20-chars,queues=2", disk.display());
    let second = format!("{},readonly=on", second.display());
    let mut vm = boot_with(&[first, second], &["--cpus", "2"]);
    let mut shows = |file: &str| vm.run(&format!("cat /sys/block/{file}")).trim().to_owned();
    assert_eq!(shows("vda/serial"), "a-serial-of-20-chars");
    assert_eq!(shows("vda/size"), (64 * MIB / 512).to_string());
    assert_eq!(shows("vda/ro"), "0");
    assert_eq!(shows("vdb/ro"), "1");
    assert_eq!(shows("vdb/size"), (MIB / 512).to_string());
    assert_ne!(shows("vda/queue/discard_max_bytes"), "0");
    assert_ne!(shows("vda/queue/write_zeroes_max_bytes"), "0");
    assert_eq!(vm.run("ls /sys/block/vda/mq").split_whitespace().count(), 2);
    assert_ne!(vm.try_run("dd if=/dev/zero of=/dev/vdb count=1").status, 0);

    // Writes pass in both of the guest's cache modes, which it chooses.
    vm.run("mkdir /mnt && mount /dev/vda /mnt");
    for mode in ["write through", "write back"] {
        let set = format!("echo {mode} >/sys/block/vda/cache_type");
        assert_eq!(
            vm.run(&format!("{set}; cat /sys/block/vda/cache_type")),
            format!("{mode}\n")
        );
        vm.run("dd if=/dev/urandom of=/mnt/file bs=1M count=32 conv=fsync 2>/dev/null");
        vm.run("md5sum /mnt/file >/tmp/sum; echo 3 >/proc/sys/vm/drop_caches; md5sum -c /tmp/sum");
    }

    // What the guest no longer needs is the host's again.
    let full = taken(&disk);
    vm.run("rm /mnt/file; sync; fstrim /mnt");
    assert!(
        taken(&disk) + 30 * MIB < full,
        "{full} and then {}",
        taken(&disk)
    );
    vm.run("umount /mnt");
    power_off(vm);
});

lab_test!(stock_kernel_sees_its_disk_grow, || {
    let dir = TempDir::new().unwrap();
    let console = dir.path().join("console");
    let mut config = Config::new(assets().bzimage());
    config.initrd = Some(small_initrd());
    config.cmdline = "ignore_loglevel".into();
    config.console = ConsoleTarget::File(console.clone());
    let disk = raw(&dir, "disk.raw", 1).display().to_string();
    config.disks.push(disk.parse().unwrap());
    let guest = Guest::start(config).unwrap();
    let shown = || String::from_utf8_lossy(&fs::read(&console).unwrap()).into_owned();
    assert!(
        eventually(|| shown().contains("GUEST ready")),
        "{}",
        shown()
    );
    guest.resize_disk(0, 3 * MIB).unwrap();
    let grown = format!("[vda] new size: {} 512-byte logical blocks", 3 * MIB / 512);
    assert!(eventually(|| shown().contains(&grown)), "{}", shown());
    assert_eq!(fs::metadata(disk).unwrap().len(), 3 * MIB);
});

/// A disk of 64 MiB whose second MiB fails, by the device mapper.
struct Failing {
    name: String,
    node: PathBuf,
    below: String,
}

impl Failing {
    fn new(dir: &TempDir) -> Self {
        let file = raw(dir, "below.raw", 64);
        let below = run(Command::new("losetup").arg("-f"));
        let below = String::from_utf8(below.stdout).unwrap().trim().to_owned();
        run(Command::new("losetup").arg(&below).arg(file));
        let name = format!("minivmm-test-{}", std::process::id());
        let table = dir.path().join("table");
        let targets =
            format!("0 2048 linear {below} 0\n2048 2048 error\n4096 126976 linear {below} 4096\n");
        fs::write(&table, targets).unwrap();
        let failing = Self {
            node: Path::new("/dev/mapper").join(&name),
            name,
            below,
        };
        run(failing.dmsetup("create").arg(table));
        failing
    }

    fn dmsetup(&self, what: &str) -> Command {
        let mut command = Command::new(find("dmsetup", "dmsetup"));
        // Nobody but dmsetup makes the node here.
        command.env("DM_DISABLE_UDEV", "1").args([what, &self.name]);
        command
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        // A failure here must not hide the test's own.
        let _ = self.dmsetup("remove").output();
        let _ = Command::new("losetup").args(["-d", &self.below]).output();
    }
}

lab_test!(failing_part_of_a_disk_is_the_guests_io_error, || {
    let dir = TempDir::new().unwrap();
    let failing = Failing::new(&dir);
    for options in ["io=threads", "io=uring,direct=on"] {
        let disk = format!("{},{options}", failing.node.display());
        let mut vm = boot_with(&[disk], &[]);
        vm.run("dd if=/dev/urandom of=/tmp/data bs=64k count=1");
        let write = "dd if=/tmp/data of=/dev/vda bs=64k conv=fsync seek";
        let read = "dd if=/dev/vda bs=64k count=1 skip";
        // What a cached write has left in the host's memory can be read even there.
        for command in [format!("{read}=20"), format!("{write}=20")] {
            let output = vm.try_run(&command);
            assert_ne!(output.status, 0, "{options}, {command}: {}", output.text);
        }
        for at in [4, 1000] {
            vm.run(&format!("{write}={at} && {read}={at} | cmp - /tmp/data"));
        }
        power_off(vm);
    }
});

lab_test!(full_host_is_an_error_until_there_is_room_again, || {
    for format in ["raw", "qcow2"] {
        let tmpfs = Tmpfs::new(8);
        let disk = tmpfs.path().join(format!("disk.{format}"));
        qemu_img(&["create", "-q", "-f", format], &[&disk, Path::new("64M")]);
        let mut vm = boot_with(&[disk.display().to_string()], &[]);
        vm.run("dd if=/dev/urandom of=/tmp/data bs=1M count=16");
        let write = "dd if=/tmp/data of=/dev/vda bs=1M conv=fsync";
        let full = vm.try_run(write);
        assert_ne!(full.status, 0, "{format}: {}", full.text);
        tmpfs.mount("remount,size=64m");
        vm.run(write);
        vm.run("echo 3 >/proc/sys/vm/drop_caches; cmp -n 16777216 /tmp/data /dev/vda");
        power_off(vm);
    }
});

/// How many guests are killed: a sample, or so many.
fn kills() -> usize {
    let kills = std::env::var("MINIVMM_KILLS");
    kills.map_or(2, |n| n.parse().expect("MINIVMM_KILLS is a number"))
}

/// The disks of each, by their letters in the guest, and their formats in turn.
const LETTERS: [char; 8] = ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'];
const FORMATS: [&str; 2] = ["raw", "qcow2"];

lab_test!(killed_guest_leaves_whole_disks_and_what_it_flushed, || {
    let dir = TempDir::new().unwrap();
    let empty = dir.path().join("empty");
    make_ext4(&empty, 32);
    let formats = FORMATS.iter().cycle();
    let disks = LETTERS.iter().zip(formats).map(|(letter, format)| {
        let disk = dir.path().join(format!("{letter}.{format}"));
        qemu_img(&["convert", "-O", format], &[&empty, &disk]);
        disk
    });
    let disks: Vec<PathBuf> = disks.collect();
    let mut files = 0;
    for round in 0..kills() {
        let console = write_until_killed(&disks, round);
        for (letter, disk) in LETTERS.iter().zip(&disks) {
            let begin = format!("GUEST file {letter} ");
            let lines = console.split_inclusive('\n');
            // The last line may have lost its end.
            let flushed = lines.filter_map(|line| line.strip_prefix(&begin)?.strip_suffix('\n'));
            files += examine(&dir, disk, flushed.collect());
        }
        // The lab is given up when it says nothing.
        println!("kill {}: {files} files so far", round + 1);
    }
});

/// Boots a guest that writes to all disks at once, and kills minivmm meanwhile. Returns what the
/// guest has said: of each file that it has flushed the disk's letter, a sum and the name.
fn write_until_killed(disks: &[PathBuf], round: usize) -> String {
    let disks: Vec<_> = disks
        .iter()
        .map(|disk| disk.display().to_string())
        .collect();
    let mut vm = boot_with(&disks, &["--cpus", "2", "--memory", "256M"]);
    // Files of 16 to 208 KiB; those of the guest before are removed, and discarded.
    let script = "write() { mkdir /$1 && mount -o discard /dev/vd$1 /$1 && cd /$1 && \
        rm -rf files && mkdir files && cd files && i=0; \
        while dd if=/dev/urandom of=$i bs=16k count=$((i % 13 + 1)) conv=fsync 2>/dev/null; \
        do echo GUEST file $1 $(md5sum $i); i=$((i + 1)); done; }";
    let letters = LETTERS.map(String::from).join(" ");
    vm.start_command(&format!(
        "{script}; for disk in {letters}; do write $disk & done; wait"
    ));
    // All are in the middle of later ones.
    let letter = LETTERS[round % LETTERS.len()];
    for _ in 0..2 + round * 5 % 7 {
        vm.wait_for(&format!("GUEST file {letter} "));
    }
    vm.signal(Signal::KILL);
    vm.wait_exit();
    vm.console()
}

/// Fails unless an image and the file system on it are whole, with these files ("sum name").
/// Returns how many those are.
fn examine(dir: &TempDir, disk: &Path, flushed: Vec<&str>) -> usize {
    let found = dir.path().join("found");
    if disk.extension().is_some_and(|format| format == "qcow2") {
        // What is allocated and not used yet is no damage: status 3.
        let mut check = Command::new(find("qemu-img", "qemu-utils"));
        let output = check.arg("check").arg(disk).output().unwrap();
        let is_whole = [Some(0), Some(3)].contains(&output.status.code());
        assert!(is_whole, "{output:?}");
        qemu_img(&["convert", "-O", "raw"], &[disk, &found]);
    } else {
        copy_sparse(disk, &found).unwrap();
    }
    let image = found.display().to_string();
    replay_and_check_ext4(&image);
    if flushed.is_empty() {
        return 0;
    }
    debugfs(&image, &format!("rdump /files {}", dir.path().display()));
    let sums = flushed.iter().map(|line| line.replace(' ', "  ") + "\n");
    fs::write(dir.path().join("sums"), sums.collect::<String>()).unwrap();
    let files = dir.path().join("files");
    run(Command::new("md5sum")
        .args(["-c", "../sums"])
        .current_dir(&files));
    fs::remove_dir_all(files).unwrap();
    flushed.len()
}
