//! The end of a guest: of its processes, its file systems and its machine.

use std::fs;
use std::time::{Duration, Instant};

use rustix::fs::sync;
use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use rustix::system::{RebootCommand, reboot};

use crate::children::Children;

/// How long processes have between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(2);
/// How long the kernel may take to end those that were killed: one may wait for a device.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// How often they are killed anew: processes that fork may have missed it.
const KILL_AGAIN: Duration = Duration::from_millis(50);

/// File systems in memory: nothing of them is kept.
const IN_MEMORY: [&str; 14] = [
    "bpf", "cgroup", "cgroup2", "debugfs", "devpts", "devtmpfs", "mqueue", "overlay", "proc",
    "ramfs", "rootfs", "sysfs", "tmpfs", "tracefs",
];

/// Ends all processes but this one.
pub fn end_processes(children: &Children) {
    if children.wait_for_none(Duration::ZERO) {
        return;
    }
    signal_all(libc::SIGTERM);
    // One that is stopped gets it then.
    signal_all(libc::SIGCONT);
    if children.wait_for_none(GRACE) {
        return;
    }
    let deadline = Instant::now() + KILL_PATIENCE;
    while Instant::now() < deadline {
        signal_all(libc::SIGKILL);
        if children.wait_for_none(KILL_AGAIN) {
            return;
        }
    }
}

/// Writes what is to be kept, and leaves its file systems as after an unmount.
pub fn end_file_systems() {
    sync();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for at in to_unmount(&mounts).iter().rev() {
        let unmounted = at != "/" && unmount(at.as_str(), UnmountFlags::empty()).is_ok();
        if !unmounted {
            // What is in use, as the root, is at least not written any more.
            let _ = mount_remount(at.as_str(), MountFlags::RDONLY, "");
        }
    }
}

/// Where file systems are mounted that can be written and are kept, in the order in which they were mounted.
fn to_unmount(mounts: &str) -> Vec<String> {
    let entries = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (at, kind, options) = (words.next()?, words.next()?, words.next()?);
        let writable = options.split(',').any(|option| option == "rw");
        (writable && !IN_MEMORY.contains(&kind)).then(|| unescape(at))
    });
    entries.collect()
}

/// A path as it was before the kernel wrote spaces, tabs, newlines and backslashes in octal digits.
fn unescape(path: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .into_iter()
    .fold(path.to_owned(), |path, (code, character)| {
        path.replace(code, character)
    })
}

/// Ends the machine.
pub fn power_off() -> ! {
    // The kernel sees to the rest.
    let refused = reboot(RebootCommand::PowerOff);
    let restarted = reboot(RebootCommand::Restart);
    // The kernel panics when its first process ends.
    eprintln!("minivmm-agent: cannot power off: {refused:?}, {restarted:?}");
    std::process::abort()
}

fn signal_all(signal: i32) {
    // SAFETY: kill takes no memory. It fails where there is no other process.
    unsafe { libc::kill(-1, signal) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_unmounted_and_the_rest_is_not() {
        let mounts = "\
            rootfs / rootfs rw 0 0\n\
            /dev/vda1 / ext4 rw,relatime 0 0\n\
            proc /proc proc rw,nosuid 0 0\n\
            src /my\\040src virtiofs rw,relatime 0 0\n\
            tools /tools virtiofs ro,relatime 0 0\n\
            tmpfs /tmp tmpfs rw 0 0\n";
        assert_eq!(to_unmount(mounts), ["/", "/my src"]);
    }
}
