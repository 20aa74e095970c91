//! The VMs of this user that run now.

use std::fs;
use std::path::Path;

use net::{RecordDirectory, RecordError};

use super::place::vms_in;
use super::{Place, Record};
use crate::config::VmName;

/// A VM that runs.
#[derive(Clone, Debug)]
pub struct Found {
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
    let mut all = all();
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
    let directories = RecordDirectory::own();
    let found = directories.iter().flat_map(|directory| all_in(directory));
    let mut all: Vec<_> = found.collect();
    all.sort_by_key(|found| (found.record.started, found.record.pid));
    all
}

pub(super) fn all_in(directory: &Path) -> Vec<Found> {
    let vms = vms_in(directory);
    // Another user's cannot be read.
    let entries = fs::read_dir(&vms).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let places = names.map(|name| Place::new(&vms, name));
    places.filter_map(examine).collect()
}

fn examine(place: Place) -> Option<Found> {
    if place.is_in_use() {
        let record = place.record()?;
        return Some(Found { record });
    }
    // No other process can take the lock meanwhile, so none in use is removed.
    match place.lock(|| place.remove()) {
        Ok(_) | Err(RecordError::Held(_)) => {}
        Err(error) => log::debug!("cannot remove what a killed VM has left: {error}"),
    }
    None
}
