//! The files: where they are, and how they are read and written.
//!
//! Root's are in `/run/minivmm`, a user's in `/run/minivmm/UID`, which `minivmm net open` makes for
//! the user that it changes to, or in `XDG_RUNTIME_DIR`. What users write is data and no more: it is read without following a
//! link, up to a length, and believed only while the process that it names is that user's.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use net::Owner;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::process::{Pid, test_kill_process};
use serde::Deserialize;

use super::Entry;

/// The system's directory.
const SYSTEM: &str = "/run/minivmm";

/// An entry is much shorter.
const LONGEST: u64 = 64 * 1024;

/// A file that is being written does not exist for so long.
const WRITING: Duration = Duration::from_secs(60);

/// Where this process may write its file, the best place first.
pub(super) fn own_directories() -> Vec<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    let system = PathBuf::from(SYSTEM);
    let of_user = system.join(user.to_string());
    // Another's, as `sudo -E` leaves it, would be another's to change under our hands.
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let runtime = runtime.filter(|dir| fs::metadata(dir).is_ok_and(|found| found.uid() == user));
    [
        Some(system),
        Some(of_user),
        runtime.map(|dir| dir.join("minivmm")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Where files of all users may be.
pub(super) fn all_directories() -> Vec<PathBuf> {
    let is_number = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.parse::<u32>().is_ok())
    };
    let of_users = |directory: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.path())
            .filter(is_number)
            .collect()
    };
    let mut all = vec![PathBuf::from(SYSTEM)];
    all.extend(of_users(SYSTEM));
    all.extend(
        of_users("/run/user")
            .into_iter()
            .map(|dir| dir.join("minivmm")),
    );
    all.extend(own_directories());
    // The same one by two ways.
    let mut seen = Vec::new();
    all.retain(|directory| {
        let id = fs::metadata(directory).map(|found| (found.dev(), found.ino()));
        id.is_ok_and(|id| {
            let is_new = !seen.contains(&id);
            seen.push(id);
            is_new
        })
    });
    all
}

/// Makes the directory for the files of a user without rights, which only root can.
///
/// # Errors
///
/// When it cannot be made.
pub fn make_directory_for(user: u32, group: u32) -> io::Result<()> {
    make_readable(Path::new(SYSTEM))?;
    let directory = Path::new(SYSTEM).join(user.to_string());
    make_readable(&directory)?;
    std::os::unix::fs::lchown(directory, Some(user), Some(group))
}

/// Makes a directory that all may read, whatever the umask. Those above it have to exist.
fn make_readable(directory: &Path) -> io::Result<()> {
    match fs::create_dir(directory) {
        Ok(()) => fs::set_permissions(directory, fs::Permissions::from_mode(0o755)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// Writes so that a reader sees the old or the new, never a part.
pub(super) fn write(path: &Path, entry: &Entry) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        make_readable(directory)?;
    }
    let new = path.with_extension("new");
    // What a process of the same number has left.
    let _ = fs::remove_file(&new);
    let file = File::create_new(&new)?;
    fill(file, entry)
        .and_then(|()| fs::rename(&new, path))
        .inspect_err(|_| drop(fs::remove_file(&new)))
}

fn fill(mut file: File, entry: &Entry) -> io::Result<()> {
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    file.write_all(&serde_json::to_vec(entry)?)
}

/// An entry of a live process, and whose word it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub entry: Entry,
    pub user: u32,
}

/// The entries of a directory. Files of the dead are removed on the way.
pub(super) fn read(directory: &Path) -> Vec<Found> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(directory) = rustix::fs::open(directory, flags, Mode::empty()) else {
        return Vec::new();
    };
    let entries = Dir::read_from(&directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| examine(&directory, entry.file_name()))
        .collect()
}

fn examine(directory: impl AsFd, name: &CStr) -> Option<Found> {
    let text = name.to_str().ok()?;
    if let Some(pid) = text.strip_suffix(".new") {
        if is_abandoned(&directory, name, pid) {
            let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
        }
        return None;
    }
    text.strip_suffix(".json")?;
    let (bytes, user) = contents(&directory, name)?;
    let Owned { owner } = serde_json::from_slice(&bytes).ok()?;
    let owner: Owner = owner.parse().ok()?;
    if owner.is_dead() {
        let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
        return None;
    }
    // Root may speak for others.
    if user != 0 && owner.user() != Some(user) {
        return None;
    }
    let mut entry: Entry = serde_json::from_slice(&bytes).ok()?;
    entry.pid = owner.pid();
    entry.tame();
    Some(Found { entry, user })
}

/// What every version of an entry has.
#[derive(Deserialize)]
struct Owned {
    owner: String,
}

/// A regular file's bytes, and its owner.
fn contents(directory: impl AsFd, name: &CStr) -> Option<(Vec<u8>, u32)> {
    // Non-blocking: a FIFO would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(directory, name, flags, Mode::empty()).ok()?);
    let metadata = file.metadata().ok()?;
    // With a second name it could be a file from elsewhere.
    if !metadata.is_file() || metadata.nlink() != 1 {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(LONGEST).read_to_end(&mut bytes).ok()?;
    Some((bytes, metadata.uid()))
}

/// Whether a file that was to become an entry will not any more.
fn is_abandoned(directory: impl AsFd, name: &CStr, pid: &str) -> bool {
    let Ok(stat) = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else {
        return false;
    };
    let Some(pid) = pid.parse().ok().and_then(Pid::from_raw) else {
        return false;
    };
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let age = now
        .as_secs()
        .saturating_sub(u64::try_from(stat.st_mtime).unwrap_or(0));
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && (test_kill_process(pid) == Err(rustix::io::Errno::SRCH) || age > WRITING.as_secs())
}
