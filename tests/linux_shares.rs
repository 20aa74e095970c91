//! Directories of the host that a stock kernel mounts by virtio-fs.

// A helper that panics fails the test, as it should; clippy spares only the functions that are
// tests themselves.
#![allow(clippy::unwrap_used)]

mod harness;
mod lab;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use harness::disk::{Tmpfs, run};
use harness::eventually;
use harness::initramfs::find;
use harness::lab_test;
use harness::linux::{boot, share_initrd};
use harness::process::all_children;
use harness::vm::Vm;
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, setrlimit};
use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};
use tempfile::TempDir;

/// Boots a guest that has each of these directories, `DIR:TAG` or `DIR:TAG:ro`, mounted at `/TAG`.
fn boot_with(shares: &[String], more: &[&str]) -> Vm {
    let initrd = share_initrd();
    let initrd = initrd.to_str().expect("the cache's path is UTF-8");
    let mut args = [&["--initrd", initrd, "--memory", "512M"], more].concat();
    args.extend(shares.iter().flat_map(|share| ["--share", share]));
    let mut vm = boot(None, &args);
    mount_all(&mut vm, shares);
    vm
}

fn mount_all(vm: &mut Vm, shares: &[String]) {
    for tag in shares.iter().filter_map(|share| share.split(':').nth(1)) {
        vm.run(&format!("mkdir /{tag} && mount -t virtiofs {tag} /{tag}"));
    }
}

fn share(dir: &Path, tag: &str) -> String {
    format!("{}:{tag}", dir.display())
}

fn power_off(mut vm: Vm) {
    vm.start_command("poweroff -f");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.transcript());
}

