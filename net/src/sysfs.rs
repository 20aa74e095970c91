//! What only sysfs shows, read from the sysfs of the right network namespace.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Dev, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// A sysfs tree. `class/net` in it shows the namespace that it was mounted in, not the one of the reader.
#[derive(Debug)]
pub(crate) struct Sysfs {
    root: OwnedFd,
    /// It is a mount of our own, and not `/sys`.
    own: bool,
}

impl Sysfs {
    /// The sysfs of the calling thread's network namespace: a mount of our own, attached nowhere, so that it needs no
    /// directory and goes with its descriptor. Without the privilege for that it is `/sys`, which may be another
    /// namespace's; who reads a device number there proves it afterwards.
    pub(crate) fn of_this_namespace() -> io::Result<Self> {
        match own_mount("sysfs") {
            Ok(root) => Ok(Self { root, own: true }),
            Err(_) => Self::at(Path::new("/sys")),
        }
    }

    /// The tree at `root`.
    pub(crate) fn at(root: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, flags, Mode::empty())?;
        Ok(Self { root, own: false })
    }

    /// Whether it is certainly that of this network namespace.
    pub(crate) const fn is_own(&self) -> bool {
        self.own
    }

    /// Whether the driver of `link` says that it is a Wi-Fi NIC (cfg80211, or the older wireless extensions).
    pub(crate) fn is_wireless(&self, link: &str) -> bool {
        let exists = |entry| {
            rustix::fs::statat(
                &self.root,
                format!("class/net/{link}/{entry}"),
                AtFlags::empty(),
            )
            .is_ok()
        };
        exists("phy80211") || exists("wireless")
    }

    /// The name of the driver of `link`; None for a link without hardware.
    pub(crate) fn driver(&self, link: &str) -> Option<String> {
        let path = format!("class/net/{link}/device/driver");
        let target = rustix::fs::readlinkat(&self.root, path, Vec::new()).ok()?;
        let name = target.to_str().ok()?.rsplit('/').next()?;
        Some(name.to_owned())
    }

    /// The device number of the character device of macvtap `link`, whose interface index is `index`.
    pub(crate) fn tap_device(&self, link: &str, index: u32) -> io::Result<Dev> {
        let path = format!("class/net/{link}/tap{index}/dev");
        let file = rustix::fs::openat(
            &self.root,
            path,
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let mut text = String::new();
        std::fs::File::from(file).read_to_string(&mut text)?;
        parse_device(&text)
            .ok_or_else(|| io::Error::other(format!("not a device number: {text:?}")))
    }
}

/// Mounts a file system that needs no further options, without a place in the tree: it lives as long as the descriptor.
pub(crate) fn own_mount(kind: &str) -> io::Result<OwnedFd> {
    #[cfg(test)]
    tests::MOUNTS.set(tests::MOUNTS.get() + 1);
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

fn parse_device(text: &str) -> Option<Dev> {
    let (major, minor) = text.trim_end().split_once(':')?;
    Some(rustix::fs::makedev(
        major.parse().ok()?,
        minor.parse().ok()?,
    ))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        pub(super) static MOUNTS: Cell<u32> = const { Cell::new(0) };
    }

    /// How often the calling thread has mounted something.
    pub(crate) fn mounts_of_this_thread() -> u32 {
        MOUNTS.get()
    }

    fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Sysfs) {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let sysfs = Sysfs::at(root.path()).unwrap();
        (root, sysfs)
    }

    #[test]
    fn sysfs_wifi_by_either_driver_model_is_recognised() {
        let files = [
            ("class/net/wlan0/phy80211/index", "0"),
            ("class/net/ath0/wireless/link", "0"),
            ("class/net/eno1/mtu", "1500"),
        ];
        let (_root, sysfs) = tree(&files);
        assert!(sysfs.is_wireless("wlan0") && sysfs.is_wireless("ath0"));
        assert!(!sysfs.is_wireless("eno1") && !sysfs.is_wireless("absent"));
    }

    #[test]
    fn sysfs_tap_device_is_read_as_major_and_minor() {
        let (_root, sysfs) = tree(&[
            ("class/net/m0/tap7/dev", "241:3\n"),
            ("class/net/m1/tap8/dev", "x\n"),
        ]);
        assert_eq!(
            sysfs.tap_device("m0", 7).unwrap(),
            rustix::fs::makedev(241, 3)
        );
        assert!(
            sysfs
                .tap_device("m1", 8)
                .unwrap_err()
                .to_string()
                .contains("not a device number")
        );
        assert_eq!(
            sysfs.tap_device("m0", 8).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
