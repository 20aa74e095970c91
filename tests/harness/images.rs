//! Disk images of tests, and what the freestanding guest leaves on them.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::elf::elf;
use super::guest::Transport;
use super::vm::{Vm, binary};

/// What sectors are counted by.
pub const SECTOR: u64 = 512;
/// The size of images, large enough for `guest.mode=disk`.
pub const SIZE: u64 = 64 << 20;
/// The seed of what the guest writes by the crate `virtio-drivers`.
pub const BY_CRATE: u64 = 1;

/// A directory of a test's with images in it.
#[derive(Debug)]
pub struct Images(TempDir);

impl Images {
    /// An empty one on a disk: file systems in memory differ.
    pub fn new() -> Self {
        Self::inside(env!("CARGO_TARGET_TMPDIR"))
    }

    /// One in memory, where a flush costs no time.
    pub fn in_memory() -> Self {
        Self::inside("/dev/shm")
    }

    fn inside(directory: &str) -> Self {
        let directory = tempfile::tempdir_in(directory);
        Self(directory.expect("a directory"))
    }

    /// Where the image with this name is, or would be.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A raw image without any content.
    pub fn raw(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).expect("an image");
        file.set_len(SIZE).expect("a sparse file");
        path
    }

    /// A raw image, each sector of which has the pattern with this seed.
    pub fn filled(&self, name: &str, seed: u64) -> PathBuf {
        let path = self.path(name);
        let sectors = (0..SIZE / SECTOR).flat_map(|sector| pattern(seed, sector));
        fs::write(&path, sectors.collect::<Vec<u8>>()).expect("an image");
        path
    }

    /// A qcow2 image, with a raw backing file if there is to be one.
    pub fn qcow2(&self, name: &str, backing: Option<&Path>) -> PathBuf {
        let path = self.path(name);
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2"]);
        if let Some(backing) = backing {
            create.args(["-F", "raw", "-b"]).arg(backing);
        }
        create.arg(&path).arg(SIZE.to_string());
        run(create);
        path
    }

    /// The content of a qcow2 image, which must be in order, as a raw file.
    pub fn unpack(&self, image: &Path) -> File {
        self.unpack_if(image, &[0])
    }

    /// The same after a SIGKILL, which may have left clusters that nothing uses.
    pub fn unpack_killed(&self, image: &Path) -> File {
        const LEAKS: i32 = 3;
        self.unpack_if(image, &[0, LEAKS])
    }

    fn unpack_if(&self, image: &Path, expected: &[i32]) -> File {
        let mut check = Command::new("qemu-img");
        check.args(["check", "-f", "qcow2"]).arg(image);
        let check = check.output().expect("qemu-img starts");
        let status = check.status.code().unwrap_or(-1);
        assert!(expected.contains(&status), "{check:?}");
        let raw = image.with_extension("unpacked");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "qcow2", "-O", "raw"]);
        convert.arg(image).arg(&raw);
        run(convert);
        File::open(raw).expect("an image")
    }
}

fn run(mut command: Command) {
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
}

/// The command that starts the freestanding guest with these disks and no NIC; its own options come
/// without their `guest.`.
pub fn command(transport: Transport, disks: &[String], options: &str) -> Command {
    let words = options.split_whitespace();
    let line: String = words.map(|word| format!("guest.{word} ")).collect();
    let mut command = Command::new(binary());
    command.arg("--kernel").arg(elf()).stdin(Stdio::null());
    command.args(["--memory", "128M", "--transport", transport.name()]);
    command.args(["--cmdline", &line]).env_remove("RUST_LOG");
    disks.iter().for_each(|disk| {
        command.args(["--disk", disk]);
    });
    command
}

/// Starts it.
pub fn start(transport: Transport, disks: &[String], options: &str) -> Vm {
    Vm::spawn(command(transport, disks, options))
}

/// What a sector is filled with (`tests/guest/src/disk/mod.rs`).
pub fn pattern(seed: u64, sector: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    for (place, word) in (0..).zip(bytes.chunks_exact_mut(8)) {
        let value: u64 = seed << 40 | sector << 8 | place;
        word.copy_from_slice(&value.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    bytes
}

/// A sector of a raw image.
pub fn sector(image: &File, number: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    let read = image.read_exact_at(&mut bytes, number * SECTOR);
    read.unwrap_or_else(|e| panic!("sector {number}: {e}"));
    bytes
}

/// How many bytes the host's file system keeps for a file.
pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).expect("an image").blocks() * 512
}

/// The numbered blocks that `guest.mode=disk-journal` has written up to `last`: all of them must be
/// there, or later ones at the same place.
pub fn assert_journal(image: &File, last: u64) {
    const SECTORS: u64 = 8;
    const STRIDE: u64 = 37;
    let blocks = SIZE / SECTOR / SECTORS;
    for number in (1..=last).rev().take(blocks as usize) {
        let block = number * STRIDE % blocks;
        for place in block * SECTORS..(block + 1) * SECTORS {
            let found = sector(image, place);
            let [a, b, c, d, e, f, g, h, rest @ ..] = found;
            let written = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            assert!(
                written >= number && written * STRIDE % blocks == block,
                "block {number} of {last} is flushed, but sector {place} is of block {written}"
            );
            assert!(
                rest == pattern(written, place)[8..],
                "sector {place} of block {written} has other data"
            );
        }
    }
}
