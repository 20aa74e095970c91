//! The claim of this process to a NIC: a locked record, and what it says.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use net::{RecordDirectory, RecordError, RecordKey, RecordLock, RecordState, RecordView};

use super::{Entry, NicEntry, Runs, store};

/// A NIC that nobody else has, as far as others can be known. Dropping it gives it up.
#[derive(Debug)]
pub struct Claim {
    entry: Entry,
    /// Dropped before the lock: whoever has that next writes its own.
    file: Option<EntryFile>,
    /// None where no record can be made.
    lock: Option<RecordLock>,
}

/// Who has a NIC already.
#[derive(Debug)]
pub struct InUse {
    /// None while it is only starting, or tells nothing.
    pub entry: Option<Entry>,
    /// Whether root or this process's own user says so; else which user does.
    pub said_by: Option<u32>,
}

/// What is claimed.
#[derive(Debug)]
pub struct Wanted {
    /// Its record.
    pub key: RecordKey,
    /// This process has made it: nobody else can have it.
    pub is_new: bool,
    /// Another program has it, and has passed it on.
    pub is_passed: bool,
}

impl Claim {
    /// Claims a NIC, and tells of it by `entry`, which has that NIC alone. `doubtful` hears of claims by other users,
    /// which need not be true.
    ///
    /// # Errors
    ///
    /// Who has it.
    pub fn new(wanted: &Wanted, entry: Entry, doubtful: impl FnMut(InUse)) -> Result<Self, InUse> {
        let mut claim = Self {
            entry,
            file: None,
            lock: None,
        };
        let own = match wanted.is_passed {
            true => wanted.key.clone().passed(),
            false => wanted.key.clone(),
        };
        claim.lock(wanted, &own)?;
        if !wanted.is_new {
            claim.must_be_alone(wanted, doubtful)?;
        }
        Ok(claim)
    }

    /// Locks it where this process may. Without that the NIC works; but others are not kept from it.
    fn lock(&mut self, wanted: &Wanted, own: &RecordKey) -> Result<(), InUse> {
        let mut why = None;
        for directory in RecordDirectory::own() {
            let mut write = |_: &mut File| {
                self.file = EntryFile::new(directory.join(own.file("json")), &self.entry);
            };
            let taken = match wanted.is_new {
                true => RecordLock::take_new(&directory, own, &mut write),
                false => RecordLock::take(&directory, own, &mut write),
            };
            match taken {
                Ok(lock) => {
                    self.lock = Some(lock);
                    return Ok(());
                }
                Err(RecordError::Held(_)) => {
                    let entry = store::read_one(&directory, own);
                    let said_by = None;
                    return Err(InUse { entry, said_by });
                }
                Err(error) => why = Some(error),
            }
        }
        let name = &self.entry.nics[0].name;
        let why = why.map_or_else(String::new, |error| format!(": {}", with_cause(&error)));
        let effect = match wanted.is_new {
            true => "`net list` does not show it",
            false => "another minivmm can start on it and take a part of its frames",
        };
        log::warn!(
            "{name} cannot be recorded as in use, so that {effect}{why} (a user without rights needs XDG_RUNTIME_DIR, or \
             {:?} made by root)",
            RecordDirectory::own()
                .get(1)
                .map_or(Path::new(""), PathBuf::as_path)
        );
        Ok(())
    }

    /// Whoever has locked a record of its own before this process looks is seen here; whoever does it later sees this one's.
    fn must_be_alone(&self, wanted: &Wanted, mut doubtful: impl FnMut(InUse)) -> Result<(), InUse> {
        let view = RecordView::default();
        for directory in RecordDirectory::all() {
            for key in [wanted.key.clone(), wanted.key.clone().passed()] {
                let path = directory.path().join(key.file("lock"));
                let is_own = self.lock.as_ref().is_some_and(|lock| lock.path() == path);
                if is_own || view.state(&directory, &key) != RecordState::Held {
                    continue;
                }
                let entry = store::read_one(directory.path(), &key);
                let is_guest = |entry: &Entry| matches!(entry.runs, Runs::Kernel(_));
                // Who has passed it on waits for our end.
                if wanted.is_passed && key == wanted.key && !entry.as_ref().is_some_and(is_guest) {
                    continue;
                }
                let said_by = (!directory.is_certain()).then_some(directory.user());
                let in_use = InUse { entry, said_by };
                match said_by {
                    None => return Err(in_use),
                    Some(_) => doubtful(in_use),
                }
            }
        }
        Ok(())
    }

    /// What is told of the NIC.
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

    /// Tells something else of the NIC.
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

fn with_cause(error: &RecordError) -> String {
    let cause = std::error::Error::source(error);
    cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

/// The file that tells of a NIC. Dropping it removes it.
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
