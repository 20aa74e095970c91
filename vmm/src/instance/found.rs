//! The VMs of this user that run now.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use net::{Owner, RecordDirectory, RecordError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};

use super::place;
use super::record::Ended;
use super::{Place, Record};
use crate::config::VmName;
use crate::qmp::client::{Client, ClientError};

/// How often it is looked whether a VM has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Those that have ended and are still shown.
const MOST_ENDED: usize = 16;

/// A VM that runs, or one of `-d` that has ended.
#[derive(Clone, Debug)]
pub struct Found {
    place: Place,
    /// What it says of itself.
    pub record: Record,
}

/// Why a VM cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// There are others.
    #[error("no VM is called {0}: these run: {1}")]
    Others(VmName, String),
    /// There is none.
    #[error("no VM is called {0}: none runs")]
    None(VmName),
}

/// The VM that is called so.
///
/// # Errors
///
/// See [`FindError`].
pub fn find(name: &VmName) -> Result<Found, FindError> {
    find_in(all(), name)
}

/// The VM that is called so, also if it has ended and its directory is still there.
///
/// # Errors
///
/// See [`FindError`].
pub fn find_also_ended(name: &VmName) -> Result<Found, FindError> {
    find_in(all_also_ended(), name)
}

fn find_in(mut all: Vec<Found>, name: &VmName) -> Result<Found, FindError> {
    if let Some(at) = all.iter().position(|found| found.record.name == *name) {
        return Ok(all.swap_remove(at));
    }
    let names: Vec<_> = all.iter().map(|found| found.record.name.as_str()).collect();
    Err(match names.is_empty() {
        true => FindError::None(name.clone()),
        false => FindError::Others(name.clone(), names.join(", ")),
    })
}

/// All that run, the oldest first. What killed ones have left is removed on the way.
pub fn all() -> Vec<Found> {
    let mut all = all_also_ended();
    all.retain(|found| found.record.ended.is_none());
    all
}

/// The same with those of `-d` that have ended.
pub fn all_also_ended() -> Vec<Found> {
    let directories = RecordDirectory::own();
    let places = directories
        .iter()
        .filter_map(|directory| place::find(directory));
    let found = places.flat_map(|vms| all_of(&vms));
    let mut all: Vec<_> = found.collect();
    all.sort_by_key(|found| (found.record.started, found.record.pid));
    all
}

/// Those in the place of all VMs.
pub(super) fn all_of(vms: &Path) -> Vec<Found> {
    let entries = fs::read_dir(vms).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| place::named(entry.file_name().to_str()?));
    // Most have two entries.
    let names: BTreeSet<_> = names.collect();
    let places = names.into_iter().map(|name| Place::new(vms, name));
    places.filter_map(examine).collect()
}

impl Found {
    /// A connection to it, by which each answer may take `patience`.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub fn connect(&self, patience: Duration) -> Result<Client, ClientError> {
        Client::connect(&self.place.qmp_path(), patience)
    }

    /// Its log.
    pub fn log_path(&self) -> PathBuf {
        self.place.log_path()
    }

    /// Its process. None when that has ended, and when it is out of sight.
    pub fn process(&self) -> Option<Process> {
        let owner: Owner = self.record.owner.parse().ok()?;
        owner.pidfd().map(Process)
    }

    /// Removes what is to be known of it, once it has ended.
    pub fn forget(&self) {
        let Self { place, record } = self;
        // Its name may have been used again.
        let is_same = |now: Record| now.owner == record.owner && now.started == record.started;
        let lock = place.lock(|| {
            if place.record().is_some_and(is_same) {
                place.remove();
            }
        });
        log::debug!("{} is forgotten: {lock:?}", record.name);
    }

    /// Waits until it has ended, and says whether it has. What it has left is gone then.
    pub fn await_end(&self, timeout: Duration) -> bool {
        let has_ended = match self.process() {
            Some(process) => process.await_end(timeout),
            None => self.await_lock(timeout),
        };
        if has_ended {
            // Nothing is left of one that was killed either.
            examine(self.place.clone());
        }
        has_ended
    }

    /// The same where the process is out of sight, or gone already.
    fn await_lock(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let is_same = |record: Record| record.owner == self.record.owner;
        while self.place.is_in_use() && self.place.record().is_some_and(is_same) {
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(LOOK_AGAIN);
        }
        true
    }
}

/// A VM's process, and no other one.
#[derive(Debug)]
pub struct Process(OwnedFd);

impl Process {
    /// Ends it. Says whether this process may.
    pub fn kill(&self) -> bool {
        pidfd_send_signal(&self.0, Signal::KILL).is_ok()
    }

    fn await_end(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut ended = [PollFd::new(&self.0, PollFlags::IN)];
            match poll(&mut ended, Timespec::try_from(left).ok().as_ref()) {
                Err(Errno::INTR) => {}
                result => return result.is_ok_and(|count| count > 0),
            }
        }
    }
}

fn examine(place: Place) -> Option<Found> {
    if place.is_in_use() {
        let record = place.record()?;
        return Some(Found { place, record });
    }
    match place.record() {
        Some(record) if record.ended.is_some() => Some(Found { place, record }),
        _ => settle(place),
    }
}

/// Removes what a killed VM has left, or says in its record that it has ended.
fn settle(place: Place) -> Option<Found> {
    let mut ended = None;
    // No other process can take the lock meanwhile, so none in use is removed.
    let lock = place.lock(|| match place.record() {
        Some(mut record) if record.detached => {
            if record.ended.is_none() {
                record.ended = Some(Ended::killed());
                place.leave(&record);
            }
            ended = Some(record);
        }
        _ => place.remove(),
    });
    match lock {
        Ok(_) | Err(RecordError::Held(_)) => {}
        Err(error) => log::debug!("cannot remove what a killed VM has left: {error}"),
    }
    ended.map(|record| Found { place, record })
}

/// Removes what VMs that ended long ago have left.
pub(super) fn prune(vms: &Path) {
    let mut ended = all_of(vms);
    ended.retain(|found| found.record.ended.is_some());
    ended.sort_by_key(|found| found.record.ended.as_ref().map(|ended| ended.at));
    let many = ended.len().saturating_sub(MOST_ENDED);
    for found in &ended[..many] {
        log::debug!("{} ended long ago", found.record.name);
        found.forget();
    }
}