/// What a command on the host writes.
fn host(program: &str, package: &str, args: &[&str], dir: &Path) -> String {
    let mut command = Command::new(find(program, package));
    let output = run(command.args(args).current_dir(dir));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

lab_test!(git_make_and_tar_work_in_a_share, || {
    let dir = TempDir::new().unwrap();
    write_c_project(dir.path());
    let archived = write_archive(dir.path());
    let mut vm = boot_with(&[share(dir.path(), "work")], &["--cpus", "2"]);

    vm.run("mkdir /work/repo && cd /work/repo && git init -q -b main && seq 5000 >numbers");
    let commit = "git -c user.name=guest -c user.email=guest@localhost commit -q -m first";
    vm.run(&format!("cd /work/repo && git add numbers && {commit}"));
    let mut status = || vm.run("cd /work/repo && git status --porcelain");
    assert_eq!(status(), "");
    let repo = dir.path().join("repo");
    fs::write(repo.join("new"), "").unwrap();
    fs::remove_file(repo.join("numbers")).unwrap();
    // For a second the guest goes by what it has seen.
    assert!(eventually(|| status() == " D numbers\n?? new\n"));
    let git = |args: &[&str]| host("git", "git", args, &repo);
    assert_eq!(git(&["status", "--porcelain"]), " D numbers\n?? new\n");
    assert_eq!(git(&["log", "--format=%s"]), "first\n");
    git(&["fsck", "--strict"]);

    vm.run("cd /work/c && make -j4");
    // It may warn of times in the future: the guest's clock began with whole seconds.
    assert!(vm.run("cd /work/c && make -j4").contains(UP_TO_DATE));
    assert_eq!(vm.try_run("/work/c/sum").status, SUM);
    let status = Command::new(dir.path().join("c/sum")).status();
    assert_eq!(status.unwrap().code(), Some(SUM));

    vm.run("cd /work && mkdir unpacked && tar -xf archive.tar -C unpacked");
    let unpacked = dir.path().join("unpacked");
    host(
        "busybox",
        "busybox-static",
        &["diff", "-r", "../archived", "."],
        &unpacked,
    );
    let date = |dir: &Path| fs::metadata(dir.join("3/file-7")).unwrap().mtime();
    assert_eq!(date(&unpacked), date(&archived));
    let count = vm.run("find /work/unpacked -type f | wc -l");
    assert_eq!(count.trim(), (FILES * DIRECTORIES).to_string());
    // Not by `rm -r`, which deletes while it lists: tmpfs, which a lab has, loses its place then (before Linux 6.6).
    vm.run("cd /work && rm unpacked/*/* && rmdir unpacked/* unpacked");
    assert!(!unpacked.exists());
    power_off(vm);
});

/// How many files each of so many directories has.
const FILES: usize = 50;
const DIRECTORIES: usize = 20;

/// Makes a directory of small files, and an archive of it.
fn write_archive(dir: &Path) -> std::path::PathBuf {
    let archived = dir.join("archived");
    for n in 0..DIRECTORIES {
        let below = archived.join(n.to_string());
        fs::create_dir_all(&below).unwrap();
        for file in 0..FILES {
            let text = format!("{file} of {n}\n").repeat(file);
            fs::write(below.join(format!("file-{file}")), text).unwrap();
        }
    }
    let tar = ["tar", "-cf", "archive.tar", "-C", "archived", "."];
    host("busybox", "busybox-static", &tar, dir);
    archived
}

/// How many parts the program has.
const PARTS: i32 = 20;
/// What it ends with: each part returns its number.
const SUM: i32 = PARTS * (PARTS + 1) / 2;
const UP_TO_DATE: &str = "make: Nothing to be done for 'all'.\n";
const MAKEFILE: &str = "parts := $(patsubst %.c,%.o,$(wildcard part*.c))\n\
    all: sum\n\
    sum: start.o $(parts)\n\ttcc -nostdlib -o $@ $^\n\
    %.o: %.c parts.h\n\ttcc -c -o $@ $<\n";

/// A program without a library, so that a compiler is all it takes.
fn write_c_project(dir: &Path) {
    let dir = dir.join("c");
    fs::create_dir(&dir).unwrap();
    let write = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
    let (mut header, mut sum) = (String::new(), String::new());
    for n in 1..=PARTS {
        header += &format!("int part{n}(void);\n");
        sum += &format!(" + part{n}()");
        let part = format!("#include \"parts.h\"\nint part{n}(void) {{ return {n}; }}\n");
        write(&format!("part{n}.c"), &part);
    }
    write("parts.h", &header);
    let exit = "__asm__ volatile (\"syscall\" : : \"a\" (60L), \"D\" (sum));";
    let start = format!("void _start(void) {{ long sum = 0{sum}; {exit} }}\n");
    write("start.c", &format!("#include \"parts.h\"\n{start}"));
    write("Makefile", MAKEFILE);
}

/// What fsx does, in equal shares but for what costs a round trip each.
const FSX: &str = "[weights]\nclose_open = 2\ninvalidate = 2\nmapread = 10\nmapwrite = 10\n\
    read = 10\nwrite = 10\ntruncate = 5\nfsync = 1\nfdatasync = 1\nposix_fallocate = 2\n\
    punch_hole = 2\nsendfile = 2\nposix_fadvise = 2\ncopy_file_range = 5\n";

/// How many descriptors a file server may have, and how many files a guest then reads.
const DESCRIPTORS: u64 = 400;
const MANY: usize = 800;

/// What this test starts has few descriptors: root could have more of them.
fn limit_descriptors() {
    remove_capability_from_bounding_set(CapabilitySet::SYS_RESOURCE).unwrap();
    let limit = Some(DESCRIPTORS);
    let limit = Rlimit {
        current: limit,
        maximum: limit,
    };
    setrlimit(Resource::Nofile, limit).unwrap();
}

lab_test!(share_is_a_file_system_as_any_for_a_stock_kernel, || {
    let dir = TempDir::new().unwrap();
    let full = Tmpfs::new(1);
    let read_only = TempDir::new().unwrap();
    fs::write(read_only.path().join("file"), "as it was\n").unwrap();
    fs::write(dir.path().join("fsx.toml"), FSX).unwrap();
    let many = Tmpfs::new(16);
    for n in 0..MANY {
        fs::write(many.path().join(format!("file-{n}")), "").unwrap();
    }
    limit_descriptors();
    let shares = [
        share(many.path(), "many"),
        share(dir.path(), "work"),
        share(full.path(), "full"),
        share(read_only.path(), "kept") + ":ro",
    ];
    let mut vm = boot_with(&shares, &["--reboot", "restart"]);

    vm.run("fsx -q -N 1500 -S 14 -P /tmp -f /work/fsx.toml /work/fsx");
    let members = vm.run("cd / && tar -cf - many | tar -tf - | wc -l");
    // And the directory.
    assert_eq!(members.trim(), (MANY + 1).to_string());
    opened_files_stay(&mut vm, dir.path());
    appends_go_to_the_end(&mut vm, dir.path());
    inodes_are_the_hosts(&mut vm, dir.path());
    full_file_system_is_enospc(&mut vm, full.path());
    read_only_share_is_erofs(&mut vm, read_only.path());

    // The guest begins anew, and with it its file systems.
    vm.start_command("exec 3>/work/left; echo before >&3; reboot -f");
    vm.wait_for("GUEST ready\n");
    mount_all(&mut vm, &shares);
    assert_eq!(vm.run("cat /work/left /kept/file"), "before\nas it was\n");
    vm.run("echo after >/work/left");
    assert_eq!(read(dir.path(), "left"), "after\n");
    power_off(vm);
});

fn read(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join(name)).unwrap()
}

