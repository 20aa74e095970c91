//! Disks, by the freestanding guest: what a guest can do with one, what reaches the image, and what
//! is still there when the monitor is killed.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::elf::elf;
use harness::eventually;
use harness::guest::Transport::{self, Mmio, Pci};
use harness::guest::succeed;
use harness::images::{
    BY_CRATE, Images, SECTOR, SIZE, allocated, assert_journal, command, pattern, sector, start,
};
use harness::vm::Vm;
use harness::{guest_test, kvm_test};
use rustix::process::Signal;
use vmm::config::{Config, ConsoleTarget};
use vmm::{Exit, Guest};

/// What the guest tries of every disk that it can write.
const CHECKS: [&str; 11] = [
    "identity",
    "queues",
    "pieces",
    "beyond",
    "unknown",
    "interrupt",
    "discard",
    "zeroes",
    "ranges",
    "cache",
    "crate",
];

/// Has a guest do all that a disk can do; returns its console.
#[track_caller]
fn check(transport: Transport, path: &Path, keys: &str) -> String {
    let disk = format!("{},serial=a-b.c,{keys}", path.display());
    let console = succeed(start(transport, &[disk], "mode=disk"));
    for name in CHECKS {
        assert!(console.contains(&format!("OK {name}")), "{console}");
    }
    assert!(console.contains("SERIAL a-b.c\n"), "{console}");
    console
}

/// The sectors that the guest writes last are there, and no other.
#[track_caller]
fn assert_written(image: &File, before: impl Fn(u64) -> [u8; SECTOR as usize]) {
    let last = SIZE / SECTOR - 1;
    for number in [0, SIZE / SECTOR / 2, last] {
        assert!(
            sector(image, number) == pattern(BY_CRATE, number),
            "{number}"
        );
    }
    for number in [SIZE / SECTOR / 2 - 1, last - 1] {
        assert!(sector(image, number) == before(number), "{number}");
    }
}

/// Of 13 MiB that were written, 8 were discarded or zeroed.
#[track_caller]
fn assert_holes(path: &Path) {
    let bytes = allocated(path);
    assert!(bytes < 8 << 20, "{bytes} bytes of {path:?} are allocated");
}

kvm_test!(raw_disk_does_all_of_virtio_blk, || {
    let images = Images::new();
    for transport in [Mmio, Pci] {
        for keys in [
            "queues=1",
            "io=uring,queues=4",
            "io=threads,queues=2",
            "direct=on,queues=2",
        ] {
            let path = images.raw("disk.img");
            let console = check(transport, &path, keys);
            let queues = keys.split("queues=").nth(1).unwrap();
            assert!(console.contains(&format!("queues={queues} ")), "{console}");
            assert_written(&File::open(&path).unwrap(), |_| [0; SECTOR as usize]);
            assert_holes(&path);
        }
    }
});

kvm_test!(qcow2_disk_does_all_of_virtio_blk, || {
    let images = Images::new();
    let base = images.filled("base.img", 5);
    let before = fs::read(&base).unwrap();
    for transport in [Mmio, Pci] {
        let alone = images.qcow2("alone.qcow2", None);
        check(transport, &alone, "queues=2");
        assert_written(&images.unpack(&alone), |_| [0; SECTOR as usize]);
        let above = images.qcow2("above.qcow2", Some(&base));
        check(transport, &above, "queues=1");
        assert_written(&images.unpack(&above), |number| pattern(5, number));
    }
    assert!(fs::read(&base).unwrap() == before, "the backing file");
});

kvm_test!(ephemeral_disk_leaves_its_image_as_it_was, || {
    let images = Images::new();
    let base = images.filled("base.img", 5);
    for path in [&base, &images.qcow2("above.qcow2", Some(&base))] {
        let before = fs::read(path).unwrap();
        check(Pci, path, "ephemeral=on");
        assert!(fs::read(path).unwrap() == before, "{path:?}");
    }
});

