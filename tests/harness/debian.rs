//! A Debian on a disk, made once by `resources/debian-image` and kept in the cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::assets::{cache_dir, lock};

/// What makes it. The cache has a copy, which says what it was made by.
const RECIPE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/debian-image");
const RECIPE_TEXT: &[u8] = include_bytes!("../../resources/debian-image");

/// The directory's name in the cache.
pub const NAME: &str = "debian";
/// What is in it.
pub const FILES: [&str; 5] = ["recipe", "vmlinuz", "initrd.img", "disk.raw", "ssh-key"];
/// Where the file system of its one partition begins.
const PARTITION: u64 = 1 << 20;

/// A kernel, its initrd, and the disk that both were installed on.
#[derive(Clone, Debug)]
pub struct Debian {
    dir: PathBuf,
}

/// The Debian of this machine's release, made when the cache has none; panics when it cannot be.
pub fn debian() -> &'static Debian {
    static DEBIAN: OnceLock<Debian> = OnceLock::new();
    DEBIAN.get_or_init(|| {
        let dir = cache_dir().join(NAME);
        if !is_current(&dir) {
            let _lock = lock("debian.lock");
            if !is_current(&dir) {
                make(&dir);
            }
        }
        Debian { dir }
    })
}

fn is_current(dir: &Path) -> bool {
    fs::read(dir.join("recipe")).is_ok_and(|recipe| recipe == RECIPE_TEXT)
}

fn make(dir: &Path) {
    let temp = tempfile::tempdir_in(cache_dir()).expect("the cache can be written");
    let made = temp.path().join(NAME);
    let output = Command::new(RECIPE).arg(&made).output();
    let output = output.unwrap_or_else(|e| panic!("cannot run {RECIPE}: {e}"));
    let why = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "no Debian for tests: {why}");
    fs::write(made.join("recipe"), RECIPE_TEXT).expect("the cache can be written");
    if dir.exists() {
        // It goes with the temporary directory.
        fs::rename(dir, temp.path().join("old")).expect("the cache can be written");
    }
    // Whoever sees the directory sees all of it.
    fs::rename(&made, dir).expect("the cache can be written");
}

impl Debian {
    /// One of [`FILES`].
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The kernel that is installed on the disk.
    pub fn kernel(&self) -> PathBuf {
        self.file("vmlinuz")
    }

    /// The initrd that its initramfs-tools made.
    pub fn initrd(&self) -> PathBuf {
        self.file("initrd.img")
    }

    /// The private key that root's ssh takes.
    pub fn ssh_key(&self) -> PathBuf {
        self.file("ssh-key")
    }

    /// The disk, raw. It stays as it is: what a guest may write is a copy, or has it as backing file.
    pub fn disk(&self) -> PathBuf {
        self.file("disk.raw")
    }
}

/// What e2fsprogs call the file system in the partition of a raw disk.
pub fn partition(disk: &Path) -> String {
    format!("{}?offset={PARTITION}", disk.display())
}