/// A file that is open stays what it is, also without a name or with another's.
fn opened_files_stay(vm: &mut Vm, dir: &Path) {
    vm.run("echo old >/work/file");
    let script = "cd /work; exec 3<file; echo new >other; mv other file; cat <&3; cat file";
    assert_eq!(vm.run(script), "old\nnew\n");
    assert_eq!(read(dir, "file"), "new\n");
    let script = "cd /work; exec 3<>gone; rm gone; echo kept >&3; cat /proc/self/fd/3; ls gone";
    let output = vm.try_run(script);
    assert!(output.text.starts_with("kept\n"), "{}", output.text);
    assert_ne!(output.status, 0);
    assert!(!dir.join("gone").exists());
    // A lock holds against others of the guest.
    vm.run("cd /work; exec 9>lock; flock 9; ! flock -n lock true");
}

fn appends_go_to_the_end(vm: &mut Vm, dir: &Path) {
    use std::io::Write;
    let mut log = fs::File::create(dir.join("log")).unwrap();
    log.write_all(b"host\n").unwrap();
    vm.run("echo guest >>/work/log");
    // The host's own file is where it was: it overwrites nothing only where it appends too.
    let mut log = fs::File::options()
        .append(true)
        .open(dir.join("log"))
        .unwrap();
    log.write_all(b"host again\n").unwrap();
    vm.run("for i in 1 2 3; do echo guest again >>/work/log & done; wait");
    let again = "guest again\n".repeat(3);
    assert_eq!(
        read(dir, "log"),
        format!("host\nguest\nhost again\n{again}")
    );
}

