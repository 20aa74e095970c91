//! Mounting, and the file systems that every guest has.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

/// Why a file system is not where it should be.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The directory is missing and cannot be made.
    #[error("cannot make the directory {0:?}")]
    Directory(PathBuf, #[source] io::Error),
    /// The kernel does not know the kind.
    #[error("the kernel has no file system {0}, and its initramfs no module of that name")]
    Unknown(String),
    /// mount(2) fails.
    #[error("cannot mount {source_name} ({kind}) on {at:?}")]
    Mount {
        /// What was to be mounted.
        source_name: String,
        /// The kind of file system.
        kind: String,
        /// Where.
        at: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// mount(2) with MS_MOVE fails.
    #[error("cannot move what is mounted on {from:?} to {to:?}")]
    Move {
        /// Where it is.
        from: PathBuf,
        /// Where it should be.
        to: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What may not be done in most file systems of the kernel's own.
const SAFE: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// A file system, what it is mounted from, where, and with which flags and options.
type Entry = (&'static str, &'static str, MountFlags, &'static str);

/// What init needs before it has a root. They move there.
const FIRST: [Entry; 3] = [
    ("proc", "/proc", SAFE, ""),
    ("sysfs", "/sys", SAFE, ""),
    ("devtmpfs", "/dev", MountFlags::NOSUID, "mode=755"),
];

/// What each guest has besides.
const SECOND: [Entry; 3] = [
    (
        "devpts",
        "/dev/pts",
        MountFlags::NOSUID.union(MountFlags::NOEXEC),
        "gid=5,mode=620,ptmxmode=666",
    ),
    (
        "tmpfs",
        "/dev/shm",
        MountFlags::NOSUID.union(MountFlags::NODEV),
        "mode=1777",
    ),
    (
        "tmpfs",
        "/run",
        MountFlags::NOSUID.union(MountFlags::NODEV),
        "mode=755",
    ),
];

/// What a guest has if its kernel can: for tests of kernels and of what uses cgroups.
const OPTIONAL: [Entry; 4] = [
    ("cgroup2", "/sys/fs/cgroup", SAFE, "nsdelegate"),
    ("debugfs", "/sys/kernel/debug", SAFE, ""),
    ("tracefs", "/sys/kernel/tracing", SAFE, ""),
    ("mqueue", "/dev/mqueue", SAFE, ""),
];

/// A new machine's /tmp.
const TMP: Entry = (
    "tmpfs",
    "/tmp",
    MountFlags::NOSUID.union(MountFlags::NODEV),
    "mode=1777",
);

/// Links that programs expect, and devtmpfs has not.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts a file system on a directory, which is made where it is not there.
///
/// # Errors
///
/// See [`MountError`].
pub fn mount(
    source: &str,
    at: &Path,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> Result<(), MountError> {
    make_directory(at)?;
    let mounted = CString::new(options)
        .map_err(|_| Errno::INVAL)
        .and_then(|options| rustix::mount::mount(source, at, kind, flags, &*options));
    mounted.map_err(|error| match error {
        Errno::NODEV => MountError::Unknown(kind.to_owned()),
        error => MountError::Mount {
            source_name: source.to_owned(),
            kind: kind.to_owned(),
            at: at.to_owned(),
            source: error.into(),
        },
    })
}

/// Puts memory that can be written over what is mounted on `lower`, and mounts both together. `lower` and `memory`, where
/// the memory is mounted meanwhile, are out of sight then.
///
/// # Errors
///
/// See [`MountError`].
pub fn mount_overlay(lower: &Path, memory: &Path, at: &Path) -> Result<(), MountError> {
    mount("overlay", memory, "tmpfs", MountFlags::empty(), "mode=755")?;
    let failed = |path: &Path| {
        let path = path.to_owned();
        |error| MountError::Directory(path, error)
    };
    let (upper, work) = (memory.join("upper"), memory.join("work"));
    for path in [&upper, &work] {
        fs::create_dir(path).map_err(failed(path))?;
    }
    // The directory itself is that of the upper one.
    let found = fs::metadata(lower).map_err(failed(lower))?;
    chown(&upper, Some(found.uid()), Some(found.gid())).map_err(failed(&upper))?;
    fs::set_permissions(&upper, found.permissions()).map_err(failed(&upper))?;
    let [lower_name, upper, work] = [lower, &upper, &work].map(Path::display);
    let options = format!("lowerdir={lower_name},upperdir={upper},workdir={work}");
    let mount = |more: &str| {
        let options = format!("{options}{more}");
        mount("overlay", at, "overlay", MountFlags::empty(), &options)
    };
    // So that a directory of the lower one is renamed, and not copied. A kernel that cannot says EINVAL.
    mount(",redirect_dir=on").or_else(|_| mount(""))?;
    // The overlay holds both.
    detach(lower);
    detach(memory);
    Ok(())
}

/// Mounts what init needs itself.
///
/// # Errors
///
/// See [`MountError`].
pub fn mount_first() -> Result<(), MountError> {
    FIRST.iter().try_for_each(mount_entry)
}

/// Moves what init has mounted for itself into the new root.
///
/// # Errors
///
/// See [`MountError`].
pub fn move_first(root: &Path) -> Result<(), MountError> {
    for (_, from, ..) in FIRST {
        let to = root.join(from.trim_start_matches('/'));
        make_directory(&to)?;
        rustix::mount::mount_move(from, &to).map_err(|error| MountError::Move {
            from: from.into(),
            to,
            source: error.into(),
        })?;
    }
    Ok(())
}

/// Mounts what each guest has, in its root; an empty /tmp too where `tmp`.
///
/// # Errors
///
/// See [`MountError`].
pub fn mount_second(tmp: bool) -> Result<(), MountError> {
    SECOND.iter().try_for_each(mount_entry)?;
    if tmp {
        mount_entry(&TMP)?;
    }
    for entry in &OPTIONAL {
        // The kernel has no such file system.
        let _ = mount_entry(entry);
    }
    for (target, at) in LINKS {
        // A devtmpfs that has it.
        let _ = symlink(target, at);
    }
    Ok(())
}

/// Takes a file system out of sight. It stays for those that use it.
pub fn detach(at: &Path) {
    // It then stays visible, which does no harm.
    let _ = rustix::mount::unmount(at, UnmountFlags::DETACH);
}

fn mount_entry((kind, at, flags, options): &Entry) -> Result<(), MountError> {
    mount(kind, Path::new(at), kind, *flags, options)
}

/// Makes a directory with those above it, if it is not there.
fn make_directory(at: &Path) -> Result<(), MountError> {
    if at.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(at).map_err(|error| MountError::Directory(at.to_owned(), error))
}