kvm_test!(readonly_disk_is_shared_and_refuses_writes, || {
    let images = Images::in_memory();
    let base = images.filled("base.img", 5);
    for path in [&base, &images.qcow2("above.qcow2", Some(&base))] {
        let before = fs::read(path).unwrap();
        let disk = [format!("{},readonly=on", path.display())];
        // The first goes on while the second uses the same image.
        let mut guests = [(); 2].map(|()| start(Pci, &disk, "mode=disk end=halt"));
        for guest in &mut guests {
            guest.wait_for("readonly=true ");
            guest.wait_for("END failures=0\n");
        }
        drop(guests);
        assert!(fs::read(path).unwrap() == before, "{path:?}");
    }
});

kvm_test!(guests_disks_are_in_the_order_of_the_command_line, || {
    let images = Images::in_memory();
    let disks = ["a", "b", "c"].map(|name| format!("{},serial={name}", images.raw(name).display()));
    for transport in [Mmio, Pci] {
        for (index, name) in ["a", "b", "c"].iter().enumerate() {
            let options = format!("mode=disk index={index}");
            let console = succeed(start(transport, &disks, &options));
            assert!(console.contains(&format!("SERIAL {name}\n")), "{console}");
        }
    }
});

// ---- limits ----

/// A number in the line by which the guest reports a load.
fn number(console: &str, key: &str) -> f64 {
    let line = console
        .lines()
        .find(|line| line.starts_with("OK disk-load"));
    let mut words = line
        .unwrap_or_else(|| panic!("{console}"))
        .split_whitespace();
    let value = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok());
    value.unwrap_or_else(|| panic!("no {key}: {console}"))
}

kvm_test!(limits_hold_in_the_guests_own_time, || {
    const DEPTH: f64 = 8.0;
    let images = Images::in_memory();
    let path = images.raw("disk.img");
    for (limit, key, rate, unit) in [
        ("iops=400", "requests", 400.0, 1.0),
        ("bandwidth=2M", "bytes", f64::from(2 << 20), 4096.0),
    ] {
        for op in ["read", "write"] {
            let disk = format!("{},{limit},burst=20ms", path.display());
            let options = format!("mode=disk-load depth=8 ms=500 op={op}");
            let console = succeed(start(Pci, &[disk], &options));
            let seconds = number(&console, "ns") / 1e9;
            let passed = number(&console, key);
            // A full bucket at the start, and one request that passes on its last token.
            let most = rate * (seconds + 0.02) + (DEPTH + 1.0) * unit;
            assert!(
                passed <= most,
                "{limit}: {passed} in {seconds} s\n{console}"
            );
        }
    }
});

// ---- what survives ----

/// Kills the monitor of a guest that writes numbered blocks after so many flushes; returns the last
/// block that the guest saw flushed.
fn kill_after(disk: &str, flushes: usize) -> u64 {
    let mut vm = start(Pci, &[disk.to_owned()], "mode=disk-journal count=1000000");
    for _ in 0..flushes {
        vm.wait_for("FLUSHED ");
    }
    vm.wait_for("\n");
    vm.signal(Signal::KILL);
    vm.wait_exit();
    let console = vm.console();
    let (whole, _) = console.rsplit_once('\n').unwrap();
    let mut lines = whole.lines().rev();
    let last = lines.find_map(|line| line.strip_prefix("FLUSHED "));
    last.unwrap().parse().unwrap()
}

kvm_test!(flushed_data_is_there_when_a_raw_disk_is_killed, || {
    let images = Images::in_memory();
    for (kill, io) in ["auto", "uring", "threads"]
        .iter()
        .cycle()
        .take(20)
        .enumerate()
    {
        let path = images.raw("disk.img");
        let last = kill_after(&format!("{},io={io}", path.display()), 1 + kill % 4);
        assert_journal(&File::open(&path).unwrap(), last);
    }
});

kvm_test!(flushed_data_is_there_when_a_qcow2_disk_is_killed, || {
    let images = Images::in_memory();
    let base = images.raw("base.img");
    for kill in 0..12 {
        let path = images.qcow2("disk.qcow2", (kill % 2 == 0).then_some(&base));
        let last = kill_after(&path.display().to_string(), 1 + kill % 4);
        assert_journal(&images.unpack_killed(&path), last);
    }
});

