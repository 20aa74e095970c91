//! Mounts below the directory that must not be left out, and are covered.
//!
//! In a user namespace the kernel does not show what lies under the host's mounts, so a directory with some below it is
//! mounted with all of them. Each then gets an empty directory or file on it.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, mkdirat, openat, stat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsmount, fsopen, move_mount, open_tree, unmount,
};
use rustix::process::fchdir;

use crate::sandbox::restrict;

const DIRECTORY: &str = "directory";
const FILE: &str = "file";

/// Covers every mount below the root; `process` is this process's directory in /proc.
pub(crate) fn cover_mounts(process: impl AsFd) -> io::Result<()> {
    let mounts = mounts_below_root(process)?;
    let covers = make_covers()?;
    // It has to be mounted somewhere for parts of it to be mounted elsewhere. Paths begin below it, at the root.
    move_mount(
        &covers,
        "",
        CWD,
        "/",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    let mut covered: Vec<PathBuf> = Vec::new();
    for mount in mounts {
        if !covered.iter().any(|above| mount.starts_with(above)) {
            cover(&covers, &mount)?;
            covered.push(mount);
        }
    }
    fchdir(&covers)?;
    Ok(unmount(".", UnmountFlags::DETACH)?)
}

fn make_covers() -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    let covers = fsmount(context.as_fd(), flags, MountAttrFlags::empty())?;
    mkdirat(&covers, DIRECTORY, Mode::from_raw_mode(0o555))?;
    let flags = OFlags::CREATE | OFlags::CLOEXEC;
    openat(&covers, FILE, flags, Mode::from_raw_mode(0o444))?;
    Ok(covers)
}

fn cover(covers: &OwnedFd, mount: &Path) -> io::Result<()> {
    let name = match stat(mount) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode).is_dir() => DIRECTORY,
        Ok(_) => FILE,
        // The guest does not get there either.
        Err(Errno::ACCESS) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let cover = open_tree(covers, name, flags)?;
    restrict(cover.as_fd(), true)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(&cover, "", CWD, mount, flags)?)
}

/// Where something is mounted below the root, what is above before what is below.
fn mounts_below_root(process: impl AsFd) -> io::Result<Vec<PathBuf>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = openat(process, "mountinfo", flags, Mode::empty())?;
    let mut text = Vec::new();
    std::fs::File::from(file).read_to_end(&mut text)?;
    let lines = text.split(|byte| *byte == b'\n');
    let points = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    let mut points: Vec<_> = points.map(unescaped).collect();
    points.retain(|point| point != Path::new("/"));
    points.sort();
    points.dedup();
    Ok(points)
}

/// A path of mountinfo (proc(5)), where a backslash and three octal digits stand for a byte.
pub fn unescaped(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let [first, after @ ..] = rest {
        let digits = after.get(..3).filter(|_| *first == b'\\');
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_mountinfo_are_unescaped() {
        let path = unescaped(br"/a\040b\134c\011\012d");
        assert_eq!(path, Path::new("/a b\\c\t\nd"));
        assert_eq!(unescaped(br"/a\9\40"), Path::new(r"/a\9\40"));
    }
}
