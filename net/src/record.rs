//! What a process uses of the host, by a file each: the device of a macvtap, a link that it made.
//!
//! A file `KEY.lock` stands for one thing, and the kernel's lock on it (F_OFD_SETLK) for its use. The lock belongs to the
//! open file: it lives until the last descriptor of that is closed, in whichever process, also one that has it from exec,
//! and whatever ends the process. So neither process ids nor their namespaces matter, and an unlocked file is a stale one.
//!
//! The key of a device is its number. The kernel uses that again once the device is gone, which the holder may outlive: so
//! a lock is one byte of the file, whose position says which link is meant.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use thiserror::Error;

use crate::identity::LinkId;
use crate::mac::MacAddr;

mod directory;
mod range;

pub use directory::{RecordDirectory, make_record_directory_for};
use range::{Kind, Range};

/// The device of all taps and tuns, `/dev/net/tun` (MISC_MAJOR, TUN_MINOR).
const TUN: (u32, u32) = (10, 200);

/// How the key of a link begins.
const LINK: &str = "link-";

/// The thing that a record stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordKey {
    name: String,
    range: Range,
}

impl RecordKey {
    /// The interface with the character device `device`, as fstat(2) has it from a queue. `mac` distinguishes taps,
    /// which share a device.
    pub fn of_tap(device: u64, id: Option<LinkId>, mac: MacAddr) -> Self {
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let of_tap = match (major, minor) {
            TUN => format!("-{mac}"),
            _ => String::new(),
        };
        Self {
            name: format!("{major}:{minor}{of_tap}"),
            range: id.map_or(Range::WHOLE, Range::of),
        }
    }

    /// A link that was made for the time of a process.
    pub(crate) fn of_link(LinkId { namespace, index }: LinkId) -> Self {
        Self {
            name: format!("{LINK}{namespace}-{index}"),
            range: Range::WHOLE,
        }
    }

    /// The key whose name is `name`, whichever link is meant.
    pub fn any(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            range: Range::WHOLE,
        }
    }

    /// The key whose lock has this name in its directory; that of a link is none of these.
    pub fn of_lock(name: &str) -> Option<Self> {
        let name = name.strip_suffix(".lock")?;
        (!name.starts_with(LINK)).then(|| Self::any(name))
    }

    /// The same interface as used by a guest whose VMM got it from another process, which has locked it already.
    #[must_use]
    pub fn passed(mut self) -> Self {
        self.name += ".passed";
        self
    }

    /// It with another ending: where those who lock it say what else there is to know.
    pub fn file(&self, ending: &str) -> String {
        format!("{}.{ending}", self.name)
    }

    fn lock_file(&self) -> String {
        self.file("lock")
    }
}

/// Why there is no lock.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Another process has it.
    #[error("{0:?} is locked by another process")]
    Held(PathBuf),
    /// It cannot be made or locked.
    #[error("cannot make and lock {0:?}")]
    File(PathBuf, #[source] io::Error),
}

/// The lock of a record. It is held until this value and all descriptors that were made from it are gone.
#[derive(Debug)]
pub struct RecordLock {
    /// Open for reading alone: a program that inherits it cannot write to a file of root's.
    file: OwnedFd,
    /// Dropped when the file is closed.
    place: Place,
}

/// Where a record is, which goes with its last holder.
#[derive(Debug)]
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        remove_if_free(&self.0);
    }
}

/// A lock that is not settled in this time belongs to a process that was stopped.
const SETTLING: Duration = Duration::from_secs(5);

impl RecordLock {
    /// Locks `key` in `directory`, which it makes if its parent exists. `publish` runs while no other process can see
    /// whether the lock is taken: who finds it taken finds what that has written, and never what an earlier holder has.
    ///
    /// # Errors
    ///
    /// See [`RecordError`].
    pub fn take(
        directory: &Path,
        key: &RecordKey,
        publish: impl FnMut(&mut File),
    ) -> Result<Self, RecordError> {
        Self::take_within(SETTLING, directory, key, publish)
    }

