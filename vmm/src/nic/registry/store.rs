//! What the holders of records say: a file beside each lock.
//!
//! What users write is data and no more: it is read without following a link, up to a length, and believed only while
//! the lock beside it is held.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use net::{Owner, RecordDirectory, RecordKey, RecordLock, RecordState, RecordView};
use rustix::fs::{Dir, Mode, OFlags};

use super::Entry;
use crate::files;

/// An entry is much shorter.
const LONGEST: u64 = 64 * 1024;

/// As many files of another user are looked at, each cheaply: there can be any number.
const MOST: usize = 10_000;

/// The ending of an entry's file.
const ENDING: &str = ".json";
/// How the name ends before that when the NIC was passed on.
const PASSED: &str = ".passed";

/// Writes it. Its lock is held, so that no other process does. Returns which file that is.
pub(super) fn write(path: &Path, entry: &Entry) -> io::Result<(u64, u64)> {
    let written = files::replace(path, 0o644, &serde_json::to_vec(entry)?)?;
    let found = written.metadata()?;
    Ok((found.dev(), found.ino()))
}

/// Which file it is.
pub(super) fn id(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// An entry whose record is locked, and whose word it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub entry: Entry,
    /// The NIC was passed on by whoever has the record of the same device.
    pub is_passed: bool,
}

/// What those say who have locked a record in `directory`. In a directory of one's own, what others have left is removed.
pub(super) fn read(view: &RecordView, directory: &RecordDirectory) -> Vec<Found> {
    let names = Dir::read_from(directory).into_iter().flatten().flatten();
    let names = names.map(|entry| entry.file_name().to_owned());
    let most = if directory.is_certain() {
        usize::MAX
    } else {
        MOST
    };
    names
        .take(most)
        .filter_map(|name| examine(view, directory, &name))
        .collect()
}

fn examine(view: &RecordView, directory: &RecordDirectory, name: &CStr) -> Option<Found> {
    let text = name.to_str().ok()?;
    let (any, stem) = match (RecordKey::of_lock(text), text.strip_suffix(ENDING)) {
        // Who was killed as it took the lock, or gave it up, has left that alone.
        (Some(key), _) if directory.is_certain() => {
            if view.state(directory, &key) == RecordState::Free {
                remove(directory.path(), &key);
            }
            return None;
        }
        (_, stem) => (RecordKey::any(stem?), stem?),
    };
    if view.state(directory, &any) != RecordState::Held {
        if directory.is_certain() {
            remove(directory.path(), &any);
        }
        return None;
    }
    let mut entry = contents(directory, name)?;
    entry.vouched_by = directory.user();
    entry.is_certain = directory.is_certain();
    let owner: Option<Owner> = entry.owner.parse().ok();
    let user = owner.and_then(|owner| owner.user());
    if !entry.is_certain && user.is_some_and(|user| user != entry.vouched_by) {
        return None;
    }
    let is_passed = stem.ends_with(PASSED);
    // The name says which NIC the lock is for.
    let is_locked = entry.nics.iter().all(|nic| {
        let key = nic.tap.key();
        let key = if is_passed { key.passed() } else { key };
        key.file("json").as_bytes() == name.to_bytes()
            && view.state(directory, &key) == RecordState::Held
    });
    (is_locked && !entry.nics.is_empty()).then_some(Found { entry, is_passed })
}

/// What its holder says of one record. Nothing while that is only starting.
pub(super) fn read_one(directory: &Path, key: &RecordKey) -> Option<Entry> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags, Mode::empty()).ok()?;
    let name = std::ffi::CString::new(key.file("json")).ok()?;
    contents(directory, &name)
}

/// Removes an entry that an ended process has left.
fn remove(directory: &Path, key: &RecordKey) {
    // No other process can take the lock meanwhile, so none in use is removed.
    let lock = RecordLock::take(directory, key, |_| {
        let _ = fs::remove_file(directory.join(key.file("json")));
    });
    if let Err(error) = lock {
        log::debug!("cannot remove what an ended process has left: {error}");
    }
}

/// What a regular file says.
fn contents(directory: impl AsFd, name: &CStr) -> Option<Entry> {
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
    let mut entry: Entry = serde_json::from_slice(&bytes).ok()?;
    entry.tame();
    Some(entry)
}
