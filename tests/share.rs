//! The file server of `--share`, as the monitor starts it, with a client that sends whatever a guest can send (`share/`).
//!
//! - `client`: the front end of vhost-user, and its queues
//! - `fuse`: the requests
//! - `escapes`: the ways out of the directory
//! - `many`: more files than the server may have descriptors
//! - `ends`: what the server's and its monitor's ends leave
//! - this file: what a guest sees and can do

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

#[path = "share/client.rs"]
mod client;
#[path = "share/ends.rs"]
mod ends;
#[path = "share/escapes.rs"]
mod escapes;
#[path = "share/fuse.rs"]
mod fuse;
mod harness;
#[path = "share/many.rs"]
mod many;

use std::fs::{self, File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use client::{Guest, HIPRIO, REQUESTS};
use fuse::*;
use harness::netns::{self, root_test};
use harness::vm;

const SIZE: u32 = 1 << 3;
const UID_GID: u32 = 1 << 1 | 1 << 2;

/// A user who is neither root nor nobody.
const USER: u32 = 12345;

fn directory() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// A guest that has mounted the directory.
fn mounted(directory: &TempDir) -> Guest {
    Guest::new(directory.path(), false).mount()
}

/// A program in the directory, of this line. Another process writes it: of this one, which starts programs meanwhile, one
/// might have it open for writing when it is run.
fn script(directory: &TempDir, line: &str) -> PathBuf {
    let program = directory.path().join("minivmm.sh");
    let write = "printf '#!/bin/sh\\n%s\\n' \"$1\" >\"$0\" && chmod +x \"$0\"";
    let written = Command::new("sh")
        .args(["-c", write])
        .arg(&program)
        .arg(line)
        .status();
    assert!(written.unwrap().success());
    program
}

/// A program that runs minivmm as [`USER`], who has the directory.
fn as_user(directory: &TempDir) -> PathBuf {
    let minivmm = vm::binary().display().to_string();
    let user = be_user(directory);
    script(directory, &format!("exec setpriv {user} {minivmm} \"$@\""))
}

/// Gives the directory to [`USER`]: the options of setpriv that make a process theirs.
fn be_user(directory: &TempDir) -> String {
    chown(directory.path(), Some(USER), Some(USER)).unwrap();
    format!("--reuid={USER} --regid={USER} --clear-groups")
}

/// A program that runs minivmm with so many descriptors, which root cannot raise either.
fn limited(directory: &TempDir, descriptors: u32, options: &str) -> PathBuf {
    let minivmm = vm::binary().display().to_string();
    let options = format!("--bounding-set=-sys_resource --inh-caps=-sys_resource {options}");
    let line = format!("ulimit -n {descriptors}; exec setpriv {options} {minivmm} \"$@\"");
    script(directory, &line)
}

/// fcntl(2): the signal in place of SIGIO.
const F_SETSIG: i32 = 10;

/// Whoever else opens this file waits until it is closed here.
fn lease(path: &Path) -> File {
    let held = File::options().read(true).write(true).open(path).unwrap();
    // SAFETY: this sets which signal says that the lease is to be given up: one that is ignored by default.
    unsafe { libc::fcntl(held.as_raw_fd(), F_SETSIG, libc::SIGURG) };
    // SAFETY: this takes the lease.
    let taken = unsafe { libc::fcntl(held.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
    assert_eq!(taken, 0, "{}", std::io::Error::last_os_error());
    held
}

fn owner(path: &Path) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

root_test!(files_can_be_made_read_changed_and_removed, || {
    let directory = directory();
    fs::write(directory.path().join("theirs"), "of the host").unwrap();
    let mut guest = mounted(&directory);
    let theirs = guest.lookup(ROOT, "theirs").unwrap();
    assert_eq!(guest.read_file(theirs.node).unwrap(), "of the host");

    let (ours, handle) = guest.create(GUEST_ROOT, ROOT, "ours").unwrap();
    assert_eq!(
        guest.write(ours.node, handle, 0, b"of the guest").unwrap(),
        12
    );
    assert_eq!(guest.read(ours.node, handle, 3, 3).unwrap(), b"the");
    guest.release(ours.node, handle).unwrap();
    assert_eq!(
        fs::read(directory.path().join("ours")).unwrap(),
        b"of the guest"
    );
    guest.setattr(ours.node, SIZE, 2, [0; 3]).unwrap();
    assert_eq!(guest.getattr(ours.node).unwrap().size, 2);

    let below = guest.mkdir(ROOT, "below").unwrap();
    guest.rename((ROOT, "ours"), (below.node, "moved")).unwrap();
    guest.link(theirs.node, below.node, "again").unwrap();
    guest.symlink(below.node, "there", "../theirs").unwrap();
    assert_eq!(guest.list(ROOT).unwrap(), ["below", "theirs"]);
    assert_eq!(guest.list(below.node).unwrap(), ["again", "moved", "there"]);
    assert_eq!(guest.getattr(theirs.node).unwrap().links, 2);
    assert_eq!(guest.rmdir(ROOT, "below"), Err(libc::ENOTEMPTY));
    for name in ["again", "moved", "there"] {
        guest.unlink(below.node, name).unwrap();
    }
    guest.rmdir(ROOT, "below").unwrap();
    assert_eq!(guest.lookup(ROOT, "below"), Err(libc::ENOENT));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
});

root_test!(large_reads_and_writes_are_whole, || {
    let directory = directory();
    let mut guest = mounted(&directory);
    let (file, handle) = guest.create(GUEST_ROOT, ROOT, "large").unwrap();
    let bytes: Vec<u8> = (0..1 << 20).map(|at: u32| (at / 7) as u8).collect();
    assert_eq!(guest.write(file.node, handle, 5, &bytes).unwrap(), 1 << 20);
    assert!(guest.read(file.node, handle, 5, 1 << 20).unwrap() == bytes);
});

root_test!(files_of_root_s_share_keep_their_owners, || {
    let directory = directory();
    let path = directory.path().join("theirs");
    fs::write(&path, "").unwrap();
    chown(&path, Some(1), Some(2)).unwrap();
    let mut guest = mounted(&directory);
    let theirs = guest.lookup(ROOT, "theirs").unwrap();
    assert_eq!((theirs.uid, theirs.gid), (1, 2));
    guest.setattr(theirs.node, UID_GID, 0, [0, 3, 4]).unwrap();
    assert_eq!(owner(&path), (3, 4));

    fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
    let user = User { uid: 5, gid: 6 };
    let (ours, _) = guest.create(user, ROOT, "ours").unwrap();
    assert_eq!((ours.uid, ours.gid), (5, 6));
    assert_eq!(owner(&directory.path().join("ours")), (5, 6));
});

root_test!(files_of_a_user_s_share_are_that_user_s, || {
    let directory = directory();
    let program = as_user(&directory);
    let path = directory.path().join("theirs");
    fs::write(&path, "").unwrap();
    chown(&path, Some(1), Some(2)).unwrap();
    let mut guest = Guest::by(directory.path(), false, &program).mount();
    let theirs = guest.lookup(ROOT, "theirs").unwrap();
    assert_eq!((theirs.uid, theirs.gid), (65534, 65534));
    assert_eq!(guest.open(theirs.node, libc::O_RDWR), Err(libc::EACCES));
    let changed = guest.setattr(theirs.node, UID_GID, 0, [0, 3, 4]);
    assert_eq!(changed, Err(libc::EPERM));

    // Whoever makes a file in the guest, and whomever it is given to there.
    for (uid, name) in [(0, "root"), (USER, "same"), (7, "other")] {
        let (ours, _) = guest.create(User { uid, gid: uid }, ROOT, name).unwrap();
        guest.setattr(ours.node, UID_GID, 0, [0, 3, 4]).unwrap();
        let ours = guest.getattr(ours.node).unwrap();
        assert_eq!((ours.uid, ours.gid), (USER, USER));
        assert_eq!(owner(&directory.path().join(name)), (USER, USER));
    }
});

// As in a container without root's rights.
root_test!(root_of_a_user_namespace_shares_as_one_user, || {
    let directory = directory();
    let minivmm = vm::binary().display().to_string();
    let line = format!("exec unshare --user --map-root-user {minivmm} \"$@\"");
    let program = script(&directory, &line);
    let path = directory.path().join("theirs");
    fs::write(&path, "").unwrap();
    chown(&path, Some(1), Some(2)).unwrap();
    let mut guest = Guest::by(directory.path(), false, &program).mount();
    let theirs = guest.lookup(ROOT, "theirs").unwrap();
    assert_eq!((theirs.uid, theirs.gid), (65534, 65534));
    let user = User { uid: 7, gid: 7 };
    let (ours, _) = guest.create(user, ROOT, "ours").unwrap();
    assert_eq!((ours.uid, ours.gid), (0, 0));
    assert_eq!(owner(&directory.path().join("ours")), (0, 0));
});

root_test!(read_only_share_changes_nothing, || {
    let directory = directory();
    fs::write(directory.path().join("file"), "text").unwrap();
    let mut guest = Guest::new(directory.path(), true).mount();
    let file = guest.lookup(ROOT, "file").unwrap();
    assert_eq!(guest.read_file(file.node).unwrap(), "text");
    for flags in [libc::O_RDWR, libc::O_WRONLY, libc::O_RDONLY | libc::O_TRUNC] {
        assert!(guest.open(file.node, flags).is_err());
    }
    let handle = guest.open(file.node, libc::O_RDONLY).unwrap();
    assert!(guest.write(file.node, handle, 0, b"TEXT").is_err());
    let refused = Err(libc::EROFS);
    assert_eq!(guest.create(GUEST_ROOT, ROOT, "new").map(drop), refused);
    assert_eq!(guest.mkdir(ROOT, "new").map(drop), refused);
    assert_eq!(
        guest.mknod(ROOT, "new", libc::S_IFIFO | 0o600, 0).map(drop),
        refused
    );
    assert_eq!(guest.symlink(ROOT, "new", "file").map(drop), refused);
    assert_eq!(guest.link(file.node, ROOT, "new").map(drop), refused);
    assert_eq!(guest.rename((ROOT, "file"), (ROOT, "new")), refused);
    assert_eq!(guest.unlink(ROOT, "file"), refused);
    assert_eq!(guest.rmdir(ROOT, "file"), refused);
    assert_eq!(guest.setattr(file.node, SIZE, 0, [0; 3]), refused);
    assert_eq!(guest.setattr(file.node, UID_GID, 0, [0, 1, 1]), refused);
    assert_eq!(guest.list(ROOT).unwrap(), ["file"]);
    assert_eq!(fs::read(directory.path().join("file")).unwrap(), b"text");
});

root_test!(request_that_waits_for_the_host_holds_up_no_other, || {
    // Where a second request and its answer lie.
    const OTHER: (u64, u64) = (0x4000, 0x5000);
    let directory = directory();
    let path = directory.path().join("file");
    fs::write(&path, "text").unwrap();
    let mut guest = mounted(&directory);
    let file = guest.lookup(ROOT, "file").unwrap();
    let held = lease(&path);
    guest.prepare(REQUESTS, &request(OPEN, file.node, GUEST_ROOT, &[0; 8]), 32);
    let slot = guest.offer(REQUESTS, 0);
    let getattr = request(GETATTR, file.node, GUEST_ROOT, &[0; 16]);
    guest.put(REQUESTS, OTHER.0, &getattr);
    guest.describe(REQUESTS, 2, (OTHER.0, getattr.len() as u32, 1, 3));
    guest.describe(REQUESTS, 3, (OTHER.1, 120, 2, 0));
    for n in 0..10 {
        guest.offer(REQUESTS, 2);
        guest.wait_used(REQUESTS, slot as u16 + 1 + n);
        let mut answer = [0; 8];
        guest.get(REQUESTS, OTHER.1, &mut answer);
        assert_eq!(answer, words(&[120, 0])[..]);
    }
    drop(held);
    guest.wait_used(REQUESTS, slot as u16 + 11);
    let mut answer = [0; 8];
    guest.get(REQUESTS, client::ANSWER, &mut answer);
    assert_eq!(answer, words(&[32, 0])[..]);
});

root_test!(ten_thousand_files_can_be_open, || {
    let directory = directory();
    fs::write(directory.path().join("file"), "text").unwrap();
    let mut guest = mounted(&directory);
    let file = guest.lookup(ROOT, "file").unwrap();
    let open = |guest: &mut Guest| guest.open(file.node, libc::O_RDONLY).unwrap();
    let handles: Vec<u64> = (0..10_000).map(|_| open(&mut guest)).collect();
    for handle in [handles[0], handles[9_999]] {
        assert_eq!(guest.read(file.node, handle, 0, 9).unwrap(), b"text");
    }
    for handle in handles {
        guest.release(file.node, handle).unwrap();
    }
});

root_test!(
    guest_that_opens_too_many_files_is_refused_and_served_on,
    || {
        let directory = directory();
        fs::write(directory.path().join("file"), "text").unwrap();
        let program = limited(&directory, 200, "");
        let mut guest = Guest::by(directory.path(), false, &program).mount();
        let file = guest.lookup(ROOT, "file").unwrap();
        let mut handles = Vec::new();
        let error = loop {
            match guest.open(file.node, libc::O_RDONLY) {
                Ok(handle) => handles.push(handle),
                Err(error) => break error,
            }
        };
        assert_eq!(error, libc::ENFILE);
        assert!((100..200).contains(&handles.len()), "{}", handles.len());
        guest.release(file.node, handles[0]).unwrap();
        assert_eq!(guest.read_file(file.node).unwrap(), "text");
    }
);

root_test!(reset_of_the_device_forgets_what_the_guest_had_open, || {
    let directory = directory();
    fs::write(directory.path().join("file"), "text").unwrap();
    let mut guest = mounted(&directory);
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(file.node, libc::O_RDONLY).unwrap();
    assert_eq!((guest.stop(HIPRIO), guest.stop(REQUESTS)), (0, 3));
    guest.reset();
    guest.start(HIPRIO);
    guest.start(REQUESTS);
    let mut guest = guest.mount();
    assert_eq!(guest.getattr(file.node), Err(libc::EBADF));
    assert_eq!(guest.read(file.node, handle, 0, 9), Err(libc::EBADF));
    let file = guest.lookup(ROOT, "file").unwrap();
    assert_eq!(guest.read_file(file.node).unwrap(), "text");
    guest.forget(file.node, 1);
    assert_eq!(guest.getattr(file.node), Err(libc::EBADF));
});

/// What is seen of the host by its root directory, where a file of root's has this owner.
fn see_the_host(program: &Path, root: u32) {
    let mut guest = Guest::by(Path::new("/"), true, program).mount();
    let names = guest.list(ROOT).unwrap();
    let has = |name: &&str| names.contains(&(*name).to_owned());
    assert!(["etc", "proc", "usr"].iter().all(has), "{names:?}");
    let passwd = guest.walk("etc/passwd").unwrap();
    assert!(guest.read_file(passwd.node).unwrap().contains("root:"));
    assert_eq!((passwd.uid, passwd.gid), (root, root));
    // What the host has mounted there is not shown.
    for name in ["proc", "sys"] {
        let node = guest.lookup(ROOT, name).unwrap().node;
        assert_eq!(guest.list(node).unwrap(), [""; 0], "{name}");
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let is_mount = |path: &str| {
        mounts
            .lines()
            .any(|line| line.split(' ').nth(1) == Some(path))
    };
    let in_memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let run = netns::Netns::new();
    for (mount, path) in [("/dev", in_memory.path()), ("/run", &run.path())] {
        assert!(path.exists());
        if is_mount(mount) {
            let path = path.strip_prefix("/").unwrap().to_str().unwrap();
            assert_eq!(guest.walk(path).map(drop), Err(libc::ENOENT), "{path}");
        }
    }
}

root_test!(root_directory_of_the_host_can_be_shared, || {
    see_the_host(&vm::binary(), 0);
});

root_test!(root_directory_of_the_host_can_be_shared_by_a_user, || {
    let directory = directory();
    see_the_host(&as_user(&directory), 65534);
});

#[test]
fn directory_that_cannot_be_opened_is_named() {
    let directory = directory();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let missing = directory.path().join("missing");
    for (path, why) in [
        (missing, "No such file or directory"),
        (file, "Not a directory"),
    ] {
        let error = vmm::share::start(&path, false, None).unwrap_err();
        let text = format!("cannot open the directory {} to share it", path.display());
        assert_eq!(error.to_string(), text);
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.starts_with(why), "{source}");
    }
}

root_test!(directory_that_the_user_cannot_read_is_named, || {
    let directory = directory();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o700)).unwrap();
    let path = directory.path().to_owned();
    let start = move || {
        let user = rustix::process::Uid::from_raw(USER);
        // Of this thread alone.
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        vmm::share::start(&path, false, None).unwrap_err()
    };
    let error = std::thread::spawn(start).join().unwrap();
    let name = directory.path().display();
    let text = format!("cannot open the directory {name} to share it");
    assert_eq!(error.to_string(), text);
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.starts_with("Permission denied"), "{source}");
});

#[test]
fn program_that_cannot_be_started_is_named() {
    let directory = directory();
    let program = Some(Path::new("/nonexistent/minivmm"));
    let error = vmm::share::start(directory.path(), false, program).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    let name = directory.path().display().to_string();
    assert_eq!(source, format!("cannot start the file server of {name}"));
}

#[test]
#[ignore = "not a test: a program for library_needs_minivmm_in_path"]
fn program_that_shares() {
    let error = vmm::share::start(Path::new("/"), false, None).unwrap_err();
    println!("{error}: {}", error.remedy().unwrap());
}

#[test]
fn library_needs_minivmm_in_path() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--nocapture", "--exact", "program_that_shares"])
        .env("PATH", "/nonexistent")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let error = "cannot share /: the file server is the program minivmm, which is not in PATH: \
                 put minivmm into a directory of PATH, or name it in the config\n";
    assert!(output.status.success() && said.contains(error), "{said}");
}
