//! Finds the root file system of a disk.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A file system, and where a device that has one has which bytes.
const MAGICS: [(Kind, u64, &[u8]); 6] = [
    (Kind::Ext4, 0x438, &[0x53, 0xef]),
    (Kind::Xfs, 0, b"XFSB"),
    (Kind::Btrfs, 0x10040, b"_BHRfS_M"),
    (Kind::F2fs, 0x400, &[0x10, 0x20, 0xf5, 0xf2]),
    (Kind::Squashfs, 0, b"hsqs"),
    (Kind::Erofs, 0x400, &[0xe2, 0xe1, 0xf5, 0xe0]),
];

/// A kind of file system that may be a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// ext4, and ext2 and ext3, which its driver mounts.
    Ext4,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// F2FS.
    F2fs,
    /// Squashfs.
    Squashfs,
    /// EROFS.
    Erofs,
}

impl Kind {
    /// The kernel's name of it and of its module.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::F2fs => "f2fs",
            Self::Squashfs => "squashfs",
            Self::Erofs => "erofs",
        }
    }

    /// The option with which one that was not unmounted is mounted from a disk that cannot be written, without its journal.
    pub fn without_journal(self) -> Option<&'static str> {
        match self {
            Self::Ext4 => Some("noload"),
            Self::Xfs => Some("norecovery"),
            Self::Btrfs => Some("rescue=nologreplay"),
            Self::F2fs => Some("disable_roll_forward"),
            Self::Squashfs | Self::Erofs => None,
        }
    }

    /// What a device has. None is none of these.
    ///
    /// # Errors
    ///
    /// Those of reading it.
    pub fn of(device: &File) -> io::Result<Option<Self>> {
        for (kind, at, magic) in MAGICS {
            let mut bytes = [0; 8];
            let bytes = &mut bytes[..magic.len()];
            match device.read_exact_at(bytes, at) {
                Ok(()) if bytes == magic => return Ok(Some(kind)),
                Ok(()) => {}
                // It is smaller.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

/// The devices of the first disk that may have the root: its partitions in their order, or itself; none without a disk. `sys` is /sys/block,
/// `dev` /dev.
///
/// # Errors
///
/// Those of reading `sys`.
pub fn candidates(sys: &Path, dev: &Path) -> io::Result<Vec<PathBuf>> {
    let disks = names(sys)?.into_iter().filter(|name| {
        // loop0, ram0 and zram0 have no hardware.
        sys.join(name).join("device").exists() && !name.starts_with("sr")
    });
    // vdb is before vdaa.
    let Some(disk) = disks.min_by_key(|name| (name.len(), name.clone())) else {
        return Ok(Vec::new());
    };
    let directory = sys.join(&disk);
    let number = |name: &String| -> Option<u32> {
        let number = fs::read_to_string(directory.join(name).join("partition")).ok()?;
        number.trim().parse().ok()
    };
    let mut partitions: Vec<(u32, String)> = names(&directory)?
        .into_iter()
        .filter_map(|name| Some((number(&name)?, name)))
        .collect();
    partitions.sort();
    let mut devices: Vec<PathBuf> = partitions
        .iter()
        .map(|(_, partition)| dev.join(partition))
        .collect();
    if devices.is_empty() {
        devices.push(dev.join(disk));
    }
    Ok(devices)
}

fn names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(directory)?;
    // The kernel's names are ASCII.
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let directory = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        directory
    }

    #[test]
    fn file_systems_are_known_by_their_magic() {
        let directory = scratch("magic");
        for (kind, at, magic) in MAGICS {
            let path = directory.join(kind.name());
            let mut file = File::create_new(&path).unwrap();
            file.set_len(at).unwrap();
            io::Seek::seek(&mut file, io::SeekFrom::End(0)).unwrap();
            file.write_all(magic).unwrap();
            let found = Kind::of(&File::open(&path).unwrap()).unwrap();
            assert_eq!(found, Some(kind));
        }
        let none = directory.join("none");
        fs::write(&none, vec![0; 100_000]).unwrap();
        let found = Kind::of(&File::open(&none).unwrap()).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(found, None);
    }

    #[test]
    fn first_disk_is_tried_by_its_partitions_in_their_order_or_as_a_whole() {
        let sys = scratch("block");
        for (name, number) in [
            ("vdb/vdb1", 1),
            ("vda/vda1", 1),
            ("vda/vda14", 14),
            ("vda/vda2", 2),
        ] {
            let partition = sys.join(name);
            fs::create_dir_all(&partition).unwrap();
            fs::write(partition.join("partition"), format!("{number}\n")).unwrap();
        }
        for name in [
            "vda/device",
            "vdb/device",
            "vdaa/device",
            "loop0/queue",
            "vda/queue",
        ] {
            fs::create_dir_all(sys.join(name)).unwrap();
        }
        let found = |sys: &Path| candidates(sys, Path::new("/dev")).unwrap();
        let partitions = found(&sys);
        fs::remove_dir_all(sys.join("vda")).unwrap();
        fs::remove_dir_all(sys.join("vdb/vdb1")).unwrap();
        let whole = found(&sys);
        fs::remove_dir_all(sys.join("vdb")).unwrap();
        fs::remove_dir_all(sys.join("vdaa")).unwrap();
        let none = found(&sys);
        fs::remove_dir_all(&sys).unwrap();
        assert_eq!(
            partitions,
            ["/dev/vda1", "/dev/vda2", "/dev/vda14"].map(PathBuf::from)
        );
        assert_eq!(whole, [PathBuf::from("/dev/vdb")]);
        assert!(none.is_empty());
    }
}