guest_test!(full_disk_of_the_host_is_an_error_and_no_end, || {
    // A small file system in a mount namespace of the monitor's own.
    let script = "mount -t tmpfs -o size=2M none \"$1\" && truncate -s 64M \"$1/disk.img\" && \
                  shift && exec \"$@\"";
    let images = Images::in_memory();
    for keys in ["", ",io=uring", ",io=threads"] {
        let place = images.path("");
        let disk = format!("{}{keys}", images.path("disk.img").display());
        let options = "mode=disk-load op=write order=sequential block=65536 ms=60000";
        let minivmm = command(Pci, &[disk], options);
        let mut unshare = Command::new("unshare");
        unshare.args(["-m", "sh", "-ec", script, "sh"]).arg(place);
        unshare.arg(minivmm.get_program()).args(minivmm.get_args());
        unshare.stdin(std::process::Stdio::null());
        let mut vm = Vm::spawn(unshare);
        // IOERR, and then OK for a read.
        vm.wait_for("ends with 1, a read after it with 0\n");
        assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
    }
});

// ---- the library ----

/// A guest that a program starts, with the path of its console.
fn start_by_library(
    images: &Images,
    transport: Transport,
    disk: &str,
    options: &str,
) -> (Guest, PathBuf) {
    let console = images.path("console");
    let mut config = Config::new(elf().to_owned());
    config.memory = "128M".parse().unwrap();
    config.console = ConsoleTarget::File(console.clone());
    config.transport = transport.name().parse().unwrap();
    config.disks = vec![disk.parse().unwrap()];
    let words = options.split_whitespace();
    config.cmdline = words.map(|word| format!("guest.{word} ")).collect();
    (Guest::start(config).unwrap(), console)
}

/// Waits until a console shows `text`; returns all of it.
fn wait_for(console: &Path, text: &str) -> String {
    let shown = || fs::read_to_string(console).unwrap_or_default();
    assert!(eventually(|| shown().contains(text)), "{}", shown());
    shown()
}

kvm_test!(pauses_in_full_traffic_lose_no_request, || {
    let images = Images::in_memory();
    for transport in [Mmio, Pci] {
        for io in ["auto", "uring", "threads"] {
            let path = images.raw("disk.img");
            let disk = format!("{},io={io}", path.display());
            let options = "mode=disk-journal count=40";
            let (guest, console) = start_by_library(&images, transport, &disk, options);
            for flushes in [32, 160, 320, 640] {
                wait_for(&console, &format!("FLUSHED {flushes}\n"));
                guest.pause().unwrap();
                let state = serde_json::to_string(&guest.save().unwrap()).unwrap();
                guest
                    .restore(serde_json::from_str(&state).unwrap())
                    .unwrap();
                guest.resume().unwrap();
            }
            assert_eq!(guest.wait().unwrap(), Exit::PowerOff);
            let shown = fs::read_to_string(&console).unwrap();
            assert!(shown.contains("OK disk-journal blocks=1280\n"), "{shown}");
            assert_journal(&File::open(&path).unwrap(), 1280);
        }
    }
});

kvm_test!(disk_that_grows_tells_its_guest, || {
    let images = Images::in_memory();
    for transport in [Mmio, Pci] {
        let path = images.raw("disk.img");
        let disk = path.display().to_string();
        let (guest, console) = start_by_library(&images, transport, &disk, "mode=disk-grow");
        wait_for(&console, "READY disk-grow");
        let smaller = guest.resize_disk(0, SIZE / 2).unwrap_err().to_string();
        assert!(smaller.contains("resize disk 0"), "{smaller}");
        assert!(guest.resize_disk(1, 2 * SIZE).is_err());
        guest.resize_disk(0, 2 * SIZE).unwrap();
        assert_eq!(guest.wait().unwrap(), Exit::PowerOff);
        let shown = fs::read_to_string(&console).unwrap();
        let line = format!("before={} now={}\n", SIZE / SECTOR, 2 * SIZE / SECTOR);
        assert!(shown.contains(&line), "{shown}");
        let image = File::open(&path).unwrap();
        let last = 2 * SIZE / SECTOR - 1;
        assert!(sector(&image, last) == pattern(1, last));
    }
});
