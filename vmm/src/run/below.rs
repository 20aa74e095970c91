//! What the host has mounted below a guest's root: each is a share of its own, since a share is one file system's.

use std::fs;
use std::path::{Path, PathBuf};

use fileserver::unescaped;
use rustix::fs::{Access, AtFlags, CWD, FileType, StatxFlags, accessat, statx};

/// File systems that the guest has without being asked: of disks and of memory. Others (of a network, of a program, images)
/// could keep whoever looks at them waiting, or are none of the root's.
const LOCAL: [&str; 12] = [
    "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "nilfs2", "reiserfs", "tmpfs",
    "xfs", "zfs",
];
/// Directories of which the guest has its own.
const OWN: [&str; 4] = ["proc", "sys", "dev", "run"];
/// How many names the path of one that is not asked for has at most. Those of containers have more.
const DEEPEST: usize = 2;
/// How many there are at most besides those that are asked for: each is a process of the host's and a device of the guest's.
const MOST: usize = 8;

/// A line of mountinfo (proc(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    id: u64,
    /// Where it is.
    point: PathBuf,
    /// Its file system.
    kind: String,
}

/// The directories below `root`, a path without links, where the guest needs a share too: those on the way to the `wanted`
/// ones, and those of local file systems. What is above is before what is below.
pub fn below(root: &Path, wanted: &[PathBuf]) -> Vec<PathBuf> {
    let text = fs::read("/proc/self/mountinfo");
    let text = text.unwrap_or_else(|error| {
        log::warn!("cannot read what is mounted below the guest's root: {error}");
        Vec::new()
    });
    choose(mounts(&text), root, wanted, can_be_shared)
}

fn mounts(text: &[u8]) -> Vec<Mount> {
    let lines = text.split(|byte| *byte == b'\n');
    let mount = |line: &[u8]| {
        let mut words = line.split(|byte| *byte == b' ');
        let id = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
        let point = unescaped(words.nth(3)?);
        // Behind the options are fields of any number.
        let kind = words.skip_while(|word| *word != b"-").nth(1)?;
        let kind = String::from_utf8_lossy(kind).into_owned();
        Some(Mount { id, point, kind })
    };
    lines.filter_map(mount).collect()
}

fn choose(
    mut mounts: Vec<Mount>,
    root: &Path,
    wanted: &[PathBuf],
    can_be_shared: impl Fn(&Mount) -> bool,
) -> Vec<PathBuf> {
    let names = |point: &Path| point.strip_prefix(root).unwrap_or(point).to_owned();
    mounts.retain(|mount| {
        let names = names(&mount.point);
        let is_below = mount.point.starts_with(root) && mount.point != root;
        is_below && !OWN.iter().any(|own| names.starts_with(own))
    });
    // Of several at one place the last is on top.
    mounts.reverse();
    mounts.sort_by(|a, b| a.point.cmp(&b.point));
    mounts.dedup_by(|a, b| a.point == b.point);
    let is_wanted = |mount: &Mount| wanted.iter().any(|path| path.starts_with(&mount.point));
    let depth = |mount: &Mount| names(&mount.point).components().count();
    let mut others: Vec<_> = mounts
        .iter()
        .filter(|mount| LOCAL.contains(&&*mount.kind) && depth(mount) <= DEEPEST)
        .filter(|mount| !is_wanted(mount))
        .collect();
    others.sort_by_key(|mount| depth(mount));
    others.truncate(MOST);
    let mut chosen: Vec<PathBuf> = Vec::new();
    for mount in &mounts {
        // In what is not shared there is no directory for it.
        let above = mounts
            .iter()
            .rev()
            .find(|above| above.point != mount.point && mount.point.starts_with(&above.point));
        let has_place = above.is_none_or(|above| chosen.contains(&above.point));
        let may = has_place && (is_wanted(mount) || others.contains(&mount));
        if may && can_be_shared(mount) {
            chosen.push(mount.point.clone());
        }
    }
    chosen
}

