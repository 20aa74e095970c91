//! The claim of this process to a NIC: a locked record, and what it says.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use net::{
    MacAddr, Macvtap, RecordDirectory, RecordError, RecordKey, RecordLock, RecordState, RecordView,
    TapInfo,
};

use super::{Entry, NicEntry, Runs, store};
use crate::control::exit::chain;

/// Why a NIC cannot be claimed: whoever opens a second queue of a macvtap gets a share of its frames, unasked, and a queue
/// that nothing empties swallows its own.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another NIC of this process is on the same interface.
    #[error(
        "two NICs are on {name} ({mac}), and each would get a part of its frames: give each NIC \
         an interface of its own"
    )]
    Twice {
        /// The interface.
        name: String,
        /// Its MAC address.
        mac: MacAddr,
    },
    /// Another process has it.
    #[error(
        "{name} ({mac}) is the NIC of {by}, and each would get a part of its frames: end that, or use another interface"
    )]
    InUse {
        /// The interface.
        name: String,
        /// Its MAC address.
        mac: MacAddr,
        /// The other process.
        by: String,
    },
}

impl ClaimError {
    /// `entry` is None while the other process is only starting, or says nothing.
    fn in_use(tap: &TapInfo, entry: Option<&Entry>) -> Self {
        let by = entry.map_or_else(
            || "another process, which is only starting".to_owned(),
            |entry| format!("{} (pid {})", entry.runs.path(), entry.pid),
        );
        let (name, mac) = (tap.name.clone(), tap.mac);
        Self::InUse { name, mac, by }
    }
}

/// A NIC that this process alone has, as far as others can be known. Dropping it gives it up.
#[derive(Debug)]
pub struct Claim {
    entry: Entry,
    /// Dropped before the lock: whoever has that next writes its own.
    file: Option<EntryFile>,
    /// None where no record can be made.
    lock: Option<RecordLock>,
}

impl Claim {
    /// Claims `macvtap` for what this process `runs`, and publishes that. A claim of another user's is only warned of: it
    /// need not be true.
    ///
    /// # Errors
    ///
    /// [`ClaimError::InUse`].
    pub fn new(macvtap: &Macvtap, runs: &Runs, user: Option<u32>) -> Result<Self, ClaimError> {
        let key = macvtap.info().key();
        let nic = NicEntry::new(macvtap.info().clone());
        let mut claim = Self {
            entry: Entry::new(runs.clone(), user, nic),
            file: None,
            lock: None,
        };
        let own = match macvtap.is_passed() {
            true => key.clone().passed(),
            false => key.clone(),
        };
        claim.lock(&own, macvtap.is_new())?;
        // What this process has made, no other can have.
        if !macvtap.is_new() {
            claim.must_be_alone(&key, macvtap.is_passed())?;
        }
        Ok(claim)
    }

    /// Locks it where this process may. Without that the NIC works; but others are not kept from it.
    fn lock(&mut self, own: &RecordKey, is_new: bool) -> Result<(), ClaimError> {
        let mut why = None;
        for directory in RecordDirectory::own() {
            let mut write = |_: &mut File| {
                self.file = EntryFile::new(directory.join(own.file("json")), &self.entry);
            };
            let taken = match is_new {
                true => RecordLock::take_new(&directory, own, &mut write),
                false => RecordLock::take(&directory, own, &mut write),
            };
            match taken {
                Ok(lock) => {
                    self.lock = Some(lock);
                    return Ok(());
                }
                Err(RecordError::Held(_)) => {
                    let other = store::read_one(&directory, own);
                    return Err(ClaimError::in_use(&self.nic().tap, other.as_ref()));
                }
                Err(error) => why = Some(error),
            }
        }
        let name = &self.nic().tap.name;
        let why = why.map_or_else(String::new, |error| format!(": {}", chain(&error)));
        let effect = match is_new {
            true => "`net list` does not show it",
            false => "another minivmm can start on it and take a part of its frames",
        };
        log::warn!(
            "{name} cannot be recorded as in use, so that {effect}{why} (a user without rights needs XDG_RUNTIME_DIR, or \
             {:?} made by root, or a place in /tmp that no other user has taken)",
            RecordDirectory::own()
                .get(1)
                .map_or(Path::new(""), PathBuf::as_path)
        );
        Ok(())
    }

    /// Whoever has locked a record of its own before this process looks is seen here; whoever does it later sees this one's.
    fn must_be_alone(&self, key: &RecordKey, is_passed: bool) -> Result<(), ClaimError> {
        let view = RecordView::default();
        for directory in RecordDirectory::all() {
            for other in [key.clone(), key.clone().passed()] {
                let path = directory.path().join(other.file("lock"));
                let is_own = self.lock.as_ref().is_some_and(|lock| lock.path() == path);
                if is_own || view.state(&directory, &other) != RecordState::Held {
                    continue;
                }
                let entry = store::read_one(directory.path(), &other);
                let is_guest = |entry: &Entry| matches!(entry.runs, Runs::Kernel(_));
                // Who has passed it on waits for our end.
                if is_passed && other == *key && !entry.as_ref().is_some_and(is_guest) {
                    continue;
                }
                let in_use = ClaimError::in_use(&self.nic().tap, entry.as_ref());
                if directory.is_certain() {
                    return Err(in_use);
                }
                log::warn!("user {} says that {in_use}", directory.user());
            }
        }
        Ok(())
    }

    /// What is published of the NIC.
    pub fn nic(&self) -> &NicEntry {
        &self.entry.nics[0]
    }

    /// A descriptor for a program that uses the NIC, which keeps the claim as long as it lives.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn share(&self) -> io::Result<Option<OwnedFd>> {
        self.lock.as_ref().map(RecordLock::share).transpose()
    }

    /// Publishes something else of the NIC.
    pub fn update(&mut self, change: impl FnOnce(&mut NicEntry)) {
        let before = self.entry.clone();
        change(&mut self.entry.nics[0]);
        if self.entry != before
            && let Some(file) = &mut self.file
        {
            file.rewrite(&self.entry);
        }
    }
}

/// The file that describes a NIC. Dropping it removes it.
#[derive(Debug)]
struct EntryFile {
    path: PathBuf,
    /// The last one that was written.
    id: (u64, u64),
}

impl EntryFile {
    fn new(path: PathBuf, entry: &Entry) -> Option<Self> {
        match store::write(&path, entry) {
            Ok(id) => Some(Self { path, id }),
            Err(error) => {
                // One of an earlier holder would be taken for ours.
                let _ = fs::remove_file(&path);
                log::warn!("`net list` cannot tell of this NIC: cannot write {path:?}: {error}");
                None
            }
        }
    }

    /// The NIC's device may be gone and its number another's by now, who has put its own in place of it.
    fn is_there(&self) -> bool {
        store::id(&self.path).is_ok_and(|id| id == self.id)
    }

    fn rewrite(&mut self, entry: &Entry) {
        if !self.is_there() {
            return;
        }
        match store::write(&self.path, entry) {
            Ok(id) => self.id = id,
            Err(error) => log::debug!("cannot tell of this NIC in {:?}: {error}", self.path),
        }
    }
}

impl Drop for EntryFile {
    fn drop(&mut self) {
        if self.is_there() {
            let _ = fs::remove_file(&self.path);
        }
    }
}