/// Owners, modes and kinds of files are the same on both sides.
fn inodes_are_the_hosts(vm: &mut Vm, dir: &Path) {
    vm.run("cd /work && touch mine && chown 1000:1001 mine && chmod 4751 mine && ln mine hard");
    vm.run("cd /work && ln -s /etc/passwd soft && mkfifo pipe && mkdir -m 1777 dir");
    let mine = fs::metadata(dir.join("mine")).unwrap();
    assert_eq!((mine.uid(), mine.gid(), mine.nlink()), (1000, 1001, 2));
    assert_eq!(mine.mode() & 0o7777, 0o4751);
    assert_eq!(
        fs::read_link(dir.join("soft")).unwrap(),
        Path::new("/etc/passwd")
    );
    assert!(
        fs::metadata(dir.join("pipe"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
    assert_eq!(
        fs::metadata(dir.join("dir")).unwrap().mode() & 0o7777,
        0o1777
    );
    // The link leads to the guest's file.
    assert!(!vm.try_run("cat /work/soft").text.contains("root:x:0:0"));

    let theirs = dir.join("theirs");
    fs::write(&theirs, "the host's\n").unwrap();
    chown(&theirs, Some(1234), Some(5678)).unwrap();
    fs::set_permissions(&theirs, fs::Permissions::from_mode(0o600)).unwrap();
    let inode = fs::metadata(&theirs).unwrap().ino();
    let seen = vm.run("cd /work && stat -c '%u %g %a %s %i' theirs && cat theirs");
    assert_eq!(seen, format!("1234 5678 600 11 {inode}\nthe host's\n"));
}

fn full_file_system_is_enospc(vm: &mut Vm, dir: &Path) {
    assert_eq!(
        vm.run("df -k /full | awk 'END { print $2 }'").trim(),
        "1024"
    );
    let write = vm.try_run("dd if=/dev/zero of=/full/file bs=64k count=32");
    assert_ne!(write.status, 0);
    assert!(
        write.text.contains("No space left on device"),
        "{}",
        write.text
    );
    vm.run("rm /full/file && echo fits >/full/file");
    assert_eq!(read(dir, "file"), "fits\n");
}

fn read_only_share_is_erofs(vm: &mut Vm, dir: &Path) {
    for command in [
        "touch new",
        "echo >file",
        "rm file",
        "mv file new",
        "mkdir new",
        "chmod 0 file",
    ] {
        let output = vm.try_run(&format!("cd /kept && {command}"));
        assert_ne!(output.status, 0, "{command}");
        assert!(
            output.text.contains("Read-only file system"),
            "{command}: {}",
            output.text
        );
    }
    assert_eq!(vm.run("cat /kept/file"), "as it was\n");
    let names = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    assert_eq!(names.collect::<Vec<_>>(), ["file"]);
}

lab_test!(tasks_of_a_share_whose_server_dies_end_with_eio, || {
    let dir = TempDir::new().unwrap();
    let mut vm = boot_with(&[share(dir.path(), "work")], &["--cpus", "2"]);
    // One more has a file open, and waits for nothing.
    let script = "exec 3>/work/open; for i in 1 2 3; do \
        while dd if=/dev/zero of=/work/$i bs=64k count=64 2>/tmp/error.$i; do :; done & done; \
        while ls -lR /work >/dev/null 2>/tmp/error.4; do :; done & wait; \
        dd if=/tmp/error.4 2>/tmp/error.5 >&3; cat /tmp/error.*; \
        grep -l 'Input/output error' /tmp/error.* | wc -l";
    let tasks = vm.start_command(script);
    assert!(eventually(
        || (1..=3).all(|n| dir.path().join(n.to_string()).exists())
    ));
    for server in all_children(vm.pid()) {
        let server = Pid::from_raw(server as i32).unwrap();
        kill_process(server, Signal::KILL).unwrap();
    }
    let errors = vm.finish_command(tasks).text;
    // A listing has one for each file that it was about to look at.
    assert!(errors.ends_with("\n5\n"), "{errors}");
    // Nothing waits for ever in the kernel, and nothing that comes later does.
    vm.run("while cat /proc/[0-9]*/stat 2>/dev/null | grep -q ') D '; do usleep 100000; done");
    for command in ["cat /work/1", "touch /work/new", "stat -f /work"] {
        let output = vm.try_run(command);
        assert_ne!(output.status, 0, "{command}");
        assert!(
            output.text.contains("Input/output error"),
            "{command}: {}",
            output.text
        );
    }
    vm.run("sync; umount /work");
    power_off(vm);
});