    fn take_within(
        settling: Duration,
        directory: &Path,
        key: &RecordKey,
        mut publish: impl FnMut(&mut File),
    ) -> Result<Self, RecordError> {
        let path = directory.join(key.lock_file());
        let failed = |error| RecordError::File(path.clone(), error);
        RecordDirectory::make(directory).map_err(failed)?;
        let deadline = Instant::now() + settling;
        loop {
            let mut writer = open(CWD, &path, OFlags::RDWR | OFlags::CREATE).map_err(failed)?;
            if !key.range.lock(&writer, Kind::Write).map_err(failed)? {
                // One that is settled is a read lock. All else is about to be one, or to be gone.
                let other = key.range.conflict(&writer).map_err(failed)?;
                if other == Some(Kind::Read) || Instant::now() > deadline {
                    return Err(RecordError::Held(path));
                }
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            // Its last holder may have removed it meanwhile.
            if !is_at(&writer, &path) {
                continue;
            }
            publish(&mut writer);
            let file = settle(&writer, &path, &key.range).map_err(failed)?;
            let place = Place(path);
            return Ok(Self { file, place });
        }
    }

    /// [`RecordLock::take`] for a thing that was just made: whoever has its lock has that of a thing that is gone.
    ///
    /// # Errors
    ///
    /// See [`RecordError`].
    pub fn take_new(
        directory: &Path,
        key: &RecordKey,
        mut publish: impl FnMut(&mut File),
    ) -> Result<Self, RecordError> {
        match Self::take(directory, key, &mut publish) {
            Err(RecordError::Held(path)) => {
                log::debug!("{path:?} is locked by who had something else of that number");
                let _ = rustix::fs::unlink(&path);
                Self::take(directory, key, &mut publish)
            }
            result => result,
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.place.0
    }

    /// A descriptor for a program that is to hold it too.
    ///
    /// # Errors
    ///
    /// When the process has no file descriptor left.
    pub fn share(&self) -> io::Result<OwnedFd> {
        self.file.try_clone()
    }
}

/// Turns the lock of `writer` into one that only says that it is taken, on a file that is open for reading alone.
fn settle(writer: &File, path: &Path, range: &Range) -> io::Result<OwnedFd> {
    let reader = open(CWD, path, OFlags::RDONLY)?;
    let locked = range.lock(writer, Kind::Read)? && range.lock(&reader, Kind::Read)?;
    if locked && is_at(&reader, path) {
        Ok(reader.into())
    } else {
        Err(io::Error::other("another process has replaced the file"))
    }
}

/// Removes a record that is not locked. Meanwhile all of it is, so that no other process takes it.
fn remove_if_free(path: &Path) {
    let Ok(file) = open(CWD, path, OFlags::RDWR) else {
        return;
    };
    if Range::WHOLE.lock(&file, Kind::Write).unwrap_or(false) && is_at(&file, path) {
        let _ = rustix::fs::unlink(path);
    }
}

/// Never waits, and follows no symbolic link.
fn open(directory: impl AsFd, path: impl rustix::path::Arg, how: OFlags) -> io::Result<File> {
    let flags = how | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    // Who may read it may lock it, so that is for its owner alone.
    let mode = Mode::RUSR | Mode::WUSR;
    Ok(rustix::fs::openat(directory, path, flags, mode)?.into())
}

fn is_at(file: &File, path: &Path) -> bool {
    let id = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    let there = rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).map(id);
    there.is_ok() && rustix::fs::fstat(file).map(id) == there
}

/// What is known of a record without its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RecordState {
    /// There is none.
    Missing,
    /// Its last holder has ended.
    Free,
    /// The thing is in use.
    Held,
}

/// Looks at records, and disturbs no process that wants to lock one.
#[derive(Debug, Default)]
pub struct RecordView {
    /// The system's table of locks, once it was needed.
    table: std::cell::OnceCell<range::Table>,
}

impl RecordView {
    /// What is known of `key` in `directory`. What cannot be found out counts as held.
    pub fn state(&self, directory: impl AsFd, key: &RecordKey) -> RecordState {
        let name = key.lock_file();
        let is_held = match open(&directory, &name, OFlags::RDONLY) {
            Ok(file) => key.range.conflict(&file).map(|other| other.is_some()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return RecordState::Missing,
            // Another user's. The table shows it all the same.
            Err(_) => rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(io::Error::from)
                .and_then(|stat| {
                    let table = self.table.get_or_init(range::Table::read);
                    table.has(&stat, &key.range)
                }),
        };
        match is_held {
            Ok(false) => RecordState::Free,
            Ok(true) | Err(_) => RecordState::Held,
        }
    }
}

/// Locks the link that this process has made, and writes there whose it is. Without that its alias has to do.
pub(crate) fn lock_link(id: LinkId, owner: &str) -> Option<RecordLock> {
    let key = RecordKey::of_link(id);
    let write = |file: &mut File| {
        let written = file
            .set_len(0)
            .and_then(|()| file.write_all(owner.as_bytes()));
        if let Err(error) = written {
            log::debug!("cannot write whose link {} is: {error}", id.index);
        }
    };
    let mut take = |directory: PathBuf| {
        RecordLock::take_new(&directory, &key, write)
            .inspect_err(|error| log::debug!("cannot record link {}: {error}", id.index))
            .ok()
    };
    RecordDirectory::own().into_iter().find_map(&mut take)
}

/// What [`lock_link`] has written.
pub(crate) fn owner_of_link(directory: impl AsFd, id: LinkId) -> Option<String> {
    let name = RecordKey::of_link(id).lock_file();
    let mut text = String::new();
    let file = open(directory, name, OFlags::RDONLY).ok()?;
    file.take(256).read_to_string(&mut text).ok()?;
    Some(text)
}

/// Removes the records of a thing that is gone.
pub(crate) fn forget(directories: &[RecordDirectory], key: &RecordKey) {
    for directory in directories {
        remove_if_free(&directory.path().join(key.lock_file()));
    }
}

#[cfg(test)]
mod tests;
