//! The disk of each monitor's guest, by fio in the guest: a raw image in the host's page cache, read
//! and written past the guest's own.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::harness::assets::assets;
use crate::harness::initramfs;
use crate::harness::vm::Vm;

/// What fio does: `--rw`, the size of a request, how many at once, and how much in all.
const LOADS: [(&str, &str, u32, &str); 8] = [
    ("randread", "4k", 1, "4m"),
    ("randread", "4k", 32, "16m"),
    ("randwrite", "4k", 1, "4m"),
    ("randwrite", "4k", 32, "16m"),
    ("read", "1m", 1, "64m"),
    ("read", "1m", 32, "128m"),
    ("write", "1m", 1, "64m"),
    ("write", "1m", 32, "128m"),
];

/// The columns that are made of them.
pub const COLUMNS: [(&str, usize); 8] = [
    ("random read, 1, kIOPS", 1),
    ("32", 1),
    ("write, 1", 1),
    ("32", 1),
    ("sequential read, 1, MB/s", 0),
    ("32", 0),
    ("write, 1", 0),
    ("32", 0),
];

/// What the guests need.
#[derive(Debug)]
pub struct Disk {
    directory: TempDir,
}

impl Disk {
    /// An image full of data, and a ramdisk with fio.
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("there is room in /tmp");
        let disk = Self { directory };
        // Neither holes nor zeros, which a host could read and write in a shorter way.
        fs::write(disk.image(), vec![0x5a; 128 << 20]).expect("there is room in /tmp");
        let programs = [("fio", "fio")];
        let archive = initramfs::guest_with(&assets().modules(), &programs);
        fs::write(disk.initrd(), archive).expect("there is room in /tmp");
        disk
    }

    /// The image's path.
    pub fn image(&self) -> PathBuf {
        self.directory.path().join("disk.raw")
    }

    /// The ramdisk's.
    pub fn initrd(&self) -> PathBuf {
        self.directory.path().join("initrd")
    }

    /// The figures of a guest that runs.
    pub fn measure(&self, vm: &mut Vm) -> Vec<Option<f64>> {
        // The host has given the guest its memory before anything is measured.
        vm.run("dd if=/dev/zero of=/dev/null bs=200M count=1");
        let load = |(rw, size, depth, total): &(&str, &str, u32, &str)| {
            let fio = format!(
                "fio --name=load --filename=/dev/vda --direct=1 --thread --ioengine=libaio \
                 --gtod_reduce=1 --randrepeat=1 --norandommap --minimal --terse-version=3 \
                 --rw={rw} --bs={size} --iodepth={depth} --size=128m --io_size={total}"
            );
            figure(&vm.run(&fio), rw.ends_with("read"), *size == "4k")
        };
        LOADS.iter().map(load).collect()
    }
}

/// Thousands of requests a second, or MB a second, in a terse line of fio's.
fn figure(text: &str, reads: bool, counts: bool) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with("3;fio"))?;
    // HOWTO, "Terse output": KiB a second and IOPS, of reads and of writes.
    let field = match (reads, counts) {
        (true, true) => 7,
        (true, false) => 6,
        (false, true) => 48,
        (false, false) => 47,
    };
    let value: f64 = line.split(';').nth(field)?.parse().ok()?;
    Some(if counts {
        value / 1000.0
    } else {
        value * 1.024 / 1000.0
    })
}
