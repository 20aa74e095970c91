//! What a running minivmm tells about its guest, for `minivmm net list`: a file for each, that is
//! gone when the monitor is.

use std::net::IpAddr;
use std::path::PathBuf;

use net::LinkId;
use serde::{Deserialize, Serialize};

mod announce;
mod store;

pub use announce::{Announcer, Registration};

/// A running monitor, or another program that has its network card by minivmm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its process, for people.
    pub pid: u32,
    /// Its process, for good: a number alone is given out again.
    pub owner: String,
    /// What it runs.
    #[serde(flatten)]
    pub runs: Runs,
    /// The guest's network cards.
    pub nics: Vec<NicEntry>,
}

/// What a process does with its cards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Runs {
    /// It is minivmm with a guest: the kernel, as it was named.
    Kernel(PathBuf),
    /// It is another program.
    Program(PathBuf),
}

/// A network card of a running guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicEntry {
    /// The macvtap.
    pub name: String,
    /// The interface that it stands on.
    pub lower: String,
    /// The address that the guest has to use.
    pub mac: String,
    /// In bytes.
    pub mtu: u32,
    /// What the guest has said its addresses are.
    pub addresses: Vec<IpAddr>,
    /// Frames that the guest has sent from another MAC address.
    pub wrong_source_frames: u64,
    /// The number of the macvtap's character device, the same in all namespaces.
    #[serde(default)]
    pub device: u64,
    /// Which link the macvtap is, where that is known.
    #[serde(default)]
    pub id: Option<Id>,
    /// Which link it stands on, where that is known.
    #[serde(default)]
    pub lower_id: Option<Id>,
}

/// A [`LinkId`] in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Id {
    /// The network namespace's inode.
    pub namespace: u64,
    /// The interface index.
    pub index: u32,
}

impl From<LinkId> for Id {
    fn from(LinkId { namespace, index }: LinkId) -> Self {
        Self { namespace, index }
    }
}

impl Entry {
    /// Of this process, whose owner's tag is still missing.
    fn new(runs: Runs, nics: Vec<NicEntry>) -> Self {
        Self {
            pid: std::process::id(),
            owner: String::new(),
            runs,
            nics,
        }
    }

    /// Makes it fit to be shown: another user has written it.
    fn tame(&mut self) {
        let tame = |text: &mut String| text.retain(|c| !c.is_control());
        for nic in &mut self.nics {
            [&mut nic.name, &mut nic.lower, &mut nic.mac]
                .into_iter()
                .for_each(tame);
        }
        let (Runs::Kernel(path) | Runs::Program(path)) = &mut self.runs;
        let mut text = path.to_string_lossy().into_owned();
        tame(&mut text);
        *path = text.into();
    }
}

/// A card that is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InUse {
    /// By whom.
    pub entry: Entry,
    /// The card.
    pub nic: NicEntry,
    /// Whether root or this process's own user says so.
    pub is_certain: bool,
}

/// The monitors that run now. Files of those that were killed are removed on the way.
pub fn running() -> Vec<Entry> {
    found().into_iter().map(|found| found.entry).collect()
}

/// The cards of other processes than this one.
pub fn cards_in_use() -> Vec<InUse> {
    let own = [0, rustix::process::geteuid().as_raw()];
    let mut cards = Vec::new();
    for store::Found { entry, user } in found() {
        if entry.pid == std::process::id() {
            continue;
        }
        cards.extend(entry.nics.iter().map(|nic| InUse {
            entry: entry.clone(),
            nic: nic.clone(),
            is_certain: own.contains(&user),
        }));
    }
    cards
}

fn found() -> Vec<store::Found> {
    let directories = store::all_directories();
    let mut found: Vec<_> = directories
        .iter()
        .flat_map(|dir| store::read(dir))
        .collect();
    found.sort_by_key(|found| found.entry.pid);
    found
}

#[cfg(test)]
mod tests;
