//! The root file system: mounted beside the initramfs, and then in its place.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use agent_protocol::boot::{Access, Root};
use rustix::mount::{MountFlags, UnmountFlags, unmount};

use super::disk::{self, Kind};
use super::modules::{ModuleError, Modules};
use super::mounts::{self, MountError, mount};

/// Where the root is mounted at first.
pub const ROOT: &str = "/newroot";
/// What an overlay lies on, until it is there.
const LOWER: &str = "/lower";
/// The memory that an overlay writes to, likewise.
const MEMORY: &str = "/memory";
/// Of which a root has one at least.
const TOP: [&str; 5] = ["bin", "sbin", "usr", "etc", "lib"];

/// Why there is no root.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// Its file system's module cannot be loaded.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// It cannot be mounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The kernel has found no disk.
    #[error("the kernel sees no disk")]
    NoDisk,
    /// /sys or a device cannot be read.
    #[error("cannot read {0:?}")]
    Read(PathBuf, #[source] io::Error),
    /// The disk has none that can be a root.
    #[error("no root file system on {}: {} are known", .0.join(", "), KNOWN)]
    NoFileSystem(Vec<String>),
    /// It takes the place of the initramfs.
    #[error("cannot make {ROOT} the root")]
    Switch(#[source] io::Error),
}

/// The kinds of [`Kind`].
const KNOWN: &str = "ext2 to ext4, XFS, Btrfs, F2FS, squashfs and EROFS";

/// Mounts the root on [`ROOT`]. That of an archive is empty.
///
/// # Errors
///
/// See [`RootError`].
pub fn mount_root(root: &Root, access: Access, modules: &mut Modules) -> Result<(), RootError> {
    let overlay = access == Access::Overlay && *root != Root::Archive;
    let at = Path::new(if overlay { LOWER } else { ROOT });
    let flags = match access {
        Access::ReadWrite => MountFlags::empty(),
        Access::ReadOnly | Access::Overlay => MountFlags::RDONLY,
    };
    match root {
        Root::Share { tag } => {
            modules.load("virtiofs")?;
            mount(tag, at, "virtiofs", flags, "")?;
        }
        Root::Disk => mount_disk(at, flags, modules)?,
        // The rest is for the programs.
        Root::Archive => mount(
            "archive",
            at,
            "tmpfs",
            MountFlags::empty(),
            "size=80%,mode=755",
        )?,
    }
    if overlay {
        modules.load("overlay")?;
        mounts::mount_overlay(at, Path::new(MEMORY), Path::new(ROOT))?;
    }
    Ok(())
}

/// Mounts the first disk's root.
fn mount_disk(at: &Path, flags: MountFlags, modules: &mut Modules) -> Result<(), RootError> {
    let sys = Path::new("/sys/block");
    let devices = disk::candidates(sys, Path::new("/dev"))
        .map_err(|error| RootError::Read(sys.to_owned(), error))?;
    if devices.is_empty() {
        return Err(RootError::NoDisk);
    }
    for device in &devices {
        let kind = File::open(device)
            .and_then(|file| Kind::of(&file))
            .map_err(|error| RootError::Read(device.clone(), error))?;
        let Some(kind) = kind else {
            continue;
        };
        modules.load(kind.name())?;
        mount_device(&device.to_string_lossy(), at, kind, flags)?;
        if TOP.iter().any(|name| at.join(name).exists()) {
            return Ok(());
        }
        unmount(at, UnmountFlags::empty()).map_err(|error| RootError::Switch(error.into()))?;
    }
    let names = devices.iter().map(|device| device.display().to_string());
    Err(RootError::NoFileSystem(names.collect()))
}

fn mount_device(device: &str, at: &Path, kind: Kind, flags: MountFlags) -> Result<(), MountError> {
    let mounted = mount(device, at, kind.name(), flags, "");
    let read_only = flags.contains(MountFlags::RDONLY);
    match (mounted, kind.without_journal()) {
        // The disk cannot be written, and its journal has to be read first.
        (Err(_), Some(option)) if read_only => mount(device, at, kind.name(), flags, option),
        (mounted, _) => mounted,
    }
}

/// Makes [`ROOT`] the root of all processes, and gives back the memory of the initramfs.
///
/// # Errors
///
/// See [`RootError`].
pub fn switch_root() -> Result<(), RootError> {
    mounts::move_first(Path::new(ROOT))?;
    let switch = || {
        empty(Path::new("/"))?;
        rustix::process::chdir(ROOT)?;
        // The initramfs cannot be unmounted, nor be moved by pivot_root(2).
        rustix::mount::mount_move(".", "/")?;
        rustix::process::chroot(".")?;
        rustix::process::chdir("/").map_err(io::Error::from)
    };
    switch().map_err(RootError::Switch)
}

/// Removes all of a directory but what is mounted there.
fn empty(directory: &Path) -> io::Result<()> {
    let device = fs::metadata(directory)?.dev();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.dev() != device {
            continue;
        }
        match metadata.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}