/// Whether it is a directory that this user can read, and not hidden by another mount.
fn can_be_shared(mount: &Mount) -> bool {
    let flags = AtFlags::NO_AUTOMOUNT;
    let Ok(found) = statx(
        CWD,
        &mount.point,
        flags,
        StatxFlags::TYPE | StatxFlags::MNT_ID,
    ) else {
        return false;
    };
    // Linux before 5.8 does not say which mount it is.
    let says = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::MNT_ID);
    let is_directory = FileType::from_raw_mode(found.stx_mode.into()).is_dir();
    let access = Access::READ_OK | Access::EXEC_OK;
    is_directory
        && (!says || found.stx_mnt_id == mount.id)
        && accessat(CWD, &mount.point, access, AtFlags::EACCESS).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which of these mounts are chosen, each a path and a file system.
    fn chosen(mounts: &[(&str, &str)], root: &str, wanted: &[&str]) -> Vec<String> {
        let mounts = mounts.iter().zip(1..).map(|((point, kind), id)| Mount {
            id,
            point: point.into(),
            kind: (*kind).into(),
        });
        let wanted: Vec<_> = wanted.iter().map(PathBuf::from).collect();
        let chosen = choose(mounts.collect(), root.as_ref(), &wanted, |_| true);
        let text = |path: PathBuf| path.into_os_string().into_string().unwrap();
        chosen.into_iter().map(text).collect()
    }

    #[test]
    fn file_systems_of_usual_partitions_are_shared_and_those_of_the_kernel_are_not() {
        let mounts = [
            ("/", "btrfs"),
            ("/proc", "proc"),
            ("/dev/shm", "tmpfs"),
            ("/run", "tmpfs"),
            ("/run/user/1000", "tmpfs"),
            ("/home", "btrfs"),
            ("/usr", "ext4"),
            ("/boot", "ext4"),
            ("/boot/efi", "vfat"),
            ("/tmp", "tmpfs"),
            ("/mnt/nas", "nfs4"),
            ("/snap/core/1", "squashfs"),
            ("/var/lib/docker/x/merged", "overlay"),
            ("/nix/store", "ext4"),
        ];
        assert_eq!(
            chosen(&mounts, "/", &[]),
            ["/boot", "/home", "/nix/store", "/tmp", "/usr"]
        );
    }

    #[test]
    fn way_to_a_wanted_directory_is_shared_whatever_it_is_of() {
        let mounts = [
            ("/mnt/nas", "nfs4"),
            ("/mnt/nas/a/b/c", "ext4"),
            ("/mnt/nas/other", "ext4"),
            ("/mnt/nasty", "nfs4"),
            ("/mnt/fuse", "fuse.sshfs"),
        ];
        assert_eq!(
            chosen(&mounts, "/", &["/mnt/nas/a/b/c/d"]),
            ["/mnt/nas", "/mnt/nas/a/b/c"]
        );
        // In what is not shared there is no place for more.
        assert_eq!(chosen(&mounts, "/", &["/proc"]), [""; 0]);
    }

    #[test]
    fn root_may_be_any_directory_and_has_as_many_as_devices_go() {
        let mounts = [
            ("/srv/debian", "ext4"),
            ("/srv/debian/dev", "tmpfs"),
            ("/srv/debian/home", "ext4"),
            ("/srv/debianer", "ext4"),
            ("/home", "ext4"),
        ];
        assert_eq!(chosen(&mounts, "/srv/debian", &[]), ["/srv/debian/home"]);
        let names: Vec<_> = (0..20).map(|n| format!("/a/{n:02}")).collect();
        let many: Vec<_> = names.iter().map(|name| (&**name, "xfs")).collect();
        let found = chosen(&many, "/", &["/a/17/b"]);
        assert_eq!(found.len(), MOST + 1);
        assert!(found.contains(&"/a/17".into()), "{found:?}");
    }

    #[test]
    fn one_on_top_of_another_counts() {
        assert_eq!(chosen(&[("/a", "xfs"), ("/a", "proc")], "/", &[]), [""; 0]);
        assert_eq!(chosen(&[("/a", "autofs"), ("/a", "xfs")], "/", &[]), ["/a"]);
    }

    #[test]
    fn lines_of_mountinfo_are_read() {
        let text = b"36 35 98:0 /mnt1 /a\\040b rw,noatime master:1 shared:2 - ext3 /dev/root rw\n\
                     25 20 0:22 / /sys rw - sysfs sysfs rw\n";
        let mount = |id, point: &str, kind: &str| Mount {
            id,
            point: point.into(),
            kind: kind.into(),
        };
        assert_eq!(
            mounts(text),
            [mount(36, "/a b", "ext3"), mount(25, "/sys", "sysfs")]
        );
        assert!(!mounts(&fs::read("/proc/self/mountinfo").unwrap()).is_empty());
    }

    #[test]
    fn what_is_hidden_or_no_directory_cannot_be_shared() {
        let text = fs::read("/proc/self/mountinfo").unwrap();
        let mounts = mounts(&text);
        let proc = mounts
            .iter()
            .rfind(|mount| mount.point == Path::new("/proc"));
        let proc = proc.unwrap();
        assert!(can_be_shared(proc));
        for other in [
            Mount {
                id: proc.id + 100_000,
                ..proc.clone()
            },
            Mount {
                point: "/proc/version".into(),
                ..proc.clone()
            },
            Mount {
                point: "/no/such".into(),
                ..proc.clone()
            },
        ] {
            assert!(!can_be_shared(&other), "{other:?}");
        }
    }
}
