//! Disk images and the file systems on them: made, copied and examined.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

use super::initramfs::find;

/// Copies a disk, its holes left out.
pub fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let (mut from, mut copy) = (File::open(from)?, File::create(to)?);
    let mut buffer = vec![0; 64 << 10];
    copy.set_len(from.metadata()?.len())?;
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        match buffer[..count].iter().all(|byte| *byte == 0) {
            true => drop(copy.seek(SeekFrom::Current(count as i64))?),
            false => copy.write_all(&buffer[..count])?,
        }
    }
}

/// Makes an ext4 in a new raw image of so many MiB.
pub fn make_ext4(path: &Path, mib: u64) {
    let mut command = Command::new(find("mke2fs", "e2fsprogs"));
    command.args(["-q", "-F", "-t", "ext4"]).arg(path);
    run(command.arg(format!("{mib}M")));
}

/// Fails unless `e2fsck` finds the file system whole. It is named as in `disk.raw?offset=BYTES`.
#[track_caller]
pub fn check_ext4(image: &str) {
    e2fsck("-fn", image, &[0]);
}

/// The same for one whose guest was killed, and whose journal is replayed first.
#[track_caller]
pub fn replay_and_check_ext4(image: &str) {
    // It replays the journal, and then looks at nothing that is marked as clean: status 1 says that
    // there was one.
    e2fsck("-p", image, &[0, 1]);
    check_ext4(image);
}

#[track_caller]
fn e2fsck(how: &str, image: &str, statuses: &[i32]) {
    let mut command = Command::new(find("e2fsck", "e2fsprogs"));
    let output = command.args([how, image]).output().expect("e2fsck starts");
    let status = output.status.code().unwrap_or(-1);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(statuses.contains(&status), "e2fsck {how}: {status}\n{text}");
}

/// What `debugfs` shows of an ext4.
pub fn debugfs(image: &str, request: &str) -> String {
    let mut command = Command::new(find("debugfs", "e2fsprogs"));
    let output = run(command.args(["-R", request, image]));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs qemu-img to a successful end.
#[track_caller]
pub fn qemu_img(args: &[&str], files: &[&Path]) {
    run(Command::new(find("qemu-img", "qemu-utils"))
        .args(args)
        .args(files));
}

/// Runs a command to a successful end.
#[track_caller]
pub fn run(command: &mut Command) -> Output {
    let output = command.output();
    let output = output.unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
    let texts = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    let status = output.status;
    assert!(
        status.success(),
        "{command:?}: {status}\n{}",
        texts.concat()
    );
    output
}

/// A file system in memory.
#[derive(Debug)]
pub struct Tmpfs(TempDir);

impl Tmpfs {
    /// One with so much room.
    pub fn new(mib: u64) -> Self {
        let tmpfs = Self(TempDir::new().expect("a temporary directory can be made"));
        tmpfs.mount(&format!("size={mib}m"));
        tmpfs
    }

    /// Mounts it, or changes it.
    pub fn mount(&self, options: &str) {
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(self.path()));
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // A failure here must not hide the test's own.
        let _ = Command::new("umount").arg(self.path()).output();
    }
}
